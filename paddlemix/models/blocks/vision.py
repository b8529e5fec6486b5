"""InternViT, the vision tower, in both flavours (arXiv 2312.14238, 2404.16821).

300M: LayerNorm and a bias on qkv. 6B: RMSNorm, no bias on qkv, and RMSNorm of queries and keys over the whole width.
There is no final norm. ``T`` tiles, ``P`` patches of a tile, ``D`` width in the shapes below.
"""

import functools
import math

import numpy as np
import paddle
from paddle import nn

from paddlemix.errors import PromptError

from .inputs import as_tiles
from .layers import LayerNorm, Linear, RMSNorm, attention


@functools.cache
def bicubic_weights(size, new_size):
    """Matrix ``[new_size, size]`` float32 of bicubic interpolation along one axis.

    Keys' kernel with a = -0.75, pixel centres aligned and borders repeated, as ``interpolate`` of torch and Paddle have it
    (Keys, 1981, doi 10.1109/TASSP.1981.1163711).
    """
    a = -0.75
    centre = (np.arange(new_size) + 0.5) * size / new_size - 0.5
    weights = np.zeros([new_size, size], "float32")
    for offset in (-1, 0, 1, 2):
        tap = np.floor(centre).astype("int64") + offset
        t = np.abs(centre - tap)
        near = ((a + 2) * t - (a + 3)) * t * t + 1
        far = ((t - 5) * t + 8) * t * a - 4 * a
        np.add.at(weights, (np.arange(new_size), tap.clip(0, size - 1)), np.where(t <= 1, near, far))
    return weights


class PatchEmbedding(nn.Conv2D):
    """One vector for each patch of ``patch`` by ``patch`` pixels."""

    def __init__(self, channels, width, patch):
        super().__init__(channels, width, patch, stride=patch)

    def forward(self, pixel_values):
        """``[T, 3, height, width] -> [T, rows, columns, D]``."""
        return super().forward(pixel_values.astype(self.weight.dtype)).transpose([0, 2, 3, 1])


