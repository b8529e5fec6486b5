"""Files of named tensors: safetensors (read and written), and the pickles of PyTorch and Paddle (read only).

A file is read row by row and written row by row, so that neither direction needs memory for more than a block of one
tensor; Paddle's pickle alone has to be held whole while it is read. Pickles go through an unpickler that knows tensors
and nothing else. Arrays are NumPy's; bfloat16, which NumPy lacks, travels as its bits in ``uint16``.

Formats: https://github.com/huggingface/safetensors#format; PyTorch's is a zip of a pickle and one raw member a storage.
"""

import contextlib
import json
import math
import operator
import os
import pickle
import re
import shutil
import struct
import tempfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from paddlemix.errors import CheckpointError

# What a tensor of each supported dtype is held in.
ARRAY_DTYPES = {"float32": np.dtype("<f4"), "bfloat16": np.dtype("<u2"), "float16": np.dtype("<f2")}
DTYPES = tuple(ARRAY_DTYPES)

SINGLE_FILES = ("model.safetensors", "pytorch_model.bin", "model_state.pdparams")
INDEX_FILES = tuple(f"{name}.index.json" for name in SINGLE_FILES)
WEIGHT_SUFFIXES = tuple(os.path.splitext(name)[1] for name in SINGLE_FILES)

_SAFETENSORS_TAGS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_BLOCK_BYTES = 1 << 18  # a block and its transpose stay in the second-level cache
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
    # Rounding carries the bits of some NaNs into infinity: keep them NaN by setting the quiet bit.
    return np.where(np.isnan(array), ((bits >> 16) | 0x40).astype(np.uint16), rounded)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in an open file.

    ``dtype`` is a name in :data:`DTYPES`, or the file's own word for a dtype that is not supported and cannot be read;
    ``read(start, stop)`` returns rows as an array; ``block_rows`` is how many of them to ask for at a time.
    """

    dtype: str
    shape: tuple
    read: Callable[[int, int], np.ndarray]
    block_rows: int

    def blocks(self):
        """Yield ``(start, stop, rows)`` over the whole tensor."""
        for start, stop in blocks(self.shape[0], self.block_rows):
            yield start, stop, self.read(start, stop)


def blocks(rows, block_rows):
    """Yield ``(start, stop)`` over ``rows`` rows."""
    for start in range(0, rows, block_rows):
        yield start, min(start + block_rows, rows)


def rows_per_block(shape, itemsize):
    """How many rows of a tensor of ``shape`` to handle at a time."""
    return max(_BLOCK_ROWS, _BLOCK_BYTES // max(1, math.prod(shape[1:]) * itemsize))


# ---------------------------------------------------------------------- directories


def find_weight_files(directory):
    """Paths of the weight files of a checkpoint, and what its index says of them.

    Returns:
        ``(paths, index)``; ``index`` maps a tensor's name to its file's, and is None for a single file.

    Raises:
        CheckpointError: there are none, the index is broken, or a file that it lists is missing.
    """
    for single, index in zip(SINGLE_FILES, INDEX_FILES):
        path = os.path.join(directory, single)
        if os.path.isfile(path):
            return [path], None
        index_path = os.path.join(directory, index)
        if not os.path.isfile(index_path):
            continue
        weight_map = _read_index(index_path)
        paths = [os.path.join(directory, name) for name in sorted(set(weight_map.values()))]
        missing = [os.path.basename(path) for path in paths if not os.path.isfile(path)]
        if missing:
            raise CheckpointError(
                f"{directory} lacks {len(missing)} of the {len(paths)} files that {index} lists "
                f"({name_some(missing)}): download or copy them again"
            )
        return paths, weight_map
    if not os.path.isdir(directory):
        raise CheckpointError(f"{directory} is not a directory: pass the directory of a checkpoint")
    for name in sorted(os.listdir(directory)):
        if match := re.fullmatch(r"(.+)-\d+-of-\d+(\.\w+)", name):
            index = f"{match[1]}{match[2]}.index.json"
            if index in INDEX_FILES:
                raise CheckpointError(f"{directory} has {name} but no {index}: download or copy the index as well")
    raise CheckpointError(
        f"{directory} has no weights: looked for {', '.join(SINGLE_FILES)} and for shards with an index "
        f"({', '.join(INDEX_FILES)}); download or copy them there"
    )


def _read_index(path):
    try:
        with open(path, encoding="utf-8") as file:
            weight_map = json.load(file)["weight_map"]
        valid = bool(weight_map) and all(name == os.path.basename(name) for name in weight_map.values())
    except (ValueError, KeyError, TypeError, AttributeError):
        valid = False
    if not valid:
        raise CheckpointError(f"{path} is not an index of weight files: download or copy it again")
    return weight_map


def name_some(names, most=5):
    """The first few of ``names`` for a message, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(str(name) for name in names[:most]) + more


