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
    "published_shapes",
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
    router = _router(config) if config.has_router else ()
    plain = [*names.vision(config.vision_config), *_projector(config), *router, *language]
    if hf:
        check_writable(config)
        return renamed(plain)
    return with_adapters(plain, config)


def published_shapes(config, layout="torch"):
    """Name and shape of every tensor in the files of a model, which is not built for that.

    Args:
        config: an :class:`~.configuration.InternVLChatConfig`.
        layout: ``torch`` or ``hf``.

    Raises:
        ConfigError: the model has no form in transformers' layout.
    """
    return {part.name: part.stored_shape for weight in weight_table(config, layout) for part in weight.parts}


def parameter_shapes(config):
    """Name and shape of every parameter of the model that ``config`` describes."""
    return {weight.name: weight.shape for weight in weight_table(config)}


def _router(config):
    """The visual resolution router of the Flash models; see :mod:`paddlemix.models.blocks.router`."""
    width, size_out = config.vision_config.hidden_size, config.llm_config.hidden_size
    size_in = width * round(1 / config.downsample_ratio) ** 4
    yield from names.norm("mlp2.0", size_in, bias=True)
    for number, sizes in ((1, (size_in, 2 * size_out)), (4, (2 * size_out,) * 2), (7, (2 * size_out, size_out))):
        yield from names.linear(f"mlp2.{number}", *sizes, bias=True)
    pooling = "pooling_before_gating"
    yield names.plain(f"{pooling}.query_token", 1, width)
    for i in range(1, 5):
        attn = f"{pooling}.attn{i}"
        for weight in names.linear(f"{attn}.in_proj", width, 3 * width, bias=True):
            (part,) = weight.parts  # published as in_proj_weight and in_proj_bias
            yield weight._replace(parts=(part._replace(name=part.name.replace("in_proj.", "in_proj_")),))
        yield from names.linear(f"{attn}.out_proj", width, width, bias=True)
        yield from names.norm(f"{pooling}.norm{i}", width, bias=True)
    for i in range(1, 5):
        block = f"gating.block{i}"
        yield from names.linear(f"{block}.0", width, 4 * width, bias=True)
        yield from names.linear(f"{block}.3", 4 * width, width, bias=True)
        yield from names.norm(f"{block}.5", width, bias=True)
    yield from names.norm("gating.gate.0", width, bias=True)
    yield from names.linear("gating.gate.1", width, 2, bias=True)


def _projector(config):
    size_in = config.vision_config.hidden_size * round(1 / config.downsample_ratio) ** 2
    size_out = config.llm_config.hidden_size
    yield from names.norm("mlp1.0", size_in, bias=True)
    yield from names.linear("mlp1.1", size_in, size_out, bias=True)
    yield from names.linear("mlp1.3", size_out, size_out, bias=True)