class VisionEmbeddings(nn.Layer):
    """Patches, a class token and learned positions."""

    def __init__(self, config):
        super().__init__()
        normal = nn.initializer.Normal(std=1.0)  # as the original's: patches begin at about that size
        width, patch = config.hidden_size, config.patch_size
        self.config = config
        self.native_grid = (config.image_size // patch,) * 2
        self.patch_embedding = PatchEmbedding(config.num_channels, width, patch)
        self.class_embedding = self.create_parameter([1, 1, width], default_initializer=normal)
        self.position_embedding = self.create_parameter([1, 1 + math.prod(self.native_grid), width], default_initializer=normal)

    def positions(self, grid):
        """Position embeddings ``[1, 1 + P, D]`` for a grid of patches, interpolated only where it is not the native one."""
        table = self.position_embedding
        if grid == self.native_grid:
            return table
        # As products with two small matrices, which every device has with their gradient; NPU lacks the interpolation.
        rows, columns = (paddle.to_tensor(bicubic_weights(*sizes)) for sizes in zip(self.native_grid, grid))
        native = table[:, 1:].astype("float32").reshape([self.native_grid[0], -1])  # [rows, columns * D]
        resized = paddle.matmul(rows, native).reshape([grid[0], self.native_grid[1], -1])
        resized = paddle.matmul(columns, resized).reshape([1, math.prod(grid), -1]).astype(table.dtype)
        return paddle.concat([table[:, :1], resized], axis=1)

    def forward(self, pixel_values):
        """``[T, 3, height, width] -> [T, 1 + P, D]``."""
        pixel_values, patch = as_tiles(pixel_values), self.config.patch_size
        if pixel_values.shape[2] % patch or pixel_values.shape[3] % patch:
            raise PromptError(
                f"pixel_values are {pixel_values.shape[3]}x{pixel_values.shape[2]} pixels: sides must be multiples of {patch}"
            )
        patches = self.patch_embedding(pixel_values)
        tiles, rows, columns, width = patches.shape
        tokens = patches.reshape([tiles, rows * columns, width])
        tokens = paddle.concat([self.class_embedding.expand([tiles, -1, -1]), tokens], axis=1)
        return tokens + self.positions((rows, columns))


class VisionAttention(nn.Layer):
    """Multi-head attention over all patches of a tile; ``heads`` is how many of them are here, by default all."""

    def __init__(self, config, heads=None):
        super().__init__()
        self.heads = config.num_attention_heads if heads is None else heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        width = self.heads * self.head_dim
        self.qkv = Linear(config.hidden_size, 3 * width, bias=config.qkv_bias)
        self.proj = Linear(width, config.hidden_size)
        self.qk_normalization = config.qk_normalization
        if config.qk_normalization:
            self.q_norm = RMSNorm(width, config.layer_norm_eps)
            self.k_norm = RMSNorm(width, config.layer_norm_eps)

    def normalised(self, q, k):
        """Queries and keys ``[T, 1 + P, D]``, each normalised over the whole width, before the heads are split."""
        return self.q_norm(q), self.k_norm(k)

    def forward(self, x, scale, residual):
        """``residual + scale * attention(x)``, all ``[T, 1 + P, D]``."""
        tiles, tokens, _ = x.shape
        qkv = self.qkv(x)
        if self.qk_normalization:
            q, k, v = qkv.split(3, axis=-1)
            qkv = paddle.concat([*self.normalised(q, k), v], axis=-1)
        q, k, v = qkv.reshape([tiles, tokens, 3 * self.heads, self.head_dim]).split(3, axis=2)
        return self.proj(attention(q, k, v), scale=scale, residual=residual)


class VisionMLP(nn.Layer):
    """Two linear layers with GELU between; ``width`` is how much of the inner width is here, by default all."""

    def __init__(self, config, width=None):
        super().__init__()
        width = width or config.intermediate_size
        self.fc1 = Linear(config.hidden_size, width)
        self.fc2 = Linear(width, config.hidden_size)

    def forward(self, x, scale, residual):
        """``residual + scale * mlp(x)``, all ``[T, 1 + P, D]``."""
        return self.fc2(self.fc1(x, gelu=True), scale=scale, residual=residual)


class VisionLayer(nn.Layer):
    """Pre-norm block with layer scale and, in training, stochastic depth (arXiv 1603.09382)."""

    def __init__(self, config, drop_path):
        super().__init__()
        norm = {"rms_norm": RMSNorm, "layer_norm": LayerNorm}[config.norm_type]
        factor = nn.initializer.Constant(config.initializer_factor)
        self.norm1 = norm(config.hidden_size, config.layer_norm_eps)
        self.attn = VisionAttention(config)
        self.ls1 = self.create_parameter([config.hidden_size], default_initializer=factor)
        self.norm2 = norm(config.hidden_size, config.layer_norm_eps)
        self.mlp = VisionMLP(config)
        self.ls2 = self.create_parameter([config.hidden_size], default_initializer=factor)
        self.drop_path = drop_path

    def _branch_scale(self, scale, tiles):
        """Layer scale, with the branch switched off for a random part of the tiles in training."""
        if not self.training or self.drop_path == 0:
            return scale
        keep = 1 - self.drop_path
        kept = (paddle.rand([tiles, 1, 1]) < keep).astype("float32") * (1 / keep)
        return scale * kept.astype(scale.dtype)

    def forward(self, x):
        """``[T, 1 + P, D] -> [T, 1 + P, D]``."""
        x = self.attn(self.norm1(x), self._branch_scale(self.ls1, x.shape[0]), x)
        return self.mlp(self.norm2(x), self._branch_scale(self.ls2, x.shape[0]), x)


class VisionEncoder(nn.Layer):
    """The stack of blocks."""

    def __init__(self, config):
        super().__init__()
        depth = config.num_hidden_layers
        rates = [config.drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]
        self.layers = nn.LayerList([VisionLayer(config, rate) for rate in rates])
        self.enable_recompute = False
        self.fused = None  # a list of the engine's blocks where a tower that does not learn has them beside its own

    def forward(self, x, depth):
        """Run the first ``depth`` blocks on ``x [T, 1 + P, D]``."""
        if self.fused is not None:
            tiles = []
            for tile in x.split(x.shape[0]):  # one's activations stay in the cache
                for layer in self.fused[:depth]:
                    tile = layer(tile)
                tiles.append(tile)
            return paddle.concat(tiles)
        for layer in self.layers[:depth]:
            if self.enable_recompute and self.training:
                # Non-reentrant: the input of the first block needs no gradient, which the reentrant form would take
                # to mean that its weights need none either.
                x = paddle.distributed.fleet.utils.recompute(layer, x, use_reentrant=False)
            else:
                x = layer(x)
        return x


class InternVisionModel(nn.Layer):
    """Vision tower: pixels to one vector a patch."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embeddings = VisionEmbeddings(config)
        self.encoder = VisionEncoder(config)

    def forward(self, pixel_values, select_layer=-1):
        """Features of the class token and of every patch.

        Args:
            pixel_values: ``[T, 3, height, width]``, normalised; sides are multiples of the patch size.
            select_layer: which hidden state: 0 is the embedding, ``num_hidden_layers`` or -1 the last block's output.
                Blocks after it are not run.

        Returns:
            ``[T, 1 + P, D]``.
        """
        return self.encoder(self.embeddings(pixel_values), self._depth(select_layer))

    def _depth(self, select_layer):
        return select_layer if select_layer >= 0 else len(self.encoder.layers) + 1 + select_layer

    def steps(self, pixel_values, select_layer=-1):
        """:meth:`forward` without gradients, block by block: yields the hidden state after each, of which the last counts."""
        x = self.embeddings(pixel_values)
        yield x
        for layer in self.encoder.layers[: self._depth(select_layer)]:
            x = layer(x)
            yield x
