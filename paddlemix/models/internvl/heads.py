"""What learns on top of a vision tower: probes for classification, heads for segmentation (arXiv 2312.14238, section 4)."""

import contextlib

import paddle
from paddle import nn
from paddle.nn import functional as F

from .pooling import AttentionPooling


def probe_features(output):
    """``[class token, mean of patches]``, ``[B, 2 * D]``, of a tower's output."""
    tokens = output.last_hidden_state
    return paddle.concat([tokens[:, 0], tokens[:, 1:].mean(1)], axis=-1)


class LinearProbe(nn.Layer):
    """Batch norm and a linear layer over :func:`probe_features`."""

    def __init__(self, width, classes):
        super().__init__()
        self.norm = nn.BatchNorm1D(width, epsilon=1e-6, weight_attr=False, bias_attr=False)
        self.head = _classifier(width, classes)

    def forward(self, x):
        """``[B, 2 * D] -> [B, classes]``."""
        return self.head(self.norm(x))


class AttentionProbe(nn.Layer):
    """Attention pooling over all tokens, batch norm and a linear layer."""

    def __init__(self, width, classes, heads=4):
        super().__init__()
        self.pool = AttentionPooling(width, width, heads)
        self.norm = nn.BatchNorm1D(width, epsilon=1e-6, weight_attr=False, bias_attr=False)
        self.head = _classifier(width, classes)

    def forward(self, x):
        """``[B, 1 + P, D] -> [B, classes]``."""
        return self.head(self.norm(self.pool(x)))


def _classifier(width, classes):
    normal = paddle.ParamAttr(initializer=nn.initializer.Normal(std=0.01))
    return nn.Linear(width, classes, weight_attr=normal)


def patch_map(tokens, pixels, patch):
    """Tokens ``[B, 1 + P, D]`` without the class token as a map ``[B, D, rows, columns]``."""
    rows, columns = (side // patch for side in pixels.shape[2:])
    return tokens[:, 1:].transpose([0, 2, 1]).reshape([tokens.shape[0], -1, rows, columns])


def _resize(x, size):
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def _block(size_in, size_out, kernel=1):
    return nn.Sequential(
        nn.Conv2D(size_in, size_out, kernel, padding=kernel // 2, bias_attr=False), nn.BatchNorm2D(size_out), nn.ReLU()
    )


class LinearHead(nn.Layer):
    """Batch norm and a 1x1 convolution over one map."""

    def __init__(self, width, classes):
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2D(width), nn.Conv2D(width, classes, 1)

    def forward(self, maps):
        """A list of one map ``[B, D, rows, columns]`` -> scores of the same rows and columns, and None."""
        return self.conv(self.norm(maps[-1])), None


class UperNetHead(nn.Layer):
    """UperNet (arXiv 1807.10221) on four maps, scaled by 4, 2, 1 and 1/2, with an auxiliary FCN on one of them."""

    def __init__(self, width, classes, channels=1536, auxiliary=1):
        super().__init__()
        self.auxiliary = auxiliary
        self.up4 = nn.Sequential(
            nn.Conv2DTranspose(width, width, 2, 2), nn.BatchNorm2D(width), nn.GELU(), nn.Conv2DTranspose(width, width, 2, 2)
        )
        self.up2, self.down2 = nn.Conv2DTranspose(width, width, 2, 2), nn.MaxPool2D(2)
        self.pools = nn.LayerList([_block(width, channels) for _ in (1, 2, 3, 6)])
        self.bottom = _block(width + 4 * channels, channels, 3)
        self.lateral = nn.LayerList([_block(width, channels) for _ in range(3)])
        self.smooth = nn.LayerList([_block(channels, channels, 3) for _ in range(3)])
        self.fuse, self.conv = _block(4 * channels, channels, 3), nn.Conv2D(channels, classes, 1)
        self.fcn = nn.Sequential(_block(width, max(channels // 6, 1), 3), nn.Conv2D(max(channels // 6, 1), classes, 1))

    def forward(self, maps):
        """Four maps of one size -> scores at four times that size, and those of the auxiliary head."""
        extra = self.fcn(maps[self.auxiliary])
        maps = [self.up4(maps[0]), self.up2(maps[1]), maps[2], self.down2(maps[3])]
        size = maps[3].shape[2:]
        pooled = [_resize(block(F.adaptive_avg_pool2d(maps[3], n)), size) for block, n in zip(self.pools, (1, 2, 3, 6))]
        levels = [lateral(x) for lateral, x in zip(self.lateral, maps)] + [self.bottom(paddle.concat([maps[3], *pooled], 1))]
        for i in (2, 1, 0):
            levels[i] = levels[i] + _resize(levels[i + 1], levels[i].shape[2:])
        levels = [smooth(x) for smooth, x in zip(self.smooth, levels)] + levels[3:]
        size = levels[0].shape[2:]
        return self.conv(self.fuse(paddle.concat([_resize(x, size) for x in levels], 1))), extra


class SegmentationModel(nn.Layer):
    """A tower and a head.

    Args:
        tower: :class:`~.tower.InternVisionModel`.
        head: ``linear`` or ``upernet``.
        classes: kinds of things.
        blocks: numbers of the blocks, from 0, whose outputs the head sees; the published ones in proportion by default.
        full: whether the tower learns too.
        channels: of UperNet.
    """

    def __init__(self, tower, head, classes, blocks=None, full=False, channels=1536):
        super().__init__()
        depth, width = tower.config.num_hidden_layers, tower.config.hidden_size
        # Of 48 blocks: 44 for a linear head; 11, 23, 35 and 47 for UperNet.
        shares = (45,) if head == "linear" else (12, 24, 36, 48)
        self.blocks = list(blocks or [max(0, round(share * depth / 48) - 1) for share in shares])
        self.tower, self.full = tower, full
        self.head = LinearHead(width, classes) if head == "linear" else UperNetHead(width, classes, channels)
        for parameter in tower.parameters():
            parameter.stop_gradient = not full

    def forward(self, pixels):
        """``[B, 3, height, width]`` -> scores ``[B, classes, height, width]``, and the auxiliary ones or None."""
        with contextlib.nullcontext() if self.full else paddle.no_grad():
            states = self.tower(pixels, output_hidden_states=True).hidden_states
        maps = [patch_map(states[block + 1], pixels, self.tower.config.patch_size) for block in self.blocks]
        scores, extra = self.head(maps)
        return _resize(scores, pixels.shape[2:]), None if extra is None else _resize(extra, pixels.shape[2:])
