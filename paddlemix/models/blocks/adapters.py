"""LoRA adapters in checkpoints (arXiv 2106.09685): which layers have one, and what its tensors are called.

An adapter adds ``alpha / rank * x @ A @ B`` to a linear layer. The original puts one on every published linear tensor of
the blocks: where the model here holds several of these in one product (queries, keys and values; gate and up), the product
has as many adapters, each for its own outputs. Nothing here needs Paddle.
"""

import re

# alpha / rank: the original always takes twice the rank for alpha, and its checkpoints store the rank alone.
SCALE = 2.0

# Key in config.json of the rank of each tower's adapters.
RANKS = {"vision_model": "use_backbone_lora", "language_model": "use_llm_lora", "qllama": "use_qllama_lora"}

_ADAPTED = re.compile(
    r"vision_model\.encoder\.layers\.\d+\.(attn\.(qkv|proj)|mlp\.(fc1|fc2))\.(weight|bias)"
    r"|(language_model|qllama)\.model\.layers\.\d+\.(self_attn\.(qkv|[qkvo])_proj"
    r"|mlp\.(experts\.\d+\.)?(gate_up|gate|up|down)_proj)\.(weight|bias)"
)


def is_adapted(name):
    """Whether a parameter's layer gets adapters when its tower has any; ``name`` is the parameter's in the model."""
    return _ADAPTED.fullmatch(name) is not None


def adapter_sizes(weight):
    """Outputs of each adapter that the layer of a weight gets when its tower has any; empty for none."""
    if not (is_adapted(weight.name) and weight.name.endswith(".weight")):
        return []
    return [part.shape[-1 if is_stacked(part) else 0] for part in weight.parts]


def adapted_weights(table, tower):
    """The weights of ``table`` whose layers get adapters when the tower has any."""
    return [weight for weight in table if weight.name.startswith(f"{tower}.") and adapter_sizes(weight)]


def is_stacked(part):
    """Whether a published tensor has all experts of a layer, ``[experts, in, out]``, and this is the share of one of them."""
    return part.index is not None


def tower_rank(config, name):
    """Rank of the adapters in the tower (vision or language model) that a parameter or tensor belongs to; 0 without."""
    return getattr(config, RANKS.get(name.split(".")[0], ""), 0)


def with_adapters(table, config):
    """A table of weights under the names that they have when adapters are not merged, and the adapters' own.

    Args:
        table: what :func:`~.checkpoint.weight_table` lists for the model without adapters.
        config: its configuration; ``use_backbone_lora`` and ``use_llm_lora`` are the ranks, 0 for none.

    Returns:
        A list of the table's kind, in the same order, the adapters behind the weights that they belong to.
    """
    extended = []
    for weight in table:
        rank = tower_rank(config, weight.name)
        if not rank:
            extended.append(weight)
            continue
        # Experts that are stacked in one tensor have no linear layer of their own that PEFT could wrap.
        adapted = is_adapted(weight.name) and not is_stacked(weight.parts[0])
        parts = tuple(part._replace(name=_wrapped(part.name, adapted)) for part in weight.parts)
        extended.append(weight._replace(parts=parts))
        if adapter_sizes(weight):
            extended += _stacked_adapters(weight, rank) if is_stacked(weight.parts[0]) else _adapters(weight, rank)
    return extended


def _wrapped(name, adapted):
    """What PEFT calls a published tensor once it has wrapped the tower."""
    tower, name = name.split(".", 1)
    if adapted:
        layer, kind = name.rsplit(".", 1)
        name = f"{layer}.base_layer.{kind}"
    return f"{tower}.base_model.model.{name}"


def adapter_names(wrapped):
    """Published names of ``A`` and ``B`` of the layer whose weight is the tensor ``wrapped`` (``....base_layer.weight``).

    Those of stacked experts are named after the tensor itself.
    """
    layer = wrapped.removesuffix(".base_layer.weight")
    return f"{layer}.lora_A.default.weight", f"{layer}.lora_B.default.weight"


def _adapters(weight, rank):
    """The adapters of one linear weight, one for each published tensor in it, as entries of the table."""
    layer = weight.name.removesuffix(".weight")
    size_in = weight.shape[0]
    for i, part in enumerate(weight.parts):
        name_a, name_b = adapter_names(_wrapped(part.name, adapted=True))
        size_out = part.shape[0]
        first = min(output for _, output, _ in part.runs)
        runs = tuple((row, output - first, count) for row, output, count in part.runs)
        part_a = part._replace(name=name_a, shape=(rank, size_in), runs=((0, 0, rank),))
        part_b = part._replace(name=name_b, shape=(size_out, rank), runs=runs)
        yield weight._replace(name=f"{layer}.lora_A.{i}", shape=(size_in, rank), parts=(part_a,))
        yield weight._replace(name=f"{layer}.lora_B.{i}", shape=(rank, size_out), parts=(part_b,))


def _stacked_adapters(weight, rank):
    """The adapter of one expert of several that are stacked too: ``A [experts, in, rank]``, ``B [experts, rank, out]``.

    The original has no training with adapters on such experts, and PEFT has no plain form for it; the names are ours.
    """
    (part,) = weight.parts
    size_in, size_out = part.shape
    layer = weight.name.removesuffix(".weight")
    for letter, name, shape in zip(
        "AB", adapter_names(_wrapped(part.name, adapted=False)), ((size_in, rank), (rank, size_out))
    ):
        own = part._replace(name=name, shape=shape, runs=((0, 0, shape[0]),))
        yield weight._replace(name=f"{layer}.lora_{letter}.0", shape=shape, parts=(own,))
