"""Weights in 8 and 4 bits: their layout, and a plain reference of what the kernels do with it. NumPy alone.

A weight ``[out, in]`` is cut along its inputs into groups. A value is ``factor * scale * (code - zero)``:

- ``codes [out, bytes]`` uint8, in blocks of 64 inputs, filled up with inputs of code 0 that nothing reads. In 4 bits a block is
  16 little-endian numbers of 16 bits, of which number ``j`` holds inputs ``j``, ``16 + j``, ``32 + j`` and ``48 + j``, from its
  low end on; in 8 bits it is 32 such numbers in two halves, of which number ``j`` holds inputs ``j`` and ``16 + j`` of its
  half, signed. So vectors of 16-bit numbers come out by shifts alone, in the order of the inputs.
- ``scales [out, groups]`` float16.
- ``zeros [out, groups]`` float16, of 4 bits alone; numbers between those of codes are usual.
- ``factors [out]`` float32, so that float16 has scales in its range whatever the weights' size.
- ``order [in]`` int32 or None: input ``i`` of the groups is input ``order[i]`` of the weight (GPTQ's ``g_idx``).
"""

from dataclasses import dataclass, replace

import numpy as np

__all__ = [
    "BITS",
    "BLOCK",
    "GROUPS",
    "PARTS",
    "Quantised",
    "bytes_per_value",
    "group_size",
    "joined",
    "pack",
    "quantise",
    "rounded_activations",
    "rounds_activations",
    "unpack",
]

BLOCK = 64
GROUPS = (32, 64, 128, 256)  # inputs of a group
BITS = {"int8": 8, "int4": 4}
# Parts of a model, each of which can have its weights in fewer bits, and how the names of these begin.
PARTS = {"language": "language_model.", "projector": "mlp1.", "vision": "vision_model.encoder."}
_ALL = slice(None)
_SHRINK = (1.0, 0.9, 0.8)  # of a group's range that the search for scale and zero begins with


