"""From the vision tower to the language model: fewer, wider positions, then two linear layers."""

from paddle import nn

from .layers import LayerNorm, Linear


class Projector(nn.Sequential):
    """LayerNorm, linear, GELU, linear: from ``4 * D_vision`` to the language model's width.

    The members are numbered as in published checkpoints, where 2 is the activation.
    """

    def __init__(self, size_in, size_out):
        super().__init__()
        self.add_sublayer("0", LayerNorm(size_in, 1e-5))
        self.add_sublayer("1", Linear(size_in, size_out))
        self.add_sublayer("3", Linear(size_out, size_out))

    def forward(self, x):
        """``[..., 4 * D_vision] -> [..., D]``."""
        return self["3"](self["1"](self["0"](x), gelu=True))


class MLPProjector(nn.Sequential):
    """Linear layers with GELU between, perhaps behind a LayerNorm: one of LLaVA's (arXiv 2310.03744).

    Args:
        size_in, size_out: width of the vision tower and of the language model.
        layers: ``(number in published checkpoints, whether it is a norm)`` of each member, in order; none for the identity.
    """

    def __init__(self, size_in, size_out, layers):
        super().__init__()
        for number, is_norm in layers:
            self.add_sublayer(str(number or 0), LayerNorm(size_in, 1e-5) if is_norm else Linear(size_in, size_out))
            size_in = size_in if is_norm else size_out

    def forward(self, x):
        """``[..., D_vision] -> [..., D]``."""
        parts = list(self)
        for i, part in enumerate(parts):
            x = part(x) if isinstance(part, LayerNorm) or i == len(parts) - 1 else part(x, gelu=True)
        return x


def pixel_shuffle(x, factor, version="v2"):
    """Trade resolution for depth: ``[T, rows, columns, D] -> [T, rows * factor, columns * factor, D / factor**2]``.

    Version v1 leaves rows and columns of the result swapped, and the oldest checkpoints were trained that way.
    """
    tiles, rows, columns, width = x.shape
    x = x.reshape([tiles, rows, int(columns * factor), int(width / factor)])
    x = x.transpose([0, 2, 1, 3])
    x = x.reshape([tiles, int(columns * factor), int(rows * factor), int(width / factor**2)])
    return x if version == "v1" else x.transpose([0, 2, 1, 3])
