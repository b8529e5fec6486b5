"""Attention pooling: many tokens to one vector of the space that pictures and texts share."""

import paddle
from paddle import nn

from paddlemix.models.blocks.layers import LayerNorm, Linear, attention


class PoolingAttention(nn.Layer):
    """Multi-head attention of few queries; biases are parameters beside the weights, as in the published files."""

    def __init__(self, width, size_out, heads):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (Linear(width, width, bias=False) for _ in range(3))
        self.q_bias, self.k_bias, self.v_bias = (self.create_parameter([width], is_bias=True) for _ in range(3))
        self.proj = Linear(width, size_out)

    def forward(self, q, k, v):
        """``q [B, N, D]``, ``k, v [B, S, D]`` -> ``[B, N, size_out]``."""
        split = [0, 0, self.heads, q.shape[-1] // self.heads]
        q = (self.q(q) + self.q_bias).reshape(split)
        k = (self.k(k) + self.k_bias).reshape(split)
        v = (self.v(v) + self.v_bias).reshape(split)
        return self.proj(attention(q, k, v))


class AttentionPooling(nn.Layer):
    """The mean of all tokens asks, all tokens answer (arXiv 2312.14238, section 3.2)."""

    def __init__(self, width, size_out, heads):
        super().__init__()
        self.norm1_q, self.norm1_k, self.norm1_v = (LayerNorm(width, 1e-5) for _ in range(3))
        self.cross_attn = PoolingAttention(width, size_out, heads)

    def forward(self, x):
        """``[B, N, D] -> [B, size_out]``."""
        mean = paddle.mean(x, axis=1, keepdim=True)
        return self.cross_attn(self.norm1_q(mean), self.norm1_k(x), self.norm1_v(x)).squeeze(1)
