"""The building blocks that vision and language share: linear, norms, rotary positions, attention.

Each function picks the kernel for the device and dtype at hand, so that a model's ``forward`` reads the same everywhere.
Tensor shapes in comments: B batch, N queries, S keys, H query heads, K key/value heads, D head width.
"""

import numpy as np
import paddle
from paddle import nn
from paddle.nn import functional as F
from paddle.nn.functional import swiglu

from paddlemix import device

__all__ = ["AttentionMask", "LayerNorm", "Linear", "RMSNorm", "apply_rope", "attention", "swiglu"]


class Linear(nn.Linear):
    """``residual + scale * activation(x @ weight + bias)``: what follows the product is part of the call, in one place.

    ``weight`` is ``[in, out]`` as everywhere in Paddle.
    """

    def __init__(self, in_features, out_features, bias=True):
        super().__init__(in_features, out_features, bias_attr=None if bias else False)

    def forward(self, x, gelu=False, scale=None, residual=None):
        """``x [..., in] -> [..., out]``; ``scale [out]`` and ``residual [..., out]`` are optional."""
        y = F.linear(x, self.weight, self.bias)
        if gelu:
            y = F.gelu(y)
        if scale is not None:
            y = y * scale
        return y if residual is None else residual + y


class RMSNorm(nn.Layer):
    """Root-mean-square norm over the last axis, computed in float32 (arXiv 1910.07467)."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight = self.create_parameter([size], default_initializer=nn.initializer.Constant(1.0))
        self.eps = eps

    def forward(self, x):
        # Composed from operators that every backend has: F.rms_norm has no CPU kernel and is export-only on NPU.
        y = x.astype("float32")
        y = y * paddle.rsqrt(paddle.mean(paddle.square(y), axis=-1, keepdim=True) + self.eps)
        return y.astype(x.dtype) * self.weight


class LayerNorm(nn.LayerNorm):
    """Layer norm over the last axis."""

    def __init__(self, size, eps):
        super().__init__(size, epsilon=eps)


def apply_rope(x, cos, sin):
    """Rotate ``x [B, N, H, D]`` by tables ``cos, sin [B or 1, N, 1, D]`` float32, the first half of ``sin`` negated.

    The half-split form of arXiv 2104.09864 that all the language families use. Written with a swap and an addition
    because subtraction has no bfloat16 kernel on Ascend.
    """
    half = x.shape[-1] // 2
    swapped = paddle.concat([x[..., half:], x[..., :half]], axis=-1)
    return (x.astype("float32") * cos + swapped.astype("float32") * sin).astype(x.dtype)


class AttentionMask:
    """Which keys a query may see: those up to its own position, from its row's start, within its own segment.

    Args:
        starts: first visible key of each row, ``[B]`` integers, for left-padded batches; None when every row starts at 0.
        segments: ``[B, S]`` integers for packed rows; tokens see only tokens of the same number.
    """

    def __init__(self, starts=None, segments=None):
        self.starts = None if starts is None or not np.any(starts) else np.asarray(starts)
        self.segments = None if segments is None else np.asarray(segments)
        self._bias = {}

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
        return self.starts is None and self.segments is None

    def bias(self, queries, keys):
        """Additive mask ``[B or 1, 1, queries, keys]`` float32 for the last ``queries`` of ``keys`` positions."""
        if (queries, keys) not in self._bias:
            key = np.arange(keys)
            query = np.arange(keys - queries, keys)
            allowed = (key[None, :] <= query[:, None])[None]
            if self.starts is not None:
                # A padding query keeps itself visible: a row of nothing but -inf has no softmax.
                visible = key[None, None, :] >= self.starts[:, None, None]
                allowed = allowed & (visible | (key[None, :] == query[:, None])[None])
            if self.segments is not None:
                allowed = allowed & (self.segments[:, None, :keys] == self.segments[:, keys - queries : keys, None])
            bias = np.where(allowed, np.float32(0), np.finfo(np.float32).min)[:, None]
            self._bias = {(queries, keys): paddle.to_tensor(bias)}  # the layers of one forward pass share it
        return self._bias[queries, keys]


def attention(q, k, v, mask=None):
    """Scaled dot-product attention with grouped queries.

    Args:
        q: ``[B, N, H, D]``.
        k, v: ``[B, S, K, D]``, ``H`` a multiple of ``K``; the queries are the last ``N`` of the ``S`` positions.
        mask: an :class:`AttentionMask`, or None for full attention.

    Returns:
        ``[B, N, H * D]`` in the dtype of ``q``.
    """
    batch, queries, heads, width = q.shape
    keys = k.shape[1]
    causal = mask is not None and queries > 1
    explicit = mask is not None and not (mask.is_plain_causal and queries in (1, keys))
    if device.attention_kernel(q.dtype, explicit) == "flash":
        out, _ = F.flash_attention.flash_attention(q, k, v, causal=causal)
    else:
        bias = mask.bias(queries, keys) if explicit or causal else None
        out = _plain_attention(q, k, v, bias)
    return out.reshape([batch, queries, heads * width])


def _plain_attention(q, k, v, bias):
    """Attention from basic operators, softmax in float32; queries that share a key head go through one product."""
    batch, queries, heads, width = q.shape
    kv_heads = k.shape[2]
    group = heads // kv_heads
    q = (q * width**-0.5).transpose([0, 2, 1, 3]).reshape([batch, kv_heads, group * queries, width])
    scores = paddle.matmul(q, k.transpose([0, 2, 3, 1])).astype("float32")  # [B, K, group * N, S]
    if bias is not None:
        scores = (scores.reshape([batch, kv_heads, group, queries, -1]) + bias.unsqueeze(1)).reshape(scores.shape)
    out = paddle.matmul(F.softmax(scores, axis=-1).astype(v.dtype), v.transpose([0, 2, 1, 3]))
    return out.reshape([batch, heads, queries, width]).transpose([0, 2, 1, 3])
