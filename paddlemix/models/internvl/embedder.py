"""Pictures and texts to normalised features: a loaded model with its tokenizer and its way of reading pictures."""

import os

import numpy as np
import paddle

from paddlemix.arrays import host_array
from paddlemix.checkpoints import resolve
from paddlemix.errors import ConfigError
from paddlemix.processors.transforms import TASKS, transform

from .modeling import MODES, InternVLModel
from .tokenization import load_tokenizer


def unit(features):
    """``features [..., E]`` with length 1, float32."""
    features = host_array(features, "features").astype("float32")
    return features / np.maximum(np.linalg.norm(features, axis=-1, keepdims=True), 1e-12)


class Embedder:
    """What turns pictures and texts into vectors of one space.

    Args:
        name_or_path: a checkpoint directory, or a name such as ``OpenGVLab/InternVL-14B-224px``.
        dtype, engine: as for :meth:`~.modeling.InternVLModel.from_pretrained`.
        mode: ``InternVL-C`` or ``InternVL-G``.
        task: how pictures are read, see :func:`~paddlemix.processors.transforms.transform`.
        image_size: side of a picture in pixels; None for the model's.

    Attributes:
        width: numbers of a vector.

    Raises:
        ConfigError: an argument makes no sense. CheckpointError, TokenizerError: files are missing or damaged.
    """

    def __init__(
        self, name_or_path, dtype="auto", engine="auto", mode="InternVL-C", task="retrieval", image_size=None, batch_size=16
    ):
        for what, value, known in (("mode", mode, MODES), ("transform", task, TASKS)):
            if value not in known:
                raise ConfigError(f"the {what} is '{value}': it must be one of {', '.join(known)}")
        for what, value in (("batch_size", batch_size), ("image_size", image_size)):
            if value is not None and value < 1:
                raise ConfigError(f"--{what} is {value}: it must be at least 1")
        self.name, self.directory = os.fspath(name_or_path), resolve(name_or_path)
        self.model = InternVLModel.from_pretrained(self.directory, dtype=dtype, engine=engine)
        self.tokenizer = load_tokenizer(self.directory)
        self.mode, self.task, self.batch_size = mode, task, batch_size
        self.width = self.model.config.clip_embed_dim
        patch, self.image_size = self.model.config.vision_config.patch_size, image_size or self.model.config.image_size
        if self.image_size % patch:
            raise ConfigError(f"--image_size is {image_size}: it must be a multiple of the model's patches of {patch} pixels")

    def read(self, picture):
        """Pixels ``[3, S, S]`` of anything that ``open_image`` takes."""
        return transform(picture, self.task, self.image_size)

    @paddle.no_grad()
    def raw(self, pixels):
        """Features ``[B, E]`` float32 of pixels ``[B, 3, S, S]``, as the model has them."""
        return self.model.encode_image(pixels, self.mode).astype("float32").numpy()

    def encode(self, pixels):
        """The same, normalised."""
        return unit(self.raw(pixels))

    def images(self, pictures):
        """Normalised features ``[pictures, E]`` float32 of a list of pictures, some at a time."""
        parts = [np.zeros([0, self.width], "float32")]
        for at in range(0, len(pictures), self.batch_size):
            parts.append(self.encode(np.stack([self.read(picture) for picture in pictures[at : at + self.batch_size]])))
        return np.concatenate(parts)

    def texts(self, texts):
        """Normalised features ``[texts, E]`` float32 of a list of texts."""
        return encode_texts(self.model, self.tokenizer, texts)


@paddle.no_grad()
def encode_texts(model, tokenizer, texts, batch_size=64):
    """Normalised features ``[texts, E]`` float32 of a list of texts, some at a time."""
    parts = [
        model.encode_text(tokenizer(list(texts[at : at + batch_size]))).astype("float32").numpy()
        for at in range(0, len(texts), batch_size)
    ]
    return unit(np.concatenate(parts)) if parts else np.zeros([0, model.config.clip_embed_dim], "float32")
