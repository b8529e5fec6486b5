"""The table of names: which published tensors each parameter of a model is made of, and where their rows go.

Loading reads such a table in one direction and saving in the other. What towers and decoders have is listed here; a model
adds up its own (``weight_table()`` of its configuration).
"""

import itertools
from typing import NamedTuple

from .tensors import row_count


class Part(NamedTuple):
    """A published tensor and its share of a parameter.

    ``shape`` is that of the torch layout. Each of ``runs`` is ``(row, output, count)``: so many rows of the published
    tensor from ``row`` on are the outputs (columns of a linear weight, else rows) from ``output`` on of the parameter.
    Where experts are stacked in one tensor, ``index`` is the number of the one that is meant: ``shape`` and ``runs`` are of
    it alone, and ``stacked`` is how many there are.
    """

    name: str
    shape: tuple
    runs: tuple
    index: int | None = None
    stacked: int = 0

    @property
    def stored_shape(self):
        """Shape of the whole tensor."""
        return self.shape if self.index is None else (self.stacked, *self.shape)


class Weight(NamedTuple):
    """A parameter of the model; ``linear`` marks weights that the torch layout has transposed."""

    name: str
    shape: tuple
    linear: bool
    parts: tuple


def plain(name, *shape, published=None):
    """A parameter that is stored as it is."""
    return Weight(name, shape, False, (Part(published or name, shape, ((0, 0, row_count(shape)),)),))


def linear(name, size_in, size_out, bias, parts=None):
    """Weight and, if there is one, bias; ``parts`` lists ``(published name, runs)``."""
    parts = parts or [(name, ((0, 0, size_out),))]
    rows = [sum(count for *_, count in runs) for _, runs in parts]
    weights = tuple(Part(f"{part}.weight", (n, size_in), runs) for n, (part, runs) in zip(rows, parts))
    yield Weight(f"{name}.weight", (size_in, size_out), True, weights)
    if bias:
        biases = tuple(Part(f"{part}.bias", (n,), runs) for n, (part, runs) in zip(rows, parts))
        yield Weight(f"{name}.bias", (size_out,), False, biases)


def norm(name, size, bias):
    """Weight and, if there is one, bias of a norm."""
    yield plain(f"{name}.weight", size)
    if bias:
        yield plain(f"{name}.bias", size)


