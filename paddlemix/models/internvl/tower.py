"""Vision towers by themselves, and those of whole models: InternViT-300M and -6B in all published sizes."""

import os
from dataclasses import dataclass

import paddle
from paddle import nn

from paddlemix.checkpoints import load_checkpoint, resolve, save_checkpoint
from paddlemix.models.blocks import vision
from paddlemix.models.blocks.engine import choose
from paddlemix.models.blocks.layers import count_parameters
from paddlemix.models.blocks.lora import add_adapters, merge_lora

from .configuration import TowerConfig


@dataclass
class VisionOutput:
    """What a tower makes of pictures.

    Attributes:
        last_hidden_state: ``[B, 1 + P, D]``, the class token and the patches; there is no final norm.
        pooler_output: ``[B, D]``, the class token.
        hidden_states: the embedding and the output of each block, a tuple; None unless asked for.
    """

    last_hidden_state: paddle.Tensor
    pooler_output: paddle.Tensor
    hidden_states: tuple | None = None


class InternVisionModel(vision.InternVisionModel):
    """The family's tower, loaded by itself and with all its outputs."""

    @classmethod
    def from_pretrained(cls, name_or_path, dtype="auto", engine="eager"):
        """Load a tower.

        Args:
            name_or_path: directory or name of a tower such as ``OpenGVLab/InternViT-300M-448px``, or of a whole model, of
                which nothing but its tower is read.
            dtype, engine: as for :meth:`~.modeling.InternVLModel.from_pretrained`.

        Raises:
            ConfigError, CheckpointError: the directory does not hold such a tower.
        """
        directory = resolve(name_or_path)
        holder = _Holder(TowerConfig.from_pretrained(directory), cls)
        engine, dtype = choose(engine, dtype, count_parameters(holder))
        load_checkpoint(holder, directory, dtype)
        merge_lora(holder)
        tower = holder.vision_model
        tower.eval()
        return tower

    def save_pretrained(self, directory, layout="torch", max_shard_size="5GB"):
        """Write the tower as it is published by itself; ``layout`` is ``torch`` or ``paddle``."""
        config = TowerConfig(self.config)
        os.makedirs(directory, exist_ok=True)
        parameters = {f"vision_model.{name}": value for name, value in self.state_dict().items()}
        save_checkpoint(parameters, config, directory, layout=layout, max_shard_size=max_shard_size)
        config.save(directory)

    def forward(self, pixel_values, output_hidden_states=False):
        """``pixel_values [B, 3, height, width]``, normalised -> :class:`VisionOutput`."""
        x = self.embeddings(pixel_values)
        states = [x]
        for block in self.encoder.layers if output_hidden_states else ():
            x = block(x)
            states.append(x)
        if not output_hidden_states:
            x = self.encoder(x, len(self.encoder.layers))
        return VisionOutput(x, x[:, 0], tuple(states) if output_hidden_states else None)


class _Holder(nn.Layer):
    """What has the tower as ``vision_model``, as the files of whole models name it."""

    def __init__(self, config, kind):
        super().__init__()
        self.config = config
        with paddle.LazyGuard():
            self.vision_model = kind(config.vision_config)
            add_adapters(self)
