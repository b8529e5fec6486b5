"""Safetensors files, read and written row by row (https://github.com/huggingface/safetensors#format)."""

import json
import math
import os
import re
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from paddlemix.errors import CheckpointError
from paddlemix.validation import Integer, Items, Text, check, shown

from .tensors import ARRAY_DTYPES, PACKED_DTYPES, contiguous

_SAFETENSORS_TAGS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_ENTRY = {
    "dtype": Text(20),
    "shape": Items(Integer(0, 1 << 40), 0, 16),
    "data_offsets": Items(Integer(0, 1 << 50), 2, 2),
}


def read_safetensors(file):
    size = os.fstat(file.fileno()).st_size
    damaged = f"{file.name} is not a valid safetensors file"
    unreadable = f"{damaged}: its header cannot be read"
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
    except CheckpointError:
        raise
    except (ValueError, RecursionError):
        raise CheckpointError(f"{unreadable}; download or copy it again") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{unreadable} because it is no JSON object; download or copy it again")
    header.pop("__metadata__", None)
    for name, entry in header.items():
        if not isinstance(entry, dict) or not entry.keys() >= _ENTRY.keys():
            raise CheckpointError(
                f"{unreadable} because {shown(name)} lacks {', '.join(_ENTRY)}, or one of them; download or copy it again"
            )
        check(entry, _ENTRY, f"{unreadable} because {shown(name)}.", CheckpointError)

    spans = sorted((*entry["data_offsets"], name) for name, entry in header.items())
    end = max((stop for _, stop, _ in spans), default=0)
    if size < 8 + length + end:
        raise CheckpointError(
            f"{file.name} is cut short: {8 + length + end - size} of {8 + length + end} bytes are missing; "
            "download or copy it again"
        )
    reached, badly = 0, f"{damaged}: its tensors do not fill it exactly"
    for start, stop, name in spans:
        if start != reached or stop < start:
            problem = "overlaps another" if start < reached else "leaves a hole before it" if start > reached else "ends early"
            raise CheckpointError(f"{badly}, {shown(name)} {problem}; download or copy it again")
        reached = stop
    if size > 8 + length + end:
        raise CheckpointError(f"{badly}, {size - 8 - length - end} bytes are left over; download or copy it again")
    tensors = {}
    for name, entry in header.items():
        tag, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        # PaddleNLP tags bfloat16 as what NumPy holds it in.
        dtype = "bfloat16" if tag == "U16" else _SAFETENSORS_TAGS.get(tag, tag)
        known = ARRAY_DTYPES.get(dtype) or PACKED_DTYPES.get(dtype)
        itemsize = known.itemsize if known else None
        if itemsize is not None and stop - start != math.prod(shape) * itemsize:
            raise CheckpointError(f"{damaged}: shape and size of {shown(name)} contradict; download or copy it again")
        tensors[name] = contiguous(file, dtype, shape, 8 + length + start)
    return tensors


def _itemsize(dtype):
    return (ARRAY_DTYPES.get(dtype) or PACKED_DTYPES[dtype]).itemsize


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
        return math.prod(self.shape) * _itemsize(self.dtype)


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
    tensors = sorted(tensors, key=lambda tensor: -_itemsize(tensor.dtype))
    tags = {dtype: tag for tag, dtype in _SAFETENSORS_TAGS.items()}
    header, offset = {"__metadata__": metadata}, 0
    for tensor in tensors:
        span = [offset, offset + tensor.nbytes]
        header[tensor.name] = {"dtype": tags.get(tensor.dtype, tensor.dtype), "shape": list(tensor.shape), "data_offsets": span}
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
