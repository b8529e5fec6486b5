"""The cache of weights that were rounded to few bits, or packed for the CPU's kernels: what took seconds is mapped next time.

An entry is a folder of the user's cache, ``paddlemix/packed/KEY``, with ``entry.json`` and a safetensors file in the layout of
:mod:`~.packed`; or, of packed weights, ``weights.bin``, one after the other as the kernels have them, each from a new page on.
The key is made of the checkpoint's files (:func:`~.files.fingerprint`), what was asked for, and the layout's version. All
entries together have at most 20 GB; those that were not used for longest go first. ``PADDLEMIX_CACHE=off`` neither reads nor
writes. An entry that is not what was written is made anew.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import shutil
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from paddlemix.commands import Parser
from paddlemix.errors import CheckpointError, UserError, command_main
from paddlemix.files import open_regular, read_json, user_cache
from paddlemix.quantised import padded

from .contents import Location, OpenFiles, locate
from .packed import grouped, outgoing, read
from .safetensors_files import OutgoingTensor, write_safetensors

VERSION = 2  # of the layout
MOST_BYTES = 20 << 30
WORTHWHILE = 16 << 20  # bytes of weights below which rounding is as quick as the cache
_SAMPLES = 64
_UNFINISHED, _LONG = ".writing-", 3600  # seconds that nobody writes for
_WEIGHTS, _BLOBS, _PAGE = "model.safetensors", "weights.bin", 4096

_log = logging.getLogger(__name__)


def enabled():
    """Whether the user lets it be used."""
    return os.environ.get("PADDLEMIX_CACHE", "").lower() not in ("off", "0", "no", "false")


def folder():
    """Where the entries are; it need not exist.

    Raises:
        RuntimeError: nobody knows the home folder.
    """
    return user_cache() / "packed"


def key_of(checkpoint, bits):
    """Name of the entry for a :class:`~.contents.Checkpoint` with ``bits``, ``{parameter: 8 or 4}``."""
    made_of = [VERSION, sorted(map(str, checkpoint.fingerprints.values())), sorted(bits.items())]
    return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:32]


def find(key, shapes):
    """The weights of an entry, mapped, ``{parameter: Quantised}``; None where there is none that is whole.

    Args:
        key: of :func:`key_of`.
        shapes: ``{parameter: (out, in, bits)}`` of all that must be in it.
    """

    def take(path, known):
        found = grouped(locate([path]), None, lambda *values: Location(*values[:4], packed=values[4]))
        if found.keys() != shapes.keys():
            raise CheckpointError(f"{path} has other weights")
        weights = {}
        with OpenFiles() as files:
            for name, location in found.items():
                out, inputs, bits = shapes[name]
                form = location.packed
                if form is None or location.shape != (out, padded(inputs, form.group)) or form.bits != bits:
                    raise CheckpointError(f"{path}: {name} is of another shape")
                weights[name] = dataclasses.replace(read(location, files.get, name), inputs=inputs)
        return weights

    return _taken(key, _WEIGHTS, take)


def _taken(key, name, take):
    """``take(path of the entry's file, what entry.json says)``; None where there is no entry that is whole."""
    entry = _entry(key) if enabled() else None
    if entry is None or not entry.exists():
        return None
    try:
        known, path = read_json(str(entry / "entry.json"), CheckpointError), str(entry / name)
        if known.get("digest") != _digest(path):
            raise CheckpointError(f"{path} is not what was written")
        found = take(path, known)
        os.utime(entry)  # it was used now
    except (OSError, UserError, ValueError) as error:
        _log.warning("the cache's entry %s is damaged and made anew: %s", key, error)
        shutil.rmtree(entry, ignore_errors=True)
        return None
    return found


def store_later(key, weights):
    """Write an entry in the background; the program does not end before it is there.

    Args:
        key: of :func:`key_of`.
        weights: ``{parameter: Quantised}``.

    Returns:
        The thread, or None where it is not worth it.
    """
    entry = _entry(key)
    if not enabled() or entry is None or sum(weight.nbytes for weight in weights.values()) < WORTHWHILE:
        return None
    thread = threading.Thread(target=_store, args=(entry, weights), name="cache")
    thread.start()
    return thread


def _store(entry, weights):
    def write(target):
        tensors = [
            OutgoingTensor(key, dtype, array.shape, lambda array=array: [np.ascontiguousarray(array)])
            for name, weight in weights.items()
            for key, dtype, array in outgoing(name, weight)
        ]
        write_safetensors(str(target), tensors, {"format": "pt"}, MOST_BYTES)
        return {"digest": _digest(str(target / _WEIGHTS))}

    _add(entry, sum(weight.nbytes for weight in weights.values()), write)


def _add(entry, size, write):
    """Add an entry of ``size`` bytes; ``write(folder)`` writes its file and gives what ``entry.json`` says of it."""
    with contextlib.suppress(OSError, CheckpointError):  # a full disk costs nothing but the next load's time
        entry.parent.mkdir(parents=True, exist_ok=True)
        if size > MOST_BYTES or shutil.disk_usage(entry.parent).free < 2 * size:
            return
        make_room(size)
        with tempfile.TemporaryDirectory(prefix=_UNFINISHED, dir=entry.parent) as room:
            target = Path(room, "entry")
            target.mkdir()
            written = {**write(target), "made": int(time.time()), "version": VERSION}
            (target / "entry.json").write_text(json.dumps(written), encoding="utf-8")
            os.rename(target, entry)  # fails where another process was quicker, which is as well


def find_blobs(key):
    """The arrays of an entry of packed weights, mapped, uint8 each and in order; None where there is none that is whole."""

    def take(path, known):
        sizes = known.get("sizes")
        if not isinstance(sizes, list) or not all(type(size) is int and 0 < size <= MOST_BYTES for size in sizes):
            raise CheckpointError(f"{path}: nobody knows its parts")
        with open_regular(path) as file:
            whole = os.fstat(file.fileno()).st_size
            if whole != sum(map(_pages, sizes)):
                raise CheckpointError(f"{path} is not what was written")
            content = np.asarray(np.memmap(file, np.uint8, "r"))
        starts = np.cumsum([0, *map(_pages, sizes)])
        return [content[start : start + size] for start, size in zip(starts, sizes)]

    return _taken(key, _BLOBS, take)


def store_blobs_later(key, layers):
    """Write an entry of packed weights in the background; the program does not end before it is there.

    Args:
        key: of :func:`key_of`.
        layers: what has ``packed``, a uint8 array; all are kept until they are written.

    Returns:
        The thread, or None where it is not worth it.
    """
    entry = _entry(key)
    size = sum(_pages(layer.packed.nbytes) for layer in layers)
    if not enabled() or entry is None or size < WORTHWHILE:
        return None

    def write(target):
        with open(target / _BLOBS, "wb") as file:
            for layer in layers:
                file.write(layer.packed)
                file.write(bytes(_pages(layer.packed.nbytes) - layer.packed.nbytes))
        return {"digest": _digest(str(target / _BLOBS)), "sizes": [layer.packed.nbytes for layer in layers]}

    thread = threading.Thread(target=_add, args=(entry, size, write), name="cache")
    thread.start()
    return thread


def _pages(size):
    """``size`` up to the end of its last page."""
    return -(-size // _PAGE) * _PAGE


def entries():
    """``[(last use, bytes, path)]`` of all entries, the longest unused first."""
    found = []
    try:
        paths = list(folder().iterdir())
    except (OSError, RuntimeError):
        return found
    for path in paths:
        with contextlib.suppress(OSError):  # another process removed it
            found.append((path.stat().st_mtime, sum(file.stat().st_size for file in path.rglob("*") if file.is_file()), path))
    return sorted(found)


def make_room(size):
    """Remove entries until there is room for ``size`` bytes more, and what programs that were killed have left unfinished."""
    found = entries()
    for used, _, path in found:
        if path.name.startswith(_UNFINISHED) and time.time() - used > _LONG:
            shutil.rmtree(path, ignore_errors=True)
    there = [entry for entry in found if not entry[2].name.startswith(".")]
    total = sum(count for _, count, _ in there)
    for _, count, path in there:
        if total + size <= MOST_BYTES:
            break
        shutil.rmtree(path, ignore_errors=True)
        total -= count


def clear():
    """Remove all entries; how many bytes they had."""
    there = entries()
    for _, _, path in there:
        shutil.rmtree(path, ignore_errors=True)
    return sum(count for _, count, _ in there)


def _entry(key):
    try:
        return folder() / key
    except RuntimeError:
        return None


def _digest(path):
    """Of a file's size, its header and samples of the rest: a whole digest would take as long as rounding."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        digest.update(f"{size}".encode())
        digest.update(os.pread(file.fileno(), 1 << 16, 0))
        for i in range(_SAMPLES + 1):
            digest.update(os.pread(file.fileno(), 1024, max(0, i * size // _SAMPLES - 1024)))
    return digest.hexdigest()


@command_main
def main(argv=None):
    """The command line."""
    parser = Parser(
        description="Show or clear the cache of weights that were rounded to 8 and 4 bits, or packed for the CPU's kernels."
    )
    parser.add_argument("--clear", action="store_true", help="remove all entries")
    args = parser.parse_args(argv)
    if args.clear:
        print(f"removed {clear() / 1e9:.2f} GB")
        return
    there = entries()
    for used, size, path in there:
        print(f"{path.name}  {size / 1e9:7.2f} GB  used {time.strftime('%Y-%m-%d %H:%M', time.localtime(used))}")
    total = sum(size for _, size, _ in there) / 1e9
    state = "" if enabled() else "; PADDLEMIX_CACHE=off: not in use"
    print(f"{len(there)} entries, {total:.2f} of {MOST_BYTES / 1e9:.0f} GB, in {folder()}{state}")


if __name__ == "__main__":
    main()
