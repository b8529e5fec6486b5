"""Linear layers with weights in 8 and 4 bits on x86 CPUs; the layout is that of :mod:`paddlemix.quantised`."""

import ctypes

import numpy as np

from paddlemix import quantised

from .cpu import _NO_NORM, ACTIVATIONS, DTYPES, _address, _call, _prepare

__all__ = ["QuantisedLinear", "quantise"]

_pointer, _long = ctypes.c_void_p, ctypes.c_int64


class _Weights(ctypes.Structure):
    _fields_ = [
        *((name, _long) for name in ("k", "n", "padded", "group", "bits", "dtype", "activations")),
        *((name, _pointer) for name in ("codes", "scales", "zeros", "factors", "bias", "order")),
    ]


class QuantisedLinear:
    """``residual + activation(norm(x) @ weight + bias)``, as :class:`~.cpu.PackedLinear`, its weight used where it lies.

    Args:
        weight: a :class:`paddlemix.quantised.Quantised`; its arrays may be mapped files.
        bias: ``[out]`` float32 tensor or None.
        dtype: of the products of many rows, ``bfloat16`` or ``float32``. Few rows are rounded to 16 bits a group.
        activations: ``int8`` to round all rows to 8 bits a group, :func:`paddlemix.quantised.rounded_activations`; codes of 4
            bits in groups of 32 do without.
    """

    alone = True  # up to 32 rows, as PackedLinear.alone

    def __init__(self, weight, bias=None, dtype="float32", activations=None):
        arrays = {name: np.ascontiguousarray(array) for name, array in weight.arrays().items()}
        if bias is not None:
            arrays["bias"] = np.ascontiguousarray(bias.numpy() if hasattr(bias, "numpy") else bias, np.float32)
        self.weight, self.dtype = weight, dtype
        self.in_features, self.out_features = weight.inputs, weight.outputs
        _check(weight, arrays)
        self._arrays = arrays  # keeps the memory
        addresses = {name: array.ctypes.data for name, array in arrays.items()}
        width = quantised.padded(weight.inputs, weight.group)
        self.handle = _Weights(
            weight.inputs, weight.outputs, width, weight.group, weight.bits, DTYPES[dtype],
            8 if activations == "int8" else 16,
            *(addresses.get(name) for name in ("codes", "scales", "zeros", "factors", "bias", "order")),
        )  # fmt: skip
        self.address = ctypes.addressof(self.handle)

    def __call__(self, x, norm=None, activation=None, residual=None, out=None):
        """As :meth:`.cpu.PackedLinear.__call__`."""
        x, residual, rows, out = _prepare(x, self.in_features, self.out_features, residual, out)
        _call(
            "quantised_linear_run", self.address, x.data_ptr(), rows, *(norm.arguments if norm else _NO_NORM),
            ACTIVATIONS[activation], _address(residual), out.data_ptr(),
        )  # fmt: skip
        return out


def _check(weight, arrays):
    """Shapes and dtypes, which the kernel takes on trust."""
    width = quantised.padded(weight.inputs, weight.group)
    groups = weight.outputs, width // weight.group
    expected = {
        "codes": ((weight.outputs, width * weight.bits // 8), np.uint8),
        "scales": (groups, np.float16),
        "factors": ((weight.outputs,), np.float32),
        "zeros": (groups, np.float16),
        "bias": ((weight.outputs,), np.float32),
        "order": ((weight.inputs,), np.int32),
    }
    if weight.bits not in (4, 8) or weight.group not in quantised.GROUPS or (weight.zeros is None) != (weight.bits == 8):
        raise ValueError(f"{weight.bits} bits in groups of {weight.group} are not known here")
    for name, array in arrays.items():
        if (array.shape, array.dtype) != (expected[name][0], np.dtype(expected[name][1])):
            raise ValueError(f"{name} is {array.dtype} {array.shape}, but must be {expected[name]}")


def mlp(x, up, down, gate, norm, activation, residual, out):
    """:func:`.cpu.mlp` for layers of this kind, which may differ in bits."""
    x, residual, rows, out = _prepare(x, up.in_features, down.out_features, residual, out)
    _call(
        "quantised_mlp_run", gate.address if gate else None, up.address, down.address, x.data_ptr(), rows,
        *(norm.arguments if norm else _NO_NORM), ACTIVATIONS[activation], _address(residual), out.data_ptr(),
    )  # fmt: skip
    return out


def quantise(weight, bits, group=quantised.BLOCK):
    """:func:`paddlemix.quantised.quantise`, some twenty times as fast.

    Args:
        weight: ``[out, in]`` array: float32, or uint16 with the bits of bfloat16.
        bits: 8 or 4.
        group: inputs of a group.
    """
    weight = np.ascontiguousarray(weight)
    out, inputs = weight.shape
    width = quantised.padded(inputs, group)
    codes = np.empty([out, width * bits // 8], np.uint8)
    scales = np.empty([out, width // group], np.float16)
    zeros = np.empty_like(scales) if bits == 4 else None
    factors = np.empty(out, np.float32)
    source = DTYPES["bfloat16" if weight.dtype == np.uint16 else "float32"]
    if weight.dtype not in (np.uint16, np.float32):
        raise TypeError(f"the weight must be float32 or the bits of bfloat16, not {weight.dtype}")
    _call(
        "quantise_run", weight.ctypes.data, source, out, inputs, group, bits, codes.ctypes.data, scales.ctypes.data,
        None if zeros is None else zeros.ctypes.data, factors.ctypes.data,
    )  # fmt: skip
    return quantised.Quantised(bits, inputs, group, codes, scales, zeros, factors)
