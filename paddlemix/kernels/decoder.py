"""All blocks of a decoder for one new token a row, in one call of ``decoder.cc``: what a step of decoding runs."""

import ctypes

import numpy as np
import paddle

from .cpu import _NO_NORM, PackedLinear, _address, _call, _float32

__all__ = ["MOST_ROWS", "DecoderStack", "KVLayout"]

MOST_ROWS = 64  # of a step; more are work enough for a call each
_CACHE_TYPES = {"bfloat16": 2, "float32": 3, "int8": 5}  # dnnl_data_type_t

_pointer, _long, _float = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class _Matrix(ctypes.Structure):
    _fields_ = [("weights", _pointer), ("few_bits", _long)]


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, _pointer) for name in ("norm1", "norm2", "q_norm", "k_norm", "sinks")),
        *((name, _Matrix) for name in ("qkv", "o", "gate", "up", "down")),
        *((name, _float) for name in ("eps1", "eps2", "qk_eps")),
    ]


class _Step(ctypes.Structure):
    _fields_ = [
        *((name, _long) for name in ("rows", "heads", "kv_heads", "width", "length", "capacity", "cache_type", "group")),
        *((name, _long) for name in ("table_rows", "rounds")),
        *((name, _pointer) for name in ("cos", "sin", "slots", "starts")),
        ("scale", _float),
    ]


class KVLayout:
    """Where a cache has its keys and values.

    Args:
        dtype: ``float32``, ``bfloat16`` or ``int8``.
        stores: ``(keys, values)`` of each layer, tensors ``[slots, ..., K, D]``; of int8 (codes, codes, scales, scales),
            arrays ``[slots, K, D]`` and float32 ``[slots, K, D / group]``.
        capacity: slots of a row, where rows lie one after the other.
        slots: ``[B, length]`` int64, where each position of each row is; None for one after the other.
    """

    def __init__(self, dtype, stores, capacity=0, slots=None):
        self.dtype, self.capacity = dtype, capacity
        self.slots = None if slots is None else np.ascontiguousarray(slots, np.int64)
        self.places, *_, self.heads, self.width = stores[0][0].shape
        self.group = self.width if dtype != "int8" else self.width // stores[0][2].shape[-1]
        if dtype == "int8":
            addresses = [[array.ctypes.data for array in of_layer] for of_layer in stores]
        else:
            addresses = [[tensor.data_ptr() for tensor in of_layer] + [0, 0] for of_layer in stores]
        self.addresses = np.array(addresses, np.uint64)
        self._stores = stores  # keeps the memory


class DecoderStack:
    """Blocks ``x + attention(norm(x))``, ``x + mlp(norm(x))`` with a SiLU gate, over a cache of keys and values.

    Args:
        layers: for each block a dictionary: ``norm1``, ``norm2`` (root-mean-square :class:`~.cpu.Norm`), ``qkv``, ``o``,
            ``gate``, ``up``, ``down`` (:class:`~.cpu.PackedLinear` or :class:`~.quantised.QuantisedLinear`, the last three of
            one kind), ``qk_norms`` (two norms or None) and ``sinks`` (``[H]`` float32 or None).
        heads: query heads ``H``.
        dtype: of the products elsewhere; keys and values in float32 are read as it.
    """

    def __init__(self, layers, heads, dtype):
        self.heads, self.rounds, self._keep = heads, dtype == "bfloat16", layers
        self.out_features = layers[0]["o"].out_features
        self._layers = (_Layer * len(layers))(*map(_described, layers))

    def __call__(self, x, cos, sin, layout, length, starts=None):
        """One step.

        Args:
            x: ``[B, 1, n]`` float32, with ``B`` at most :data:`MOST_ROWS`.
            cos, sin: ``[B or 1, 1, ..., D]`` float32 as for :func:`~.cpu.rotate_and_cache`.
            layout: a :class:`KVLayout`; position ``length - 1`` of each row is written.
            length: positions that rows have, the new one included.
            starts: first position that each row sees, ``[B]``; None for 0.

        Returns:
            ``[B, 1, n]`` float32.
        """
        x, cos, sin = _float32(x, "x"), _float32(cos, "cos"), _float32(sin, "sin")
        rows, width = x.shape[0], layout.width
        if x.shape != [rows, 1, self.out_features] or not 0 < rows <= MOST_ROWS:
            raise ValueError(f"x {x.shape} must be [at most {MOST_ROWS}, 1, {self.out_features}]")
        if {cos.size, sin.size} != {cos.shape[0] * width} or cos.shape[0] not in (1, rows):
            raise ValueError(f"cos {cos.shape} and sin {sin.shape} must be [1 or {rows}, 1, ..., {width}]")
        if len(layout.addresses) != len(self._layers):
            raise ValueError(f"the cache has {len(layout.addresses)} layers, the decoder {len(self._layers)}")
        if layout.slots is None:
            if not 0 < length <= layout.capacity or rows * layout.capacity > layout.places:
                raise ValueError(f"the cache holds {layout.capacity} positions a row; {length} of {rows} rows were asked for")
        elif layout.slots.shape != (rows, length) or layout.slots.min() < 0 or layout.slots.max() >= layout.places:
            raise ValueError(f"slots {layout.slots.shape} must be [{rows}, {length}], each below {layout.places}")
        if starts is not None:
            starts = np.ascontiguousarray(starts, np.int64)
            if starts.shape != (rows,) or starts.min() < 0 or starts.max() >= length:
                raise ValueError(f"starts must be one position below {length} for each of {rows} rows")
        step = _Step(
            rows, self.heads, layout.heads, width, length, layout.capacity, _CACHE_TYPES[layout.dtype], layout.group,
            cos.shape[0], self.rounds, cos.data_ptr(), sin.data_ptr(),
            None if layout.slots is None else layout.slots.ctypes.data,
            None if starts is None else starts.ctypes.data, width**-0.5,
        )  # fmt: skip
        out = paddle.empty([rows, 1, self.out_features], "float32")
        _call(
            "decoder_run", ctypes.addressof(self._layers), len(self._layers), layout.addresses.ctypes.data,
            ctypes.addressof(step), self.out_features, x.data_ptr(), out.data_ptr(),
        )  # fmt: skip
        return out


def _described(layer):
    (norm1, _, eps1), (norm2, _, eps2) = layer["norm1"].arguments, layer["norm2"].arguments
    norms = [norm.arguments for norm in layer["qk_norms"]] if layer["qk_norms"] else [_NO_NORM] * 2
    (q_norm, _, qk_eps), (k_norm, _, _) = norms
    matrices = (_matrix(layer[name]) for name in ("qkv", "o", "gate", "up", "down"))
    return _Layer(norm1, norm2, q_norm, k_norm, _address(layer["sinks"]), *matrices, eps1, eps2, qk_eps)


def _matrix(linear):
    if isinstance(linear, PackedLinear):
        return _Matrix(linear.handle, 0)
    return _Matrix(linear.address, 1)
