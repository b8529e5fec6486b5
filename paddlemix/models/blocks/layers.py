"""The building blocks that vision and language share: linear, norms, rotary positions, attention.

Each function picks the kernel for the device and dtype at hand, so that a model's ``forward`` reads the same everywhere.
Tensor shapes in comments: B batch, N queries, S keys, H query heads, K key/value heads, D head width.
"""

import math

import numpy as np
import paddle
from paddle import nn
from paddle.nn import functional as F
from paddle.nn.functional import swiglu

from paddlemix.kernels import fused, gemm

__all__ = [
    "AttentionMask",
    "LayerNorm",
    "Linear",
    "RMSNorm",
    "Rotary",
    "apply_rope",
    "attention",
    "count_parameters",
    "rotated",
    "swiglu",
    "take_rows",
]


class Linear(nn.Linear):
    """``residual + scale * activation(x @ weight + bias)``: what follows the product is part of the call, in one place.

    ``weight`` is ``[in, out]`` as everywhere in Paddle.

    Attributes:
        group: the ranks that have a share of the inputs each, so that their products are summed; None for this one alone.

    ``weight`` is None where :meth:`product` has it in another form.
    """

    group = None

    def __init__(self, in_features, out_features, bias=True):
        super().__init__(in_features, out_features, bias_attr=None if bias else False)

    def forward(self, x, gelu=False, scale=None, residual=None):
        """``x [..., in] -> [..., out]``; ``scale [out]`` and ``residual [..., out]`` are optional."""
        bias = self.bias if self.group is None else None
        own = None if self.weight is None else gemm.linear_for(x, self.weight)
        linear = own or F.linear
        if bias is not None and self.weight is not None and own is None and fused.choose("linear", x.dtype) != "plain":
            linear = fused.linear
        y = self.product(x, linear, bias)
        if self.group is not None:
            y = self.group.summed(y)
            y = y if self.bias is None else y + self.bias
        if gelu:
            y = gemm.gelu(y) if own and y.stop_gradient else F.gelu(y)
        if scale is not None:
            y = y * scale
        return y if residual is None else residual + y

    def product(self, x, linear, bias):
        """``x @ weight + bias`` by ``linear``; of a share of the inputs it is a part of the sum."""
        return linear(x, self.weight, bias)