@dataclass(frozen=True)
class Quantised:
    """A weight ``[out, in]``; see the head of the module for its arrays."""

    bits: int
    inputs: int
    group: int
    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray | None
    factors: np.ndarray
    order: np.ndarray | None = None

    @property
    def outputs(self):
        """Rows of the weight."""
        return self.codes.shape[0]

    @property
    def nbytes(self):
        """Memory of all arrays."""
        return sum(array.nbytes for array in self.arrays().values())

    def arrays(self):
        """The arrays that are there, by name."""
        named = {name: getattr(self, name) for name in ("codes", "scales", "zeros", "factors", "order")}
        return {name: array for name, array in named.items() if array is not None}

    def rows(self, which):
        """The weight's rows ``which``, a slice or an array of numbers."""
        parts = {name: np.ascontiguousarray(array[which]) for name, array in self.arrays().items() if name != "order"}
        return replace(self, **parts)

    def columns(self, first, count):
        """The weight of ``count`` inputs from ``first`` on.

        Its codes are the same where groups of 32 inputs or more begin and end there; elsewhere, and where groups are in another
        order than inputs, it is one of 8 bits that is rounded anew.
        """
        last = first + count
        edges = [edge for edge in (first, last) if edge < self.inputs]
        fitting = (size for size in reversed(GROUPS) if not self.group % size and not any(edge % size for edge in edges))
        group = next(fitting, None)
        if self.order is not None or group is None:
            return quantise(self.dequantised()[:, first:last], 8, GROUPS[0])
        width = padded(count, group)
        codes = np.zeros([self.outputs, width], np.int16)
        codes[:, :count] = unpack(self.codes, self.bits)[:, first:last]

        def own(array):
            wide = np.repeat(array, self.group // group, axis=1)[:, first // group :][:, : width // group]
            return np.pad(wide, [(0, 0), (0, width // group - wide.shape[1])], mode="edge")  # of what fills up

        zeros = None if self.zeros is None else own(self.zeros)
        return Quantised(self.bits, count, group, pack(codes, self.bits), own(self.scales), zeros, self.factors)

    def scaled(self, scale):
        """This weight times ``scale [out]``."""
        return replace(self, factors=(self.factors * scale).astype(np.float32))

    def dequantised(self, which=_ALL):
        """Values ``[out, in]`` float32, of the rows ``which``."""
        codes = unpack(self.codes[which], self.bits).astype(np.float32)
        groups = codes.reshape([len(codes), -1, self.group])
        if self.zeros is not None:
            groups = groups - self.zeros[which].astype(np.float32)[..., None]
        values = groups * (self.scales[which].astype(np.float32) * self.factors[which][:, None])[..., None]
        values = values.reshape(codes.shape)[:, : self.inputs]
        if self.order is None:
            return np.ascontiguousarray(values)
        out = np.empty_like(values)
        out[:, self.order] = values
        return out


def bytes_per_value(weight_dtype):
    """Memory of a value: its code, and its part of its group's scale and (of 4 bits) zero, float16 each."""
    return BITS[weight_dtype] / 8 + (4 if weight_dtype == "int4" else 2) / BLOCK


def group_size(parameter, inputs, bits):
    """Inputs of a group of a weight ``[out, inputs]`` that is rounded here, by the parameter's name.

    Products of many rows are the faster the less often they scale; of the tower's weights no step reads a few rows.
    """
    wide = bits == 8 and parameter.startswith(PARTS["vision"]) and inputs % GROUPS[-1] == 0
    return GROUPS[-1] if wide else BLOCK


def padded(inputs, group):
    """Inputs with those that fill up the last block and group."""
    step = max(BLOCK, group)
    return -(-inputs // step) * step


def pack(codes, bits):
    """Codes ``[out, in]``, ``in`` a multiple of 64, as bytes ``[out, in * bits / 8]``."""
    rows = len(codes)
    if bits == 8:
        pairs = codes.astype(np.int8).reshape([rows, -1, 2, 16]).swapaxes(2, 3)
        return np.ascontiguousarray(pairs).view(np.uint8).reshape([rows, -1])
    quads = codes.astype("<u2").reshape([rows, -1, 4, 16])
    numbers = quads[:, :, 0] | quads[:, :, 1] << 4 | quads[:, :, 2] << 8 | quads[:, :, 3] << 12
    return np.ascontiguousarray(numbers).view(np.uint8).reshape([rows, -1])


def unpack(packed, bits):
    """The codes ``[out, in]`` int16 of :func:`pack`."""
    rows = len(packed)
    packed = np.ascontiguousarray(packed)
    if bits == 8:
        pairs = packed.view(np.int8).reshape([rows, -1, 16, 2]).swapaxes(2, 3)
        return np.ascontiguousarray(pairs).reshape([rows, -1]).astype(np.int16)
    numbers = packed.view(np.uint16).reshape([rows, -1, 1, 16])
    quads = numbers >> np.array([0, 4, 8, 12], np.uint16)[:, None] & 15
    return quads.reshape([rows, -1]).astype(np.int16)


def quantise(weight, bits, group=BLOCK):
    """``weight [out, in]`` float32 in few bits, with the scales and zeros of least squared error among a few that are tried.

    In 8 bits the zero is 0 and the scale is fitted to the codes once. In 4 bits, from the group's whole range and from less of
    it, codes and the line through them are fitted to each other in turn, and the best is kept.
    """
    out, inputs = weight.shape
    width = padded(inputs, group)
    values = np.zeros([out, width], np.float32)
    values[:, :inputs] = weight
    values = values.reshape([out, -1, group])
    # What fills up counts for nothing, so it repeats a value that is there.
    if inputs % group:
        last = values[:, inputs // group]
        last[:, inputs % group :] = last[:, :1]
    most = 127 if bits == 8 else 15
    span = np.abs(values).max((1, 2))
    factors = np.where(span > 0, span / most, 1).astype(np.float32)
    values = values / factors[:, None, None]
    fit = _fit8 if bits == 8 else _fit4
    codes, scales, zeros = fit(values)
    codes = codes.reshape([out, width])
    codes[:, inputs:] = 0
    return Quantised(bits, inputs, group, pack(codes, bits), scales, zeros, factors)


def _fit8(values):
    scale = np.abs(values).max(-1) / 127
    scale = np.where(scale > 0, scale, 1)
    codes = np.rint(values / scale[..., None])
    square = (codes * codes).sum(-1)
    scale = np.where(square > 0, (codes * values).sum(-1) / np.maximum(square, 1), scale)
    scales = _positive(scale.astype(np.float16))
    codes = np.clip(np.rint(values / scales.astype(np.float32)[..., None]), -127, 127)
    return codes, scales, None


def _fit4(values):
    low, high = values.min(-1), values.max(-1)
    middle, width = (low + high) / 2, high - low
    best = None
    for shrink in _SHRINK:
        scale = np.where(width > 0, width * shrink / 15, np.where(middle != 0, np.abs(middle), 1))
        zero = np.where(width > 0, 7.5, 7) - middle / scale
        for last in (False, False, True):
            scales = _positive(scale.astype(np.float16))
            zeros = np.clip(zero, -60000, 60000).astype(np.float16)
            s, z = scales.astype(np.float32), zeros.astype(np.float32)
            codes = np.clip(np.rint(values / s[..., None] + z[..., None]), 0, 15)
            if last:
                break
            mean_code, mean = codes.mean(-1), values.mean(-1)
            spread = ((codes - mean_code[..., None]) ** 2).sum(-1)
            slope = ((codes - mean_code[..., None]) * values).sum(-1) / np.maximum(spread, 1e-9)
            fits = (spread > 0) & (slope > 0)
            scale = np.where(fits, slope, s)
            zero = np.where(fits, mean_code - mean / scale, z)
        error = ((s[..., None] * (codes - z[..., None]) - values) ** 2).sum(-1)
        if best is None:
            best = [codes, scales, zeros, error]
            continue
        better = error < best[3]
        for kept, new in zip(best, (codes, scales, zeros, error)):
            kept[better] = new[better]
    return best[0], best[1], best[2]


def _positive(scales):
    return np.maximum(scales, np.float16(2e-7))  # of a group so much smaller than its row that float16 has no number for it


def rounds_activations(bits, group):
    """Whether activations can have 8 bits beside codes of such bits and groups: not where half a block of 4 bits is a group."""
    return bits == 8 or group >= BLOCK


def rounded_activations(x, group):
    """Activations ``[..., in]`` as 8 bits leave them, float32: whole numbers up to 127 times a scale for each ``group`` inputs,
    the largest of a group keeping its value."""
    width = padded(x.shape[-1], group)
    groups = np.zeros([*x.shape[:-1], width], np.float32)
    groups[..., : x.shape[-1]] = x
    groups = groups.reshape([*x.shape[:-1], -1, group])
    top = np.abs(groups).max(-1, keepdims=True)
    values = np.rint(groups * (np.float32(127) / np.where(top > 0, top, 1))) * (top / np.float32(127))
    return values.reshape([*x.shape[:-1], width])[..., : x.shape[-1]]


def joined(parts):
    """Weights of the same inputs under each other, ``[(Quantised, ((row, output, count), ...)), ...]``.

    A part's rows from ``row`` on become the whole's rows from ``output`` on.

    Returns:
        A :class:`Quantised`; where bits, groups or orders of inputs differ, one of 8 bits that is rounded anew.
    """
    first = parts[0][0]
    out = sum(count for _, runs in parts for *_, count in runs)
    alike = all(
        (part.bits, part.inputs, part.group) == (first.bits, first.inputs, first.group) and _same(part.order, first.order)
        for part, _ in parts
    )
    if not alike:
        values = np.empty([out, first.inputs], np.float32)
        for part, runs in parts:
            rows = part.dequantised()
            for row, output, count in runs:
                values[output : output + count] = rows[row : row + count]
        return quantise(values, 8, 32)
    if len(parts) == 1 and parts[0][1] == ((0, 0, out),) and out == first.outputs:
        return first
    arrays = {}
    for name, array in first.arrays().items():
        if name != "order":
            arrays[name] = np.empty([out, *array.shape[1:]], array.dtype)
            for part, runs in parts:
                for row, output, count in runs:
                    arrays[name][output : output + count] = part.arrays()[name][row : row + count]
    return replace(first, **arrays)


def _same(one, other):
    return one is other or (one is not None and other is not None and np.array_equal(one, other))