# ---------------------------------------------------------------------- reading


@contextlib.contextmanager
def open_weight_file(path):
    """Context manager: a dictionary of the file's tensors by name, readable until it is left.

    Raises:
        CheckpointError: the file is missing, damaged, cut short, or a pickle with anything but tensors in it.
    """
    readers = {".safetensors": _read_safetensors, ".bin": _read_torch_pickle, ".pdparams": _read_paddle_pickle}
    if os.path.splitext(path)[1] not in readers:
        raise CheckpointError(f"{path} is not a known kind of weight file: {', '.join(readers)} are")
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(open(path, "rb"))
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
        if file.read(24) == b"version https://git-lfs.":
            raise CheckpointError(f"{path} is a Git LFS pointer without the weights: run `git lfs pull` in its directory")
        file.seek(0)
        yield readers[os.path.splitext(path)[1]](file)


def _pread(file, offset, shape, dtype):
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


def _contiguous(file, dtype, shape, offset):
    """A :class:`StoredTensor` whose rows lie one after the other from ``offset`` on."""
    array_dtype = ARRAY_DTYPES.get(dtype)
    itemsize = array_dtype.itemsize if array_dtype else 1

    def read(start, stop):
        row = math.prod(shape[1:]) * itemsize
        return _pread(file, offset + start * row, (stop - start, *shape[1:]), array_dtype)

    return StoredTensor(dtype, shape, read, rows_per_block(shape, itemsize))


def _read_safetensors(file):
    size = os.fstat(file.fileno()).st_size
    damaged = f"{file.name} is not a valid safetensors file"
    if size < 8:
        raise CheckpointError(f"{file.name} is cut short: it has {size} bytes; download or copy it again")
    (length,) = struct.unpack("<Q", file.read(8))
    if length > 100_000_000:  # the format's own limit
        raise CheckpointError(f"{damaged}: its header would be {length} bytes long; download or copy it again")
    if size < 8 + length:
        raise CheckpointError(
            f"{file.name} is cut short: {8 + length - size} bytes of its header are missing; download or copy it again"
        )

    def unique(pairs):
        names = dict(pairs)
        if len(names) != len(pairs):
            raise CheckpointError(f"{damaged}: a name occurs twice in its header; download or copy it again")
        return names

    try:
        header = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=unique)
        header.pop("__metadata__", None)
        entries = {
            name: (str(entry["dtype"]), tuple(map(int, entry["shape"])), *map(int, entry["data_offsets"]))
            for name, entry in header.items()
        }
        spans = [(start, stop) for _, _, start, stop in entries.values()]
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"{damaged}: its header cannot be read; download or copy it again") from None

    end = max((stop for _, stop in spans), default=0)
    if size < 8 + length + end:
        raise CheckpointError(
            f"{file.name} is cut short: {8 + length + end - size} of {8 + length + end} bytes are missing; "
            "download or copy it again"
        )
    if size > 8 + length + end or sum(stop - start for start, stop in spans) != end:
        raise CheckpointError(f"{damaged}: its tensors do not fill it exactly; download or copy it again")
    tensors = {}
    for name, (tag, shape, start, stop) in entries.items():
        # PaddleNLP tags bfloat16 as what NumPy holds it in.
        dtype = "bfloat16" if tag == "U16" else _SAFETENSORS_TAGS.get(tag, tag)
        if start < 0 or min(shape, default=0) < 0:
            raise CheckpointError(f"{damaged}: the place of {name} is impossible; download or copy it again")
        if dtype in ARRAY_DTYPES and stop - start != math.prod(shape) * ARRAY_DTYPES[dtype].itemsize:
            raise CheckpointError(f"{damaged}: shape and size of {name} contradict; download or copy it again")
        tensors[name] = _contiguous(file, dtype, shape, 8 + length + start)
    return tensors


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


def _read_torch_pickle(file):
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
        header = _pread(file, info.header_offset, (30,), np.uint8).tobytes()
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
            return _contiguous(file, storage.dtype, shape, start)

        def read(first, stop):
            span = (last + 1 - offset,) if math.prod(shape) else (0,)
            flat = _pread(file, start, span, ARRAY_DTYPES[storage.dtype])
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


