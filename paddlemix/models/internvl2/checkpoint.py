"""The names of a chat model's weights; reading and writing them: :mod:`paddlemix.checkpoints.checkpoint`."""

from paddlemix.checkpoints import names
from paddlemix.checkpoints.checkpoint import (
    LAYOUTS,
    Checkpoint,
    convert_checkpoint,
    load_checkpoint,
    read_parameters,
    save_checkpoint,
)
from paddlemix.checkpoints.hf_names import renamed
from paddlemix.models.blocks.adapters import with_adapters

from .hf import check_writable

__all__ = [
    "LAYOUTS",
    "Checkpoint",
    "convert_checkpoint",
    "load_checkpoint",
    "parameter_shapes",
    "read_parameters",
    "save_checkpoint",
    "weight_table",
]


def weight_table(config, layout="torch", stacked=False):
    """How each parameter is made of published tensors.

    Args:
        config: an :class:`~.configuration.InternVLChatConfig`.
        layout: ``torch`` (and ``paddle``) for the original's names, ``hf`` for those of transformers' own layout.
        stacked: for ``hf``, whether experts are stacked in one tensor, as transformers 5 has them.

    Returns:
        A list of :class:`~paddlemix.checkpoints.names.Weight`, one for each parameter.
    """
    hf = layout == "hf"
    language = names.language(config.llm_config, as_llama=hf, stacked=hf and stacked)
    plain = [*names.vision(config.vision_config), *_projector(config), *language]
    if hf:
        check_writable(config)
        return renamed(plain)
    return with_adapters(plain, config)


def parameter_shapes(config):
    """Name and shape of every parameter of the model that ``config`` describes."""
    return {weight.name: weight.shape for weight in weight_table(config)}


def _projector(config):
    size_in = config.vision_config.hidden_size * round(1 / config.downsample_ratio) ** 2
    size_out = config.llm_config.hidden_size
    yield from names.norm("mlp1.0", size_in, bias=True)
    yield from names.linear("mlp1.1", size_in, size_out, bias=True)
    yield from names.linear("mlp1.3", size_out, size_out, bias=True)