class RMSNorm(nn.Layer):
    """Root-mean-square norm over the last axis, computed in float32 (arXiv 1910.07467)."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight = self.create_parameter([size], default_initializer=nn.initializer.Constant(1.0))
        self.eps = eps

    def forward(self, x):
        kernel = fused.choose("norm", x.dtype)
        if kernel != "plain" and x.dtype == self.weight.dtype:
            return fused.rms_norm(kernel, x, self.weight, self.eps)
        # Composed from operators that every backend has: F.rms_norm has no CPU kernel and is export-only on NPU.
        y = x.astype("float32")
        y = y * paddle.rsqrt(paddle.mean(paddle.square(y), axis=-1, keepdim=True) + self.eps)
        return y.astype(x.dtype) * self.weight

    def add(self, residual, x):
        """``residual + x`` and its norm."""
        if paddle.is_grad_enabled() is False and x.dtype == self.weight.dtype == residual.dtype:
            kernel = fused.choose("add_norm", x.dtype)
            if kernel != "plain":
                return fused.add_rms_norm(kernel, x, residual, self.weight, self.eps)
        total = residual + x
        return total, self(total)


class LayerNorm(nn.LayerNorm):
    """Layer norm over the last axis."""

    def __init__(self, size, eps):
        super().__init__(size, epsilon=eps)


class Rotary(tuple):
    """``(cos, sin)``, the tables of :func:`apply_rope`, and what fused kernels make of them, once for all layers."""

    def prepared(self, dtype):
        """Those of :func:`~paddlemix.kernels.fused.rope_tables`."""
        kept = self.__dict__.setdefault("_prepared", {})
        if dtype not in kept:
            kept[dtype] = fused.rope_tables(*self, dtype)
        return kept[dtype]


def _rope_kernel(x, cos):
    """The fused kernel that rotates ``x`` by tables like ``cos``, or ``"plain"``."""
    suits = cos.shape[0] == 1 and x.shape[-1] % 64 == 0
    return fused.choose("rope", x.dtype) if suits else "plain"


def rotated(qkv, heads, rope, norms=None):
    """Queries and keys with their positions, and values.

    Args:
        qkv: ``[B, N, H + 2 K, D]``, or the three of them, ``[B, N, H, D]``, ``[B, N, K, D]`` and ``[B, N, K, D]``.
        heads: ``[H, K, K]``.
        rope: :class:`Rotary` or ``(cos, sin)``.
        norms: what queries and keys go through first, or None.

    Returns:
        Three tensors ``[B, N, H or K, D]``.
    """
    parts, whole = (qkv, None) if isinstance(qkv, (list, tuple)) else (None, qkv)
    kernel = _rope_kernel(parts[0] if whole is None else whole, rope[0])
    if whole is not None and norms is None and kernel == "plain":  # queries and keys at once
        both, v = whole.split([heads[0] + heads[1], heads[2]], axis=2)
        return *apply_rope(both, *rope).split(heads[:2], axis=2), v
    q, k, v = parts or whole.split(heads, axis=2)
    if norms is not None:
        q, k = (norm(x) for norm, x in zip(norms, (q, k)))
    if kernel == "plain":
        return apply_rope(q, *rope), apply_rope(k, *rope), v
    tables = rope.prepared(q.dtype) if isinstance(rope, Rotary) else fused.rope_tables(*rope, q.dtype)
    return *fused.rope(kernel, q, k, tables), v


def apply_rope(x, cos, sin):
    """Rotate ``x [B, N, H, D]`` by tables ``cos, sin [B or 1, N, 1, D]`` float32, the first half of ``sin`` negated.

    The half-split form of arXiv 2104.09864 that all the language families use. Written with a swap and an addition
    because subtraction has no bfloat16 kernel on Ascend.
    """
    half = x.shape[-1] // 2
    kernel = _rope_kernel(x, cos)
    if kernel != "plain":
        return fused.rope(kernel, x, None, fused.rope_tables(cos, sin, x.dtype))[0]
    swapped = paddle.concat([x[..., half:], x[..., :half]], axis=-1)
    return (x.astype("float32") * cos + swapped.astype("float32") * sin).astype(x.dtype)


def take_rows(x, rows):
    """The entries of ``x [M, ...]`` numbered ``rows [R]``, a list or an array -> ``[R, ...]``.

    By ``embedding``, the one lookup that every backend has natively in every dtype, with its gradient.
    """
    taken = F.embedding(paddle.to_tensor(np.asarray(rows, dtype="int64")), x.reshape([x.shape[0], -1]))
    return taken.reshape([-1, *x.shape[1:]])


class AttentionMask:
    """Which keys a query may see: those up to its own position, from its row's start, within its own segment.

    Args:
        starts: first visible key of each row, ``[B]`` integers, for left-padded batches; None when every row starts at 0.
        segments: ``[B, S]`` integers for packed rows; tokens see only tokens of the same number.
        prefix: so many first positions of every row see each other, and all later ones see them; padding lies behind.
        visible: ``[B, S]``, False for keys that nothing sees but themselves; None for none.
    """

    def __init__(self, starts=None, segments=None, prefix=0, visible=None):
        self.starts = None if starts is None or not np.any(starts) else np.asarray(starts)
        self.segments = None if segments is None else np.asarray(segments)
        self.prefix = prefix
        self.visible = None if visible is None or np.all(visible) else np.asarray(visible).astype(bool)
        self._kept = {}  # the layers of one forward pass share their masks

    @classmethod
    def from_padding(cls, attention_mask):
        """Read ``attention_mask [B, S]`` of ones and zeros with padding on either side, not in the middle.

        Padding on the right needs no mask, because a causal query never looks that way.
        """
        mask = np.asarray(attention_mask).astype(bool)
        starts = np.where(mask.any(1), mask.argmax(1), 0)
        ends = mask.shape[1] - mask[:, ::-1].argmax(1)
        if (np.where(mask.any(1), ends - starts, 0) != mask.sum(1)).any():
            raise ValueError("attention_mask has zeros between ones: pad rows on the left or on the right only")
        return cls(starts)

    @property
    def is_plain_causal(self):
        """Whether nothing but the causal order restricts attention."""
        return self.is_spans and self.sees_all_before

    @property
    def is_spans(self):
        """Whether it is the causal order within runs of positions, which :meth:`spans` and :meth:`first_hidden` can tell."""
        return self.prefix < 2 and self.visible is None

    @property
    def sees_all_before(self):
        """Whether a position sees all earlier ones."""
        return self.starts is None and self.segments is None and self.visible is None

    def is_full(self, keys):
        """Whether all of ``keys`` positions see each other."""
        return keys <= self.prefix and self.sees_all_before

    def _keep(self, form, queries, keys, window, first, make):
        form = form, window
        if self._kept.get(form, (None,))[0] != (queries, keys, first):
            self._kept[form] = (queries, keys, first), paddle.to_tensor(make())
        return self._kept[form][1]

    def _allowed(self, queries, keys, window=None, first=0):
        """Which of ``keys`` positions the last ``queries`` see, ``[B or 1, 1, queries, keys]`` bool."""
        key = np.arange(first, first + keys)
        query = np.arange(first + keys - queries, first + keys)
        allowed = (key[None, :] <= np.maximum(query, self.prefix - 1)[:, None])[None]
        if window is not None:
            allowed = allowed & (key[None, :] > query[:, None] - window)[None]
        # A padding query keeps itself visible: a row of nothing but -inf has no softmax.
        itself = (key[None, :] == query[:, None])[None]
        if self.starts is not None:
            visible = (key >= self.starts[:, None]) | (key < self.prefix)
            allowed = allowed & (visible[:, None] | itself)
        if self.visible is not None:
            allowed = allowed & (self.visible[:, None, first : first + keys] | itself)
        if self.segments is not None:
            same = self.segments[:, None, first : first + keys] == self.segments[:, first + keys - queries : first + keys, None]
            allowed = allowed & same
        return allowed[:, None]

    def bias(self, queries, keys, window=None, first=0):
        """Additive mask ``[B or 1, 1, queries, keys]`` float32 for the last ``queries`` of ``keys`` positions.

        Args:
            queries, keys: how many there are.
            window: how many positions, its own included, a query sees; None for all.
            first: position of the first key, where earlier ones are not there any more.
        """
        lowest = np.finfo(np.float32).min

        def make():
            return np.where(self._allowed(queries, keys, window, first), np.float32(0), lowest)

        return self._keep("bias", queries, keys, window, first, make)

    def hidden(self, queries, keys, window=None, first=0, room=None):
        """The same as ``[B or 1, 1, queries, keys]`` bool, True for what is hidden, filled up with it to ``room`` keys."""
        room = keys if room is None else room

        def make():
            hidden = ~self._allowed(queries, keys, window, first)
            return np.pad(hidden, [(0, 0)] * 3 + [(0, room - keys)], constant_values=True)

        return self._keep(f"hidden {room - keys}", queries, keys, window, first, make)

    def first_hidden(self, keys):
        """For each of ``keys`` positions the first later one that does not see it, ``[B or 1, 1, keys, 1]`` int32.

        Says the same as :meth:`bias` where the queries are all positions, a segment being one run of equal numbers.
        """

        def make():
            ends = np.full([1, keys], keys)
            if self.segments is not None:
                segments = self.segments[:, :keys]
                last = np.pad(segments[:, 1:] != segments[:, :-1], [(0, 0), (0, 1)], constant_values=True)
                ends = np.minimum.accumulate(np.where(last, np.arange(1, keys + 1), keys)[:, ::-1], axis=1)[:, ::-1]
            if self.starts is not None:  # what is before the start is seen by itself alone
                ends = np.where(np.arange(keys) < self.starts[:, None], np.arange(1, keys + 1), ends)
            return ends[:, None, :, None].astype("int32")

        return self._keep("first_hidden", keys, keys, None, 0, make)

    def spans(self, batch, keys):
        """Runs of positions that see each other, ``(row, start, stop)`` each; none for padding on the left.

        Says the same as :meth:`bias` where the queries are all positions, a segment being one run of equal numbers.
        """
        starts = np.zeros(batch, int) if self.starts is None else self.starts
        spans = []
        for row in range(batch):
            segments = np.zeros(keys) if self.segments is None else self.segments[row, :keys]
            cuts = np.flatnonzero(segments[1:] != segments[:-1]) + 1
            edges = [int(starts[row]), *(int(cut) for cut in cuts if cut > starts[row]), keys]
            spans += [(row, *edge) for edge in zip(edges, edges[1:])]
        return spans


def attention(q, k, v, mask=None, window=None, sinks=None, first=0, length=None):
    """Scaled dot-product attention with grouped queries.

    Args:
        q: ``[B, N, H, D]``.
        k, v: ``[B, S, K, D]``, ``H`` a multiple of ``K``; the queries are the last ``N`` of the ``S`` positions.
        mask: an :class:`AttentionMask`, or None for full attention.
        window: how many positions, its own included, a query sees; None for all.
        sinks: ``[H]``, one more logit a head in its softmax that no value belongs to; None for none.
        first: position of the first key, where a sliding layer has forgotten those before.
        length: how many of the ``S`` positions count, the first of them, by default all.

    Returns:
        ``[B, N, H * D]`` in the dtype of ``q``.
    """
    batch, queries, heads, width = q.shape
    keys, given = k.shape[1] if length is None else length, mask
    if window is not None and keys <= window:
        window = None
    if mask is not None and window is None and (mask.is_full(keys) or (queries == 1 and mask.sees_all_before)):
        mask = None  # the last position sees all
    out = None
    if window is None and sinks is None:  # what the kernels know
        kernel = fused.choose("attention", q.dtype)
        if kernel != "plain":
            whole = k.shape[1] > keys and given is not None and fused.takes_whole_caches(q.dtype)
            if k.shape[1] > keys and not whole:
                k, v = k[:, :keys], v[:, :keys]
            out = fused.attention(kernel, q, k, v, given if whole else mask, keys)
        spans = mask is None or mask.is_spans
        if out is None and queries == keys and spans and gemm.suits(math.prod(q.shape) * keys, q, k, v):
            spans = (AttentionMask() if mask is None else mask).spans(batch, keys)
            out = gemm.attention(q, k, v, spans, causal=mask is not None)
    if out is None:
        if k.shape[1] > keys:
            k, v = k[:, :keys], v[:, :keys]
        out = _plain_attention(q, k, v, None if mask is None else mask.bias(queries, keys, window, first), sinks)
    return out.reshape([batch, queries, heads * width])


def _plain_attention(q, k, v, bias, sinks=None):
    """Attention from basic operators, softmax in float32; queries that share a key head go through one product."""
    batch, queries, heads, width = q.shape
    kv_heads = k.shape[2]
    group = heads // kv_heads
    q = (q * width**-0.5).transpose([0, 2, 1, 3])
    q = q if group == 1 else q.reshape([batch, kv_heads, group * queries, width])
    scores = paddle.matmul(q, k.transpose([0, 2, 3, 1])).astype("float32")  # [B, K, group * N, S]
    if bias is not None:
        if group == 1:
            scores = scores + bias
        else:
            scores = (scores.reshape([batch, kv_heads, group, queries, -1]) + bias.unsqueeze(1)).reshape(scores.shape)
    if sinks is not None:
        sink = sinks.astype("float32").reshape([1, kv_heads, group, 1, 1]).expand([batch, -1, -1, queries, -1])
        scores = paddle.concat([scores, sink.reshape([batch, kv_heads, group * queries, 1])], axis=-1)
    weights = F.softmax(scores, axis=-1)
    if sinks is not None:
        weights = weights[..., :-1]
    out = paddle.matmul(weights.astype(v.dtype), v.transpose([0, 2, 1, 3]))
    out = out if group == 1 else out.reshape([batch, heads, queries, width])
    return out.transpose([0, 2, 1, 3])


def count_parameters(layer):
    """Number of parameters of ``layer``."""
    return sum(math.prod(p.shape) for p in layer.parameters())
