"""Products with weights in few bits on GPUs and Ascend, whose own operators turn them into floating point as they are read.

On GPU the layout of the codes is the operator's own business, so they are made by ``weight_quantize`` on the device: symmetric,
a scale for each 64 inputs of an output. It rounds to the largest number of a group; in 4 bits values are cut off first where
that makes the group's squared error smaller, which gives the operator our codes and scale. Ascend's takes codes as they are, in
8 bits, with a scale for each output: they are rounded here.
"""

import numpy as np
import paddle

from paddlemix import device

from . import fused

__all__ = ["DeviceWeight"]

GROUP = 64
_SHRINK = (1.0, 0.9, 0.8, 0.7)  # of a group's range, as the largest that 4 bits say


class DeviceWeight:
    """A weight ``[out, in]`` as the operator of the device in use takes it; make it by :meth:`of`."""

    def __init__(self, kernel, codes, scales, bits, outputs, dtype):
        self.kernel, self.codes, self.scales, self.bits, self.outputs, self.dtype = kernel, codes, scales, bits, outputs, dtype

    @property
    def nbytes(self):
        """Memory on the device."""
        return sum(x.size * x.element_size() for x in (self.codes, self.scales))

    @classmethod
    def of(cls, values, bits, dtype):
        """``values [out, in]`` float32, an array, for activations in ``dtype``.

        In 8 bits where the device's operator has no 4; :meth:`bits_for` tells, and whether it has any.
        """
        bits = cls.bits_for(bits, values.shape[1], dtype)
        kernel = fused.choose(f"int{bits}", dtype)
        make = {"weight_only_linear": _for_gpu, "weight_only_linear_npu": _for_npu}[kernel]
        return cls(kernel, *make(values, bits, dtype), bits, len(values), dtype)

    @staticmethod
    def bits_for(bits, inputs, dtype):
        """In how many bits the device in use computes with weights of ``bits`` and so many inputs; None for plain operators."""
        if device.is_cpu() or inputs % GROUP:
            return None
        return next((b for b in (bits, 8) if fused.choose(f"int{b}", dtype) != "plain"), None)

    def product(self, x, bias=None):
        """``x [..., in] @ weight^T + bias`` in the dtype of ``x``."""
        y = x.astype(self.dtype)
        bias = None if bias is None else bias.astype(self.dtype)
        filled = self.kernel == "weight_only_linear" and self.outputs % GROUP
        y = fused.weight_only(self.kernel, y, self.codes, self.scales, self.bits, GROUP, None if filled else bias)
        if filled:
            y = y[..., : self.outputs]
            y = y if bias is None else y + bias
        return y.astype(x.dtype)


def _for_gpu(values, bits, dtype):
    """Codes and scales by the device's own operator; outputs are filled up to a multiple of 64, which its tiles need."""
    missing = -len(values) % GROUP
    values = np.pad(values, [(0, missing), (0, 0)], mode="edge") if missing else values
    weight = paddle.to_tensor(np.ascontiguousarray(values.T))
    weight = (_cut(weight) if bits == 4 else weight).astype(dtype)
    return fused.weight_quantize(weight, bits, GROUP)


def _cut(weight):
    """``weight [in, out]`` float32, the values of each group within what is best for codes from -7 to 7."""
    groups = weight.reshape([-1, GROUP, weight.shape[1]])
    top = groups.abs().max(axis=1, keepdim=True)
    top = paddle.where(top > 0, top, paddle.ones_like(top))
    best, least = None, None
    for shrink in _SHRINK:
        scale = top * (shrink / 7)
        error = ((groups / scale).round().clip(-7, 7) * scale - groups).square().sum(axis=1, keepdim=True)
        if best is None:
            best, least = paddle.full_like(error, shrink), error
        else:
            best = paddle.where(error < least, paddle.full_like(error, shrink), best)
            least = paddle.minimum(least, error)
    most = top * best
    return paddle.minimum(paddle.maximum(groups, -most), most).reshape(weight.shape)


def _for_npu(values, bits, dtype):
    """Codes ``[in, out]`` int8 and scales ``[out]``, the scale of least squared error for the codes."""
    top = np.abs(values).max(1, keepdims=True)
    scale = np.where(top > 0, top / np.float32(127), np.float32(1))
    codes = np.rint(values / scale)
    square = (codes * codes).sum(1, keepdims=True)
    scale = np.where(square > 0, (codes * values).sum(1, keepdims=True) / np.maximum(square, 1), scale)
    scales = paddle.to_tensor(scale[:, 0].astype("float32")).astype(dtype)
    known = scales.astype("float32").numpy()[:, None]  # as the operator reads it
    codes = np.clip(np.rint(values / known), -127, 127).astype(np.int8)
    return paddle.to_tensor(np.ascontiguousarray(codes.T)), scales


def told(bits, dtype):
    """A sentence for users where the device in use has no operator for weights of ``bits``, else None."""
    found = DeviceWeight.bits_for(bits, GROUP, dtype)
    if device.is_cpu() or found == bits:
        return None
    if found is not None:
        return f"weights in {bits} bits take {found} on {device.current()}, whose operator has no fewer"
    return (
        f"weights in {bits} bits save memory but no time on {device.current()}, which has no operator for them in "
        f"{str(dtype).split('.')[-1]}: plain operators turn them into floating point for each product"
    )
