"""A chat model divided over the ranks of a group: its layers replaced by this rank's shares, from outside.

Two sums over the ranks in a block, after attention and after the MLP, and as many of gradients in the backward pass. A 6B tower
has one small one beside: the sums of squares that normalise its queries and keys. :mod:`~.division` says who has what.
"""

import copy

import numpy as np
import paddle
from paddle import nn
from paddle.nn import functional as F

from paddlemix.checkpoints.checkpoint import NOTHING

from .division import Division, shares_of
from .experts import GatedMLP, MixtureOfExperts, run_experts
from .language import DecoderAttention, TiedHead
from .layers import Linear
from .lora import add_adapters
from .vision import VisionAttention, VisionMLP

__all__ = ["divide", "whole_array", "whole_parameters"]


def divide(model, group):
    """Leave this rank's share of ``model``; to be called under ``paddle.LazyGuard``, before weights are loaded.

    Args:
        model: a :class:`~.chat_model.ChatModel`, whose ``config`` stays that of the whole.
        group: a :class:`~paddlemix.parallel.groups.Group`.

    Raises:
        ConfigError: it cannot be divided over so many.
    """
    division = Division(model.config, group.rank, group.size)
    model.division, model.group = division, group
    _divide_vision(model, division, group)
    _divide_language(model.language_model, division, group)
    first, third = model.mlp1["1"], model.mlp1["3"]
    _, count = division.inputs("mlp1.3")
    model.mlp1.add_sublayer("1", Linear(first.weight.shape[0], count))
    model.mlp1.add_sublayer("3", Linear(count, third.weight.shape[1]))
    _copies_input(model.mlp1["1"], group)
    for path, layer in model.named_sublayers():
        if isinstance(layer, Linear) and (run := division.inputs(path)) is not None:
            layer.group, layer.inputs = group, (*run, _whole_inputs(model.config, path))
    add_adapters(model)  # again, on the layers that are here


def _whole_inputs(config, path):
    llm, vision = config.llm_config, config.vision_config
    return {
        "o_proj": llm.num_attention_heads * llm.head_dim,
        "down_proj": llm.intermediate_size,
        "proj": vision.hidden_size,
        "fc2": vision.intermediate_size,
        "3": llm.hidden_size,
    }[path.rpartition(".")[2]]


def _copies_input(layer, group):
    """Let the first input of ``layer``, which every rank has and uses for its share, get the sum of its gradients."""
    layer.register_forward_pre_hook(lambda _, inputs: (group.copied(inputs[0]), *inputs[1:]))


# ---------------------------------------------------------------------- vision


def _divide_vision(model, division, group):
    config = model.config.vision_config
    heads, inner = (last - first for first, last in (division.vision_heads, division.vision_inner))
    for layer in model.vision_model.encoder.layers:
        layer.attn = _VisionAttention(config, heads, group)
        layer.mlp = VisionMLP(config, inner)
        _copies_input(layer.attn, group)
        _copies_input(layer.mlp, group)


class _VisionAttention(VisionAttention):
    """Some of the heads; queries and keys are normalised over all."""

    def __init__(self, config, heads, group):
        super().__init__(config, heads)
        self._ranks, self._width = group, config.hidden_size

    def normalised(self, q, k):
        q32, k32 = q.astype("float32"), k.astype("float32")
        squares = [x.square().sum(-1, keepdim=True) for x in (q32, k32)]
        squares = self._ranks.copied(self._ranks.summed(paddle.concat(squares, axis=-1)))
        scales = paddle.rsqrt(squares / self._width + self.q_norm.eps).split(2, axis=-1)
        return tuple(
            (x * scale).astype(q.dtype) * norm.weight for x, scale, norm in zip((q32, k32), scales, (self.q_norm, self.k_norm))
        )


# ---------------------------------------------------------------------- language


def _divide_language(language, division, group):
    config = division.config.llm_config
    local = copy.copy(config)  # of what attention and its cache hold here
    local.num_attention_heads, local.num_key_value_heads = (
        last - first for first, last in (division.heads, division.key_heads)
    )
    language.config = local
    decoder = language.model
    for i, layer in enumerate(decoder.layers):
        layer.self_attn = DecoderAttention(local, i)
        if layer.is_sparse:
            layer.mlp = _Experts(config, division.experts, group)
        else:
            first, last = division.inner
            layer.mlp = GatedMLP(config, last - first, config.mlp_bias)
            _copies_input(layer.mlp, group)
        _copies_input(layer.self_attn, group)
    decoder.embed_tokens = _Embedding(config, division.vocabulary, group)
    widths = [last - first for first, last in shares_of(config.vocab_size, group.size)]
    if config.tie_word_embeddings:
        language.lm_head = _TiedHead(decoder.embed_tokens)
    else:
        language.lm_head = _Head(config.hidden_size, widths[group.rank], bias=False)
    language.lm_head.ranks, language.lm_head.widths = group, widths


