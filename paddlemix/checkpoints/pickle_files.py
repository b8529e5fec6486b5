"""Weight files that are pickles, PyTorch's and Paddle's: read by an unpickler that knows tensors and nothing else.

PyTorch's is a zip of a pickle and one raw member a storage, and is read row by row; Paddle's has to be held whole.
"""

import math
import operator
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from paddlemix.errors import CheckpointError

from .tensors import ARRAY_DTYPES, StoredTensor, contiguous, name_some, pread, rows_per_block


class _TensorUnpickler(pickle.Unpickler):
    """Unpickles containers, numbers, strings, and what ``admitted`` maps ``"module.name"`` to; refuses all else."""

    def __init__(self, stream, path, admitted, load_storage=None):
        super().__init__(stream, encoding="utf-8")
        self._path, self._admitted, self._load_storage = path, admitted, load_storage

    def find_class(self, module, name):
        try:
            return self._admitted[f"{module}.{name}"]
        except KeyError:
            raise CheckpointError(
                f"{self._path} refers to '{module}.{name}', which has no place among tensors, so it was not loaded "
                "and nothing in it was run: get the weights as safetensors from a source that you trust"
            ) from None

    def persistent_load(self, reference):
        if self._load_storage is None:
            raise pickle.UnpicklingError("it refers to data outside of itself")
        return self._load_storage(*reference)

    def load_tensors(self):
        """The pickled dictionary, reduced to its tensors; other values in it are an error."""
        try:
            content = self.load()
        except CheckpointError:
            raise
        except Exception as error:  # a damaged pickle can fail in any way at all
            raise CheckpointError(
                f"{self._path} is damaged ({type(error).__name__}: {error}): download or copy it again"
            ) from None
        if not isinstance(content, dict):
            raise CheckpointError(f"{self._path} holds a {type(content).__name__}, not tensors by name")
        content.pop("StructuredToParameterName@@", None)  # Paddle's note on its own names for parameters
        other = [key for key, value in content.items() if not (isinstance(key, str) and isinstance(value, StoredTensor))]
        if other:
            raise CheckpointError(
                f"{self._path} has entries that are no tensors ({name_some(other)}): save the model's state_dict alone"
            )
        return content


class _Storage(NamedTuple):
    dtype: str
    itemsize: int
    count: int
    offset: int


# What storage classes hold, and its size. Those that are not supported are known for the message about it.
_TORCH_STORAGES = {
    "FloatStorage": ("float32", 4),
    "BFloat16Storage": ("bfloat16", 2),
    "HalfStorage": ("float16", 2),
    "DoubleStorage": ("float64", 8),
    "LongStorage": ("int64", 8),
    "IntStorage": ("int32", 4),
    "ShortStorage": ("int16", 2),
    "CharStorage": ("int8", 1),
    "ByteStorage": ("uint8", 1),
    "BoolStorage": ("bool", 1),
}


def read_torch_pickle(file):
    start = file.read(2)
    file.seek(0)
    if start != b"PK":
        kind = "in the format of torch before 1.6" if start[:1] == b"\x80" else "not a PyTorch weight file"
        raise CheckpointError(
            f"{file.name} is {kind}: with the torch that made it, load it and save it by "
            "`safetensors.torch.save_file(state_dict, 'model.safetensors')`"
        )
    try:
        archive = zipfile.ZipFile(file)
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        raise CheckpointError(f"{file.name} is cut short or damaged: download or copy it again") from None
    members = {info.filename: info for info in archive.infolist()}
    roots = [name[: -len("data.pkl")] for name in members if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise CheckpointError(f"{file.name} is a zip archive without PyTorch weights in it")
    root = roots[0]

    def content(name):
        try:
            return archive.read(name)
        except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError, ValueError):
            raise CheckpointError(f"{file.name} is damaged: download or copy it again") from None

    if f"{root}byteorder" in members and content(f"{root}byteorder") != b"little":
        raise CheckpointError(f"{file.name} was written on a big-endian machine: save it as safetensors there")

    def load_storage(kind, storage_type, key, location, count):
        dtype, itemsize = storage_type
        info = members[f"{root}data/{key}"]
        if kind != "storage" or info.compress_type != zipfile.ZIP_STORED or info.file_size != count * itemsize:
            raise pickle.UnpicklingError(f"storage {key} has an impossible form or size")
        # The directory at the archive's end does not say how long a member's own header is.
        header = pread(file, info.header_offset, (30,), np.uint8).tobytes()
        name_length, extra_length = struct.unpack_from("<HH", header, 26)
        offset = info.header_offset + 30 + name_length + extra_length
        if header[:4] != b"PK\x03\x04" or offset + info.file_size > os.fstat(file.fileno()).st_size:
            raise pickle.UnpicklingError(f"storage {key} is not in the file")
        return _Storage(dtype, itemsize, count, offset)

    def rebuild_tensor(storage, offset, shape, strides, requires_grad=False, hooks=None, metadata=None):
        shape, strides = tuple(map(operator.index, shape)), tuple(map(operator.index, strides))
        if not isinstance(storage, _Storage) or len(shape) != len(strides) or min(offset, *shape, *strides, 0) < 0:
            raise pickle.UnpicklingError("a tensor has an impossible form")
        last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides))
        if math.prod(shape) and last >= storage.count:
            raise pickle.UnpicklingError("a tensor reaches beyond its storage")
        start = storage.offset + offset * storage.itemsize
        dense = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
        if storage.dtype not in ARRAY_DTYPES or all(n == 1 or a == b for n, a, b in zip(shape, strides, dense)):
            return contiguous(file, storage.dtype, shape, start)

        def read(first, stop):
            span = (last + 1 - offset,) if math.prod(shape) else (0,)
            flat = pread(file, start, span, ARRAY_DTYPES[storage.dtype])
            steps = [stride * storage.itemsize for stride in strides]
            return np.lib.stride_tricks.as_strided(flat, shape, steps, writeable=False)[first:stop]

        return StoredTensor(storage.dtype, shape, read, max(1, shape[0]))  # one block: its rows overlap in the file

    # Made anew for each file: a pickle can write to the attributes of a function that it is given.
    admitted = {
        "collections.OrderedDict": OrderedDict,
        "torch._utils._rebuild_tensor_v2": rebuild_tensor,
        "torch._utils._rebuild_parameter": lambda data, requires_grad=True, hooks=None: data,
        **{f"torch.{name}": kind for name, kind in _TORCH_STORAGES.items()},
    }
    with archive.open(members[f"{root}data.pkl"]) as stream:
        return _TensorUnpickler(stream, file.name, admitted, load_storage).load_tensors()


