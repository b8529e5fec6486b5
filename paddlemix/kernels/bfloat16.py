"""Products of training in bfloat16 on CPU: operands rounded to it, sums in float32, forward and backward.

Weights stay float32 tensors, which are the master weights; what comes out is float32 too. Where the processor has instructions
for bfloat16 the products are oneDNN's, with weights packed once a step; elsewhere operands are rounded and multiplied in
float32, which means the same and takes longer than no rounding.
"""

import paddle

from . import cpu, gemm

__all__ = ["Bfloat16Products"]


class Bfloat16Products(gemm.Products):
    """A context in which linear layers multiply in bfloat16; reusable.

    Args:
        packed: dtype that weights are packed in; None for products of rounded float32 numbers; by default what is fastest here.

    Attributes:
        packed: as above.
    """

    _CHOOSE = object()

    def __init__(self, packed=_CHOOSE):
        if packed is self._CHOOSE:
            packed = "bfloat16" if cpu.has_bfloat16() and cpu.available("bfloat16") else None
        self.packed = packed
        self._packs, self._stale, self._operands, self._before = {}, set(), {}, []

    def __enter__(self):
        self._before.append(gemm.active)
        gemm.active = self
        return self

    def __exit__(self, *_):
        gemm.active = self._before.pop()

    @property
    def note(self):
        """What a user should know, or an empty string."""
        if self.packed == "bfloat16":
            return ""
        return " (this processor multiplies nothing in bfloat16: rounded to it, then in float32, which saves no time)"

    def forget(self):
        """Call when weights have changed: those that learn are packed again, in the same place, when they are next used."""
        learn = {key for key, (weight, _) in self._packs.items() if not weight.stop_gradient}
        for key in self._stale & learn:  # nobody has asked for them since the last time
            del self._packs[key]
        self._stale = learn & self._packs.keys()

    # ------------------------------------------------------------------ the products

    def times(self, x, weight, bias=None, turned=False):
        if self.packed:
            y = self._pack(weight, turned)(self._operand(x))
        else:
            x, weight = rounded(x), rounded(weight)
            if _suits(x, weight.shape[0 if turned else 1], weight):
                y = gemm.plain(x, weight, turned=turned)
            else:
                y = paddle.matmul(x, weight, transpose_y=turned)
        return y if bias is None else y + bias

    def outer(self, x, y):
        if self.packed:
            packed = self._packed_operand(self._operand(y))
            return packed(self._operand(x).transpose([1, 0]).contiguous())
        x, y = rounded(x), rounded(y)
        return gemm.outer(x, y) if _suits(x, y.shape[1], y) else paddle.matmul(x, y, transpose_x=True)

    def kept(self, x):
        return x.astype("bfloat16")  # in half the memory: it is rounded to it anyway

    def _operand(self, x):
        # The kernels round by themselves.
        return x.astype("float32").contiguous() if self.packed == "bfloat16" else rounded(x).contiguous()

    def _pack(self, weight, turned):
        key = id(weight), turned
        if key not in self._packs:
            packed = cpu.PackedLinear(self._operand(weight.detach()), None, self.packed, transposed=turned)
            self._packs[key] = weight, packed  # the weight too, so that no other gets its number
        elif key in self._stale:
            self._packs[key][1].fill(self._operand(weight.detach()), transposed=turned)
        self._stale.discard(key)
        return self._packs[key][1]

    def _packed_operand(self, y):
        # In the place of the last of that shape: new memory takes longer than packing.
        key = tuple(y.shape)
        if key in self._operands:
            self._operands[key].fill(y)
        else:
            if len(self._operands) >= 16:  # batches of ever new lengths
                self._operands.clear()
            self._operands[key] = cpu.PackedLinear(y, None, self.packed)
        return self._operands[key]


def rounded(x):
    """``x`` float32 or bfloat16, each number the nearest of bfloat16, in float32."""
    return x.astype("bfloat16").astype("float32")


def _suits(x, columns, other):
    return gemm.suits(x.size * columns, x, other)