class _Embedding(nn.Embedding):
    """Rows ``first`` to ``last`` of the token embeddings; the ids of all."""

    def __init__(self, config, share, group):
        first, last = share
        normal = paddle.ParamAttr(initializer=nn.initializer.Normal(std=config.initializer_range))
        super().__init__(last - first, config.hidden_size, weight_attr=normal)
        self._first, self._count, self._ranks = first, last - first, group

    def forward(self, ids):
        here = ids.numpy() - self._first
        outside = (here < 0) | (here >= self._count)
        rows = F.embedding(paddle.to_tensor(np.where(outside, 0, here)), self.weight)
        return self._ranks.summed(rows * paddle.to_tensor(~outside[..., None]).astype(rows.dtype))


class _Gathering:
    """An output head of a share of the vocabulary, whose logits are of all of it.

    Attributes:
        ranks, widths: the group, and how much of the vocabulary each rank has.
    """

    def forward(self, x):
        """``[..., D] -> [..., V]``."""
        return self.ranks.gathered(self.own_logits(self.ranks.copied(x)), self.widths)

    def own_logits(self, x):
        """``[..., D]`` -> the logits that are here."""
        return super().forward(x)

    @property
    def first(self):
        """The first token whose logit is here."""
        return sum(self.widths[: self.ranks.rank])


class _Head(_Gathering, Linear):
    pass


class _TiedHead(_Gathering, TiedHead):
    pass


class _OwnExperts(nn.Layer):
    """Experts ``first`` to ``last``, under the numbers that they have among all."""

    def __init__(self, config, first, last):
        super().__init__()
        self._first = first
        for number in range(first, last):
            self.add_sublayer(str(number), GatedMLP(config, config.experts.width, config.experts.bias))

    def __len__(self):
        return len(self._sub_layers)

    def __getitem__(self, place):
        return self._sub_layers[str(self._first + place)]


class _Experts(MixtureOfExperts):
    """The router, and the experts that are here: a token's results are summed over the ranks."""

    def __init__(self, config, share, group):
        super().__init__(config)
        self.experts = _OwnExperts(config, *share)
        self._first, self._ranks = share[0], group

    def forward(self, x, residual, with_router=False):
        flat = x.reshape([-1, x.shape[-1]])
        logits, chosen, weights = self.gate(flat)
        flat, weights = self._ranks.copied(flat, weights)  # the router's own gradient is whole in every rank
        trained = self.training and paddle.is_grad_enabled()
        y = self._ranks.summed(run_experts(flat, chosen, weights, self.experts, trained, self._first))
        y = residual + y.reshape(x.shape)
        return (y, logits) if with_router else y


# ---------------------------------------------------------------------- whole weights


def whole_array(group, divisions, name, shape, own, dtype):
    """The whole of a divided array in the host's memory of rank 0, None in the others; every rank calls this.

    Args:
        group: the ranks.
        divisions: of each rank, in order.
        name: of the parameter that it belongs to.
        shape: of the whole.
        own: this rank's share, a tensor; None where it has none.
        dtype: of the tensors.
    """
    shares = [division.share(name) for division in divisions]
    if all(share is None for share in shares):
        return own.numpy() if group.is_first else None
    whole = None
    for rank, share in enumerate(shares):
        if share is NOTHING:
            continue
        part = own if rank == group.rank else paddle.empty(shape if share is None else share.of(shape), dtype)
        if rank:
            group.broadcast(part, rank)
        if not group.is_first:
            continue
        array = part.numpy()
        whole = np.empty(shape, array.dtype) if whole is None else whole
        if share is None:
            whole[...] = array
        else:
            share.put(whole, array)
    return whole


def whole_parameters(model, arrays=None):
    """``{name: array}`` of all weights of a divided ``model`` in rank 0; an empty one in the others. Every rank calls this.

    ``arrays``: ``{name: array}`` of what is here, where the model itself does not have it.
    """
    divisions, parameters, found = model.division.every(), model.state_dict(), {}
    dtype = parameters["mlp1.1.weight"].dtype
    if arrays is not None:
        parameters = {name: paddle.to_tensor(array).reshape(array.shape) for name, array in arrays.items()}
    for weight in model.config.weight_table():
        whole = whole_array(model.group, divisions, weight.name, weight.shape, parameters.get(weight.name), dtype)
        if whole is not None:
            found[weight.name] = whole
    return found