def vision(config, prefix="vision_model"):
    """Weights of the vision tower that a ``VisionConfig`` describes."""
    width, patch = config.hidden_size, config.patch_size
    yield plain(f"{prefix}.embeddings.class_embedding", 1, 1, width)
    yield plain(f"{prefix}.embeddings.position_embedding", 1, 1 + (config.image_size // patch) ** 2, width)
    yield plain(f"{prefix}.embeddings.patch_embedding.weight", width, config.num_channels, patch, patch)
    yield plain(f"{prefix}.embeddings.patch_embedding.bias", width)
    for i in range(config.num_hidden_layers):
        layer = f"{prefix}.encoder.layers.{i}"
        yield from linear(f"{layer}.attn.qkv", width, 3 * width, bias=config.qkv_bias)
        yield from linear(f"{layer}.attn.proj", width, width, bias=True)
        if config.qk_normalization:
            yield from norm(f"{layer}.attn.q_norm", width, bias=False)
            yield from norm(f"{layer}.attn.k_norm", width, bias=False)
        yield from linear(f"{layer}.mlp.fc1", width, config.intermediate_size, bias=True)
        yield from linear(f"{layer}.mlp.fc2", config.intermediate_size, width, bias=True)
        yield from norm(f"{layer}.norm1", width, bias=config.norm_type == "layer_norm")
        yield from norm(f"{layer}.norm2", width, bias=config.norm_type == "layer_norm")
        yield plain(f"{layer}.ls1", width)
        yield plain(f"{layer}.ls2", width)


def attention_pooling(name, width, size_out):
    """Weights of attention pooling from ``width`` to ``size_out``."""
    for letter in "qkv":
        yield from norm(f"{name}.norm1_{letter}", width, bias=True)
        yield from linear(f"{name}.cross_attn.{letter}", width, width, bias=False)
        yield plain(f"{name}.cross_attn.{letter}_bias", width)
    yield from linear(f"{name}.cross_attn.proj", width, size_out, bias=True)


# What the families call their tensors where it is not what the model calls them.
_SEPARATE = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}
_PUBLISHED = {
    "LlamaForCausalLM": _SEPARATE,
    "Qwen2ForCausalLM": _SEPARATE,
    "Qwen3ForCausalLM": _SEPARATE,
    "Qwen3MoeForCausalLM": _SEPARATE,
    "InternLM3ForCausalLM": _SEPARATE,
    "GptOssForCausalLM": {**_SEPARATE, "mlp.gate": ("mlp.router",)},
    "Phi3ForCausalLM": {},
    "InternLM2ForCausalLM": {
        "embed_tokens": ("tok_embeddings",),
        "input_layernorm": ("attention_norm",),
        "self_attn.qkv_proj": ("attention.wqkv",),
        "self_attn.o_proj": ("attention.wo",),
        "post_attention_layernorm": ("ffn_norm",),
        "mlp.gate_up_proj": ("feed_forward.w1", "feed_forward.w3"),
        "mlp.down_proj": ("feed_forward.w2",),
        "lm_head": ("output",),
    },
}


def head_name(config, prefix="language_model"):
    """What a file of the language model's family calls the weight of the output head."""
    return f"{prefix}.{_PUBLISHED[config.family].get('lm_head', ('lm_head',))[0]}.weight"


def language(config, prefix="language_model", as_llama=False, stacked=False):
    """Weights of the decoder that a ``LanguageConfig`` describes; those of the head are the last, unless it is tied.

    Args:
        config: the configuration.
        prefix: what all names begin with.
        as_llama: InternLM2 under Llama's names, as transformers has it.
        stacked: all experts of a layer in one tensor, ``[experts, out, in]``, where they are files of their own otherwise.
    """
    names = _SEPARATE if as_llama and config.family == "InternLM2ForCausalLM" else _PUBLISHED[config.family]
    width, head = config.hidden_size, config.head_dim
    qkv = [count * head for count in (config.num_attention_heads, *[config.num_key_value_heads] * 2)]

    def published(prefix, name):
        return [f"{prefix}.{own}" for own in names.get(name, (name,))]

    def one(prefix, name, *shape):
        return plain(f"{prefix}.{name}.weight", *shape, published=f"{published(prefix, name)[0]}.weight")

    def product(prefix, name, size_in, sizes, bias=False):
        own = names.get(name, (name,))
        if not config.fused_projections and len(own) == len(sizes):
            for part, size in zip(own, sizes):
                yield from linear(f"{prefix}.{part}", size_in, size, bias)
            return
        parts = published(prefix, name)
        starts = [0, *itertools.accumulate(sizes)]
        if len(parts) == len(sizes):
            runs = [((0, start, size),) for start, size in zip(starts, sizes)]
        elif config.family == "InternLM2ForCausalLM":
            runs = [tuple(_grouped_runs(config))]
        else:
            runs = [((0, 0, starts[-1]),)]
        yield from linear(f"{prefix}.{name}", size_in, starts[-1], bias, list(zip(parts, runs)))

    model = f"{prefix}.model"
    yield one(model, "embed_tokens", config.vocab_size, width)
    for i in range(config.num_hidden_layers):
        layer = f"{model}.layers.{i}"
        yield one(layer, "input_layernorm", width)
        yield from product(layer, "self_attn.qkv_proj", width, qkv, bias=config.qkv_bias)
        yield from product(layer, "self_attn.o_proj", qkv[0], [width], bias=config.o_bias)
        if config.qk_norm:
            yield one(layer, "self_attn.q_norm", head)
            yield one(layer, "self_attn.k_norm", head)
        if config.sinks:
            yield plain(f"{layer}.self_attn.sinks", config.num_attention_heads)
        if config.cross_attention_frequency and i % config.cross_attention_frequency == 0:
            yield from _cross_attention(config, f"{layer}.cross_attn")
        yield one(layer, "post_attention_layernorm", width)
        if config.is_sparse(i):
            yield from product(layer, "mlp.gate", width, [config.experts.count], bias=config.experts.bias)
            yield from _experts(config, f"{layer}.mlp.experts", stacked)
        else:
            yield from product(layer, "mlp.gate_up_proj", width, [config.intermediate_size] * 2, bias=config.mlp_bias)
            yield from product(layer, "mlp.down_proj", config.intermediate_size, [width], bias=config.mlp_bias)
    yield one(model, "norm", width)
    if not config.tie_word_embeddings:
        yield from product(prefix, "lm_head", width, [config.vocab_size])


def _experts(config, prefix, stacked):
    """Weights of a layer's experts, each of which is a gated MLP of its own in the model."""
    width, experts = config.hidden_size, config.experts
    for i in range(experts.count):
        if config.family == "GptOssForCausalLM":
            yield from _stacked(prefix, i, experts.count, "gate_up_proj", width, 2 * experts.width)
            yield from _stacked(prefix, i, experts.count, "down_proj", experts.width, width)
            continue
        if stacked:
            for name, size_in, size_out in (("gate_up_proj", width, 2 * experts.width), ("down_proj", experts.width, width)):
                part = Part(f"{prefix}.{name}", (size_out, size_in), ((0, 0, size_out),), i, experts.count)
                yield Weight(f"{prefix}.{i}.{name}.weight", (size_in, size_out), True, (part,))
            continue
        halves = (("gate_proj", 0), ("up_proj", experts.width))
        parts = [(f"{prefix}.{i}.{name}", ((0, first, experts.width),)) for name, first in halves]
        yield from linear(f"{prefix}.{i}.gate_up_proj", width, 2 * experts.width, experts.bias, parts)
        yield from linear(f"{prefix}.{i}.down_proj", experts.width, width, experts.bias)


def _stacked(prefix, i, count, name, size_in, size_out):
    """gpt-oss has all experts of a layer in one tensor, ``[experts, in, out]`` in every layout."""
    for kind, published, shape in (("weight", name, (size_in, size_out)), ("bias", f"{name}_bias", (size_out,))):
        part = Part(f"{prefix}.{published}", shape, ((0, 0, shape[0]),), i, count)
        yield Weight(f"{prefix}.{i}.{name}.{kind}", shape, False, (part,))


def _cross_attention(config, name):
    width, picture = config.hidden_size, config.cross_attention_width
    yield from norm(f"{name}.norm1", width, bias=False)
    yield from norm(f"{name}.norm2", picture, bias=False)
    for letter, size_in in (("q", width), ("k", picture), ("v", picture), ("o", width)):
        yield from linear(f"{name}.{letter}_proj", size_in, width, bias=False)


def _grouped_runs(config):
    """InternLM2's ``wqkv`` holds, for each key/value head in turn, its queries, its key and its value."""
    head, groups = config.head_dim, config.num_key_value_heads
    queries = config.num_attention_heads // groups * head
    keys, values = groups * queries, groups * (queries + head)
    for group in range(groups):
        row = group * (queries + 2 * head)
        yield row, group * queries, queries
        yield row + queries, keys + group * head, head
        yield row + queries + head, values + group * head, head
