"""Which share of each weight a rank has where a model is divided over ranks (Shoeybi et al., arXiv 1909.08053).

Attention is dealt by key heads with their queries; where there are more ranks than key heads, several ranks have the same one
and share its queries. MLPs are dealt by inner width, the vocabulary by rows, experts whole. Shares need not be equal: 25 heads
over two ranks are 13 and 12, which costs less than 26 with a head of zeros. All else is whole in every rank. Nothing here
needs Paddle.
"""

import re

from paddlemix.checkpoints.checkpoint import NOTHING
from paddlemix.checkpoints.contents import Share
from paddlemix.errors import ConfigError

from .adapters import adapter_sizes

__all__ = ["Division", "check_division", "head_shares", "shares_of"]


def shares_of(count, size):
    """``count`` things dealt over ``size`` ranks, in order and as evenly as can be: ``[(first, last + 1), ...]``."""
    least, more = divmod(count, size)
    edges = [rank * least + min(rank, more) for rank in range(size + 1)]
    return list(zip(edges, edges[1:]))


def inner_shares(width, size):
    """:func:`shares_of` an inner width, in units of 32 where that costs little: groups of weights in few bits begin there."""
    unit = 32 if width % 32 == 0 and width >= 256 * size else 1
    return [(first * unit, last * unit) for first, last in shares_of(width // unit, size)]


def head_shares(heads, key_heads, size):
    """For each of ``size`` ranks ``((first, last + 1) query head, (first, last + 1) key head)``.

    Every rank's queries are spread evenly over its keys, as attention needs it.
    """
    group = heads // key_heads
    if key_heads >= size:
        return [((a * group, b * group), (a, b)) for a, b in shares_of(key_heads, size)]
    found = []
    for key, (a, b) in enumerate(shares_of(size, key_heads)):
        found += [((key * group + c, key * group + d), (key, key + 1)) for c, d in shares_of(group, b - a)]
    return found


def check_division(config, size):
    """Whether a chat model of this configuration can be divided over ``size`` ranks.

    Raises:
        ConfigError: no; the sentence names the most ranks.
    """
    llm, vision = config.llm_config, config.vision_config
    most = min(vision.num_attention_heads, llm.num_attention_heads, llm.experts.count if llm.experts else 4096)
    while most > 1 and min(b - a for (a, b), _ in head_shares(llm.num_attention_heads, llm.num_key_value_heads, most)) == 0:
        most -= 1
    if llm.cross_attention_frequency:
        raise ConfigError("tensor_parallel is not for models with cross-attention: use 1")
    if not 1 <= size <= most:
        raise ConfigError(f"tensor_parallel is {size}: this model's heads and experts can be dealt over 1 to {most} ranks")


class Division:
    """The shares of rank ``rank`` of ``size``.

    Args:
        config: of the whole chat model.
        rank, size: which of how many ranks.
    """

    def __init__(self, config, rank, size):
        check_division(config, size)
        self.config, self.rank, self.size = config, rank, size
        llm, vision = config.llm_config, config.vision_config
        self.heads, self.key_heads = head_shares(llm.num_attention_heads, llm.num_key_value_heads, size)[rank]
        self.vision_heads = shares_of(vision.num_attention_heads, size)[rank]
        self.inner = inner_shares(llm.intermediate_size, size)[rank]
        self.vision_inner = shares_of(vision.intermediate_size, size)[rank]
        self.projector = shares_of(llm.hidden_size, size)[rank]
        self.vocabulary = shares_of(llm.vocab_size, size)[rank]
        self.experts = shares_of(llm.experts.count, size)[rank] if llm.experts else (0, 0)
        self._sizes = None

    def every(self):
        """The divisions of all ranks, in order."""
        return [Division(self.config, rank, self.size) for rank in range(self.size)]

    # ------------------------------------------------------------------ layers

    def outputs(self, layer):
        """Runs of the outputs of a linear layer, by its path in the model, that are here; None where all are."""
        llm, width = self.config.llm_config, self.config.llm_config.head_dim
        if match := re.fullmatch(r"language_model\.model\.layers\.\d+\.(.+)", layer):
            name, queries, keys = match[1], llm.num_attention_heads, llm.num_key_value_heads
            q, k = _runs(self.heads, width), _runs(self.key_heads, width)
            return {
                "self_attn.qkv_proj": (q, _after(k, queries * width), _after(k, (queries + keys) * width)),
                "self_attn.q_proj": (q,),
                "self_attn.k_proj": (k,),
                "self_attn.v_proj": (k,),
                "mlp.gate_up_proj": (_runs(self.inner), _after(_runs(self.inner), llm.intermediate_size)),
                "mlp.gate_proj": (_runs(self.inner),),
                "mlp.up_proj": (_runs(self.inner),),
            }.get(name)
        if match := re.fullmatch(r"vision_model\.encoder\.layers\.\d+\.(.+)", layer):
            vision = self.config.vision_config
            own = _runs(self.vision_heads, vision.hidden_size // vision.num_attention_heads)
            qkv = tuple(_after(own, i * vision.hidden_size) for i in range(3))
            return {"attn.qkv": qkv, "mlp.fc1": (_runs(self.vision_inner),)}.get(match[1])
        return {"mlp1.1": (_runs(self.projector),), "language_model.lm_head": (_runs(self.vocabulary),)}.get(layer)

    def inputs(self, layer):
        """``(first, count)`` of the inputs of a linear layer that are here; None where all are."""
        name = re.sub(r"^(language_model\.model|vision_model\.encoder)\.layers\.\d+\.", r"\1 ", layer)
        vision = self.config.vision_config
        return {
            "language_model.model self_attn.o_proj": _runs(self.heads, self.config.llm_config.head_dim),
            "language_model.model mlp.down_proj": _runs(self.inner),
            "vision_model.encoder attn.proj": _runs(self.vision_heads, vision.hidden_size // vision.num_attention_heads),
            "vision_model.encoder mlp.fc2": _runs(self.vision_inner),
            "mlp1.3": _runs(self.projector),
        }.get(name)

    # ------------------------------------------------------------------ parameters

    def share(self, name):
        """The :class:`Share` of a parameter that is here; None for all of it, ``NOTHING`` for none."""
        if match := re.search(r"\.mlp\.experts\.(\d+)\.", name):
            return None if self.experts[0] <= int(match[1]) < self.experts[1] else NOTHING
        layer, _, kind = name.rpartition(".")
        if name == "language_model.model.embed_tokens.weight":
            return Share(0, (_runs(self.vocabulary),))
        if name.endswith(".self_attn.sinks"):
            return Share(0, (_runs(self.heads),))
        if re.fullmatch(r"vision_model\.encoder\.layers\.\d+\.attn\.[qk]_norm\.weight", name):
            vision = self.config.vision_config
            return Share(0, (_runs(self.vision_heads, vision.hidden_size // vision.num_attention_heads),))
        if match := re.fullmatch(r"(.+)\.lora_([AB])\.(\d+)", name):
            return self._adapter_share(match[1], match[2], int(match[3]))
        if (runs := self.outputs(layer)) is not None:
            return Share(1 if kind == "weight" else 0, runs)
        if kind == "weight" and (run := self.inputs(layer)) is not None:
            return Share(0, (run,))
        return None

    def _adapter_share(self, layer, letter, number):
        if letter == "A":
            run = self.inputs(layer)
            return None if run is None else Share(0, (run,))
        runs = self.outputs(layer)
        if runs is None:
            return None
        sizes = self.adapter_sizes(layer)
        first = sum(sizes[:number])
        clipped = [(max(start, first), min(start + count, first + sizes[number])) for start, count in runs]
        return Share(1, tuple((a - first, b - a) for a, b in clipped if a < b))

    def adapter_sizes(self, layer):
        """Outputs of each adapter of a whole layer."""
        if self._sizes is None:
            table = self.config.weight_table()
            self._sizes = {w.name.removesuffix(".weight"): found for w in table if (found := adapter_sizes(w))}
        return self._sizes[layer]

    def own_adapter_sizes(self, layer):
        """The same of what is here of it; None where nothing is."""
        shares = [self.share(f"{layer}.lora_B.{i}") for i in range(len(self.adapter_sizes(layer)))]
        if NOTHING in shares:
            return None
        return [size if share is None else share.size for size, share in zip(self.adapter_sizes(layer), shares)]

    def sums_gradient(self, name):
        """Whether a parameter is whole in every rank but gets only a part of its gradient in each."""
        if self.share(name) is not None or ".mlp.experts." in name:
            return False
        if match := re.fullmatch(r"(.+)\.lora_([AB])\.\d+", name):
            return (self.outputs(match[1]) if match[2] == "A" else self.inputs(match[1])) is not None
        return re.fullmatch(r"language_model\.model\.layers\.\d+\.self_attn\.[qk]_norm\.weight", name) is not None

    def repeats_keys(self):
        """Whether several ranks have the same key heads."""
        return self.config.llm_config.num_key_value_heads < self.size


def _runs(share, width=1):
    """``(first, count)`` of a share of things that are ``width`` wide."""
    return share[0] * width, (share[1] - share[0]) * width


def _after(run, places):
    return run[0] + places, run[1]
