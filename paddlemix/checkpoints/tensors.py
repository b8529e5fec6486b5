"""Tensors in files: their dtypes, and reading them block by block.

Arrays are NumPy's; bfloat16, which NumPy lacks, travels as its bits in ``uint16``.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from paddlemix.errors import CheckpointError

# What a tensor of each supported dtype is held in.
ARRAY_DTYPES = {"float32": np.dtype("<f4"), "bfloat16": np.dtype("<u2"), "float16": np.dtype("<f2")}
DTYPES = tuple(ARRAY_DTYPES)
PACKED_DTYPES = {"U8": np.dtype("u1"), "I32": np.dtype("<i4"), "I64": np.dtype("<i8")}  # read too: numbers are packed in them

_BLOCKPACKED_DTYPES = 1 << 18  # a block and its transpose stay in the second-level cache
_SEEK_BYTES = 512  # as little of a row costs more calls than it saves bytes
_BLOCK_ROWS = 64  # fewer rows would write less than a cache line at a time when a block is transposed


def convert_dtype(array, source, target):
    """Values of ``array``, which holds dtype ``source``, as dtype ``target``; ties round to even.

    Args:
        array: any shape; ``uint16`` bits where ``source`` is ``bfloat16``.
        source, target: names in :data:`DTYPES`.

    Raises:
        OverflowError: a finite value is beyond what float16 can hold.
    """
    if source == target:
        return array
    if source == "bfloat16":
        array = (array.astype(np.uint32) << 16).view(np.float32)
    elif source == "float16":
        array = array.astype(np.float32)
    if target == "float32":
        return array
    if target == "float16":
        try:
            with np.errstate(over="raise"):
                return array.astype(np.float16)
        except FloatingPointError:
            raise OverflowError("a value is beyond the range of float16") from None
    bits = np.ascontiguousarray(array).view(np.uint32)
    rounded = ((bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16).astype(np.uint16)
    # Rounding carries the bits of some NaNs into infinity. Those that came from bfloat16 are exact as they are; others are
    # kept NaN by setting the quiet bit.
    lost = np.where(bits & 0xFFFF, 0x40, 0)
    return np.where(np.isnan(array), ((bits >> 16) | lost).astype(np.uint16), rounded)


def holds_exactly(array, source, target):
    """Whether dtype ``target`` holds the values of ``array``, of dtype ``source``, without rounding; arguments as above."""
    try:
        there = convert_dtype(array, source, target)
    except OverflowError:
        return False
    back = convert_dtype(there, target, source)
    dtype = np.dtype(f"u{array.itemsize}")  # NaN is not equal to itself, and zeros have signs
    return np.array_equal(*(np.ascontiguousarray(values).view(dtype) for values in (array, back)))


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in an open file.

    ``dtype`` is a name in :data:`DTYPES`, or the file's own word for a dtype that is not supported and cannot be read;
    ``read(start, stop)`` returns rows as an array; ``block_rows`` is how many of them to ask for at a time;
    ``read_part(start, stop, first, last)`` returns columns of rows, reading no others where that pays; None where none does.
    """

    dtype: str
    shape: tuple
    read: Callable[[int, int], np.ndarray]
    block_rows: int
    offset: int | None = None  # of the first byte in the file, where all lie in a row
    read_part: Callable[[int, int, int, int], np.ndarray] | None = None

    def part(self, start, stop, first, last):
        """Columns ``first`` to ``last`` of rows ``start`` to ``stop``."""
        if (first, last) == (0, self.shape[1]):
            return self.read(start, stop)
        return self.read(start, stop)[:, first:last] if self.read_part is None else self.read_part(start, stop, first, last)

    def blocks(self):
        """Yield ``(start, stop, rows)`` over the whole tensor."""
        for start, stop in blocks(row_count(self.shape), self.block_rows):
            yield start, stop, self.read(start, stop)


def row_count(shape):
    """Rows of a tensor of ``shape``; a single number is one."""
    return shape[0] if shape else 1


def blocks(rows, block_rows):
    """Yield ``(start, stop)`` over ``rows`` rows."""
    for start in range(0, rows, block_rows):
        yield start, min(start + block_rows, rows)


def rows_per_block(shape, itemsize):
    """How many rows of a tensor of ``shape`` to handle at a time."""
    return max(_BLOCK_ROWS, _BLOCKPACKED_DTYPES // max(1, math.prod(shape[1:]) * itemsize))


def pread(file, offset, shape, dtype):
    """An array of ``shape`` from the bytes at ``offset``. Safe to call from several threads."""
    array = np.empty(shape, dtype)
    if not array.size:
        return array
    view, done = memoryview(array).cast("B"), 0
    while done < len(view):
        count = os.preadv(file.fileno(), [view[done:]], offset + done)
        if not count:
            raise CheckpointError(f"{file.name} is cut short: download or copy it again")
        done += count
    return array


def contiguous(file, dtype, shape, offset):
    """A :class:`StoredTensor` whose rows lie one after the other from ``offset`` on."""
    array_dtype = ARRAY_DTYPES.get(dtype) or PACKED_DTYPES.get(dtype)
    itemsize = array_dtype.itemsize if array_dtype else 1

    def read(start, stop):
        row = math.prod(shape[1:]) * itemsize
        return pread(file, offset + start * row, (stop - start, *shape[1:]), array_dtype)

    def read_part(start, stop, first, last):
        if (last - first) * itemsize < _SEEK_BYTES:
            return read(start, stop)[:, first:last]
        row, array = shape[1] * itemsize, np.empty([stop - start, last - first], array_dtype)
        for i in range(start, stop):
            array[i - start] = pread(file, offset + i * row + first * itemsize, (last - first,), array_dtype)
        return array

    return StoredTensor(dtype, shape, read, rows_per_block(shape, itemsize), offset, read_part if len(shape) == 2 else None)


def name_some(names, most=5):
    """The first few of ``names`` for a message, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(str(name) for name in names[:most]) + more