def _read_paddle_pickle(file):
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
                data = data.reshape(shape, order="F" if columns_first else "C")
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


# ---------------------------------------------------------------------- writing


@dataclass(frozen=True)
class OutgoingTensor:
    """A tensor to be written: ``rows()`` yields consecutive rows as contiguous arrays of ``dtype``."""

    name: str
    dtype: str
    shape: tuple
    rows: Callable[[], Iterator[np.ndarray]]

    @property
    def nbytes(self):
        """Size in bytes."""
        return math.prod(self.shape) * ARRAY_DTYPES[self.dtype].itemsize


def parse_size(size):
    """Number of bytes in ``size``: an integer, or a text such as ``"5GB"`` (powers of 1000) or ``"5GiB"`` (of 1024).

    Raises:
        CheckpointError: it is neither, or not positive.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", str(size).strip(), re.IGNORECASE)
    count = 0
    if match:
        step = 1024 if match[3] else 1000
        count = int(float(match[1]) * step ** " KMGT".index(match[2].upper() or " "))
    if count < 1:
        raise CheckpointError(f"max_shard_size is '{size}': give a size such as 5GB, 500MB or a number of bytes")
    return count


def write_safetensors(directory, tensors, metadata, max_shard_size="5GB", progress=None):
    """Write tensors as ``model.safetensors``, or as shards with an index, in place of such files in ``directory``.

    Everything is written to a temporary directory inside ``directory`` and renamed at the end: an interruption before
    that leaves what was there as it was.

    Args:
        directory: is made if it does not exist.
        tensors: :class:`OutgoingTensor` objects, in the order in which they fill the shards.
        metadata: dictionary of strings for the header of each file.
        max_shard_size: see :func:`parse_size`; a larger tensor gets a shard of its own.
        progress: is called with the number of bytes after each block.

    Raises:
        CheckpointError: the size cannot be understood, or the disk refuses.
    """
    limit = parse_size(max_shard_size)
    shards, filled = [[]], 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.nbytes > limit:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.nbytes
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = ["model.safetensors"]
    try:
        os.makedirs(directory, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=directory) as temporary:
            for name, shard in zip(names, shards):
                _write_file(os.path.join(temporary, name), shard, metadata, progress)
            if len(shards) > 1:
                index = {
                    "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors)},
                    "weight_map": {tensor.name: name for name, shard in zip(names, shards) for tensor in shard},
                }
                names.append("model.safetensors.index.json")
                with open(os.path.join(temporary, names[-1]), "w", encoding="utf-8") as file:
                    json.dump(index, file, indent=2, sort_keys=True)
                    file.write("\n")
            for name in names:
                os.replace(os.path.join(temporary, name), os.path.join(directory, name))
        # Last of all, what an earlier save left behind: until here it was the complete checkpoint.
        for name in os.listdir(directory):
            ours = re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json", name)
            if ours and name not in names:
                os.remove(os.path.join(directory, name))
    except OSError as error:
        need = sum(tensor.nbytes for tensor in tensors) / 1e9
        free = shutil.disk_usage(directory).free / 1e9 if os.path.isdir(directory) else 0
        raise CheckpointError(
            f"{directory} cannot be written ({error.strerror}): {need:.1f} GB are needed, {free:.1f} GB are free"
        ) from None


def _write_file(path, tensors, metadata, progress):
    # Wide numbers first, so that each tensor starts at a multiple of its item size, as other writers of the format do.
    tensors = sorted(tensors, key=lambda tensor: -ARRAY_DTYPES[tensor.dtype].itemsize)
    tags = {dtype: tag for tag, dtype in _SAFETENSORS_TAGS.items()}
    header, offset = {"__metadata__": metadata}, 0
    for tensor in tensors:
        span = [offset, offset + tensor.nbytes]
        header[tensor.name] = {"dtype": tags[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
        offset += tensor.nbytes
    encoded = json.dumps(header, separators=(",", ":")).encode("utf-8")
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for tensor in tensors:
            for rows in tensor.rows():
                file.write(rows.data)
                if progress is not None:
                    progress(rows.nbytes)
        assert file.tell() == 8 + len(encoded) + offset, f"{path}: tensors and header differ in size"
        file.flush()
        os.fsync(file.fileno())  # or a power cut after the rename leaves an empty file under the final name
