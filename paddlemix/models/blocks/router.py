"""The visual resolution router of InternVL3.5-Flash (arXiv 2508.18265, section 2.3): tiles that need few tokens get few.

``T`` tiles, ``P`` patches of a tile, ``D`` the vision tower's width in the shapes below. Layers are named and numbered as in
published checkpoints.
"""

from dataclasses import dataclass

import numpy as np
import paddle
from paddle import nn
from paddle.nn import functional as F

from .layers import LayerNorm, Linear, attention


class CompactProjector(nn.Sequential):
    """From 16 patches side by side to one token: LayerNorm and three linear layers with GELU between."""

    def __init__(self, size_in, size_out):
        super().__init__()
        self.add_sublayer("0", LayerNorm(size_in, 1e-5))
        self.add_sublayer("1", Linear(size_in, 2 * size_out))
        self.add_sublayer("4", Linear(2 * size_out, 2 * size_out))
        self.add_sublayer("7", Linear(2 * size_out, size_out))

    def forward(self, x):
        """``[..., 16 D] -> [..., width of the language model]``."""
        return self["7"](self["4"](self["1"](self["0"](x), gelu=True), gelu=True))


class QueryAttention(nn.Layer):
    """Multi-head attention of one query to all patches."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.in_proj = Linear(width, 3 * width)
        self.out_proj = Linear(width, width)

    def forward(self, query, x):
        """``query [T, 1, D]``, ``x [T, P, D]`` -> ``[T, 1, D]``."""
        width = x.shape[-1]
        weight, bias = self.in_proj.weight, self.in_proj.bias
        parts = [(weight[:, i * width : (i + 1) * width], bias[i * width : (i + 1) * width]) for i in range(3)]
        q, k, v = (F.linear(y, *part) for y, part in zip((query, x, x), parts))
        split = [0, 0, self.heads, width // self.heads]
        return self.out_proj(attention(q.reshape(split), k.reshape(split), v.reshape(split)))


class Pooling(nn.Layer):
    """A learned query looks at a tile's patches four times.

    ``attn3``, ``attn4``, ``norm3`` and ``norm4`` are in published checkpoints, and the original never uses them.
    """

    HEADS = 16

    def __init__(self, width):
        super().__init__()
        self.query_token = self.create_parameter([1, width], default_initializer=nn.initializer.Normal(std=0.02))
        for i in range(1, 5):
            self.add_sublayer(f"attn{i}", QueryAttention(width, self.HEADS))
            self.add_sublayer(f"norm{i}", LayerNorm(width, 1e-5))

    def forward(self, x):
        """``[T, P, D] -> [T, D]``."""
        pooled = self.query_token.unsqueeze(0).expand([x.shape[0], -1, -1])
        pooled = self.norm1(self.attn1(pooled, x))
        for _ in range(3):
            pooled = self.norm2(self.attn2(pooled, x))
        return pooled.squeeze(1)


class Gate(nn.Layer):
    """Four residual blocks and two logits: is the coarse form of a tile enough?"""

    def __init__(self, width):
        super().__init__()
        for i in range(1, 5):
            block = nn.Sequential()
            for name, layer in (
                ("0", Linear(width, 4 * width)),
                ("3", Linear(4 * width, width)),
                ("5", LayerNorm(width, 1e-5)),
            ):
                block.add_sublayer(name, layer)
            self.add_sublayer(f"block{i}", block)
        self.gate = nn.Sequential(LayerNorm(width, 1e-5), Linear(width, 2))

    def forward(self, x):
        """``[T, D]`` -> probability of the coarse form, ``[T]`` float32."""
        for block in (self.block1, self.block2, self.block3, self.block4):
            x = x + block["5"](block["3"](block["0"](x, gelu=True)))
        return F.softmax(self.gate(x).astype("float32"), axis=-1)[:, 0]


def compact_tiles(gates, relative, absolute):
    """Which tiles of one prompt take the coarse form: those above the quantile ``relative`` of all, and above ``absolute``.

    Args:
        gates: ``[T]`` float32 array.
        relative, absolute: thresholds of the configuration.

    Returns:
        ``[T]`` bool array. One tile alone is never above its own quantile.
    """
    gates = np.asarray(gates, "float32")
    if not len(gates):
        return np.zeros(0, bool)
    rank = np.float32(relative) * np.float32(len(gates) - 1)
    ordered = np.sort(gates)
    low = int(np.floor(rank))
    high = min(low + 1, len(gates) - 1)
    threshold = ordered[low] + (ordered[high] - ordered[low]) * np.float32(rank - low)
    return (gates > threshold) & (gates >= np.float32(absolute))


@dataclass
class RoutedTiles:
    """Tiles of a picture in both forms, until all pictures of a prompt are known.

    Attributes:
        fine, coarse: ``[T, tokens, D]`` each.
        gates: ``[T]`` float32 array.
    """

    fine: paddle.Tensor
    coarse: paddle.Tensor
    gates: np.ndarray

    @classmethod
    def joined(cls, parts):
        """The tiles of several :class:`RoutedTiles` in a row."""
        fine, coarse = (paddle.concat([getattr(part, name) for part in parts]) for name in ("fine", "coarse"))
        return cls(fine, coarse, np.concatenate([part.gates for part in parts]))

    @property
    def nbytes(self):
        """Memory of both forms, in bytes."""
        return sum(form.size * form.element_size() for form in (self.fine, self.coarse))

    def split(self, counts):
        """One :class:`RoutedTiles` for each picture of ``counts`` tiles."""
        ends = np.cumsum([0, *counts])
        return [RoutedTiles(self.fine[a:b], self.coarse[a:b], self.gates[a:b]) for a, b in zip(ends, ends[1:])]

    def features(self, compact):
        """``[number of tokens, D]`` of all tiles in a row, coarse where ``compact`` says so."""
        parts = [self.coarse[i] if small else self.fine[i] for i, small in enumerate(compact)]
        return paddle.concat(parts)


def decide(pictures, relative, absolute):
    """Which tiles of each of a prompt's ``pictures``, a list of :class:`RoutedTiles`, are compact: a list of bool arrays."""
    if not pictures:
        return []
    compact = compact_tiles(np.concatenate([picture.gates for picture in pictures]), relative, absolute)
    return np.split(compact, np.cumsum([len(picture.gates) for picture in pictures])[:-1])


def kept_tokens(compact, per_tile, coarse):
    """Which context tokens of tiles stay in a prompt: all ``per_tile``, or the first ``coarse`` of one that is ``compact``.

    Returns:
        ``[number of tiles * per_tile]`` bool array.
    """
    place = np.arange(len(compact) * per_tile) % per_tile
    return ~np.repeat(compact, per_tile) | (place < coarse)