def write_torch_pickle(path, arrays):
    """Write tensors as ``torch.save`` does, whole or not at all; torch and :func:`read_torch_pickle` read them back.

    Args:
        path: such as ``mm_projector.bin``.
        arrays: ``{name: float32 array}``.
    """
    parts = [pickle.PROTO, b"\x02", pickle.EMPTY_DICT, pickle.MARK]
    for key, (name, array) in enumerate(arrays.items()):
        strides = [math.prod(array.shape[i + 1 :]) for i in range(array.ndim)]
        storage = [pickle.MARK, _text("storage"), b"ctorch\nFloatStorage\n", _text(str(key)), _ANYWHERE, _number(array.size)]
        parts += [_text(name), b"ctorch._utils\n_rebuild_tensor_v2\n", pickle.MARK]
        parts += [*storage, pickle.TUPLE, pickle.BINPERSID, _number(0), _numbers(array.shape), _numbers(strides)]
        parts += [
            pickle.NEWFALSE,
            b"ccollections\nOrderedDict\n",
            pickle.EMPTY_TUPLE,
            pickle.REDUCE,
            pickle.TUPLE,
            pickle.REDUCE,
        ]
    parts += [pickle.SETITEMS, pickle.STOP]
    try:
        with zipfile.ZipFile(path + ".tmp", "w", zipfile.ZIP_STORED) as archive:
            archive.writestr("archive/data.pkl", b"".join(parts))
            archive.writestr("archive/byteorder", b"little")
            for key, array in enumerate(arrays.values()):
                archive.writestr(f"archive/data/{key}", np.ascontiguousarray(array, "<f4").tobytes())
            archive.writestr("archive/version", b"3\n")
        os.replace(path + ".tmp", path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written ({error.strerror}): make room, or use another folder") from None


# What torch calls the place of a tensor that was on no accelerator: "cpu".
_ANYWHERE = pickle.BINUNICODE + b"\x03\x00\x00\x00cpu"


def _text(text):
    content = text.encode("utf-8")
    return pickle.BINUNICODE + struct.pack("<I", len(content)) + content


def _number(number):
    if number < 1 << 31:
        return pickle.BININT + struct.pack("<i", number)
    return pickle.LONG1 + b"\x08" + struct.pack("<q", number)


def _numbers(numbers):
    return pickle.MARK + b"".join(map(_number, numbers)) + pickle.TUPLE


def read_paddle_pickle(file):
    class Dtype:
        """Stands in for ``numpy.dtype``: remembers the name, and nothing else is set."""

        def __init__(self, name, *_):
            self.name = {"f4": "float32", "f2": "float16", "u2": "bfloat16"}.get(name, name)

        def __setstate__(self, state):
            if state[1] not in ("<", "|"):
                raise pickle.UnpicklingError("its numbers are not little-endian")

    @dataclass(frozen=True)
    class Array(StoredTensor):
        """Stands in for ``numpy.ndarray``: the pickle first makes it empty, then sets its contents."""

        dtype: str = ""
        shape: tuple = ()
        read: Callable = None
        block_rows: int = 1

        def __setstate__(self, state):
            _, shape, dtype, columns_first, content = state
            values = dict(dtype=dtype.name, shape=tuple(shape), block_rows=1)
            if dtype.name in ARRAY_DTYPES:
                data = np.frombuffer(content, ARRAY_DTYPES[dtype.name])
                data = data.reshape(shape or (1,), order="F" if columns_first else "C")
                values["read"] = lambda start, stop: data[start:stop]
                values["block_rows"] = rows_per_block(shape, data.itemsize)
            self.__dict__.update(values)

    admitted = {
        "collections.OrderedDict": OrderedDict,
        "numpy.ndarray": Array,
        "numpy.dtype": Dtype,
        "numpy.core.multiarray._reconstruct": lambda kind, shape, code: Array(),
        "numpy._core.multiarray._reconstruct": lambda kind, shape, code: Array(),
        # How protocol 2 spells bytes.
        "_codecs.encode": lambda text, encoding: text.encode("latin1"),
    }
    return _TensorUnpickler(file, file.name, admitted).load_tensors()
