"""Features of many pictures or clips: computed once, some at a time, by one process or several, and kept on disk.

A folder of features holds ``features.npy`` (mapped when read), made of parts that are written as they are done: whoever is
interrupted goes on behind the last part. Rows of pictures that cannot be read are NaN.
"""

import contextlib
import hashlib
import json
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from paddlemix.errors import DataError, ImageError, UserError

CHUNK = 256  # rows of a part
_NAME = "features.npy"


def digest(*values):
    """A short name for what JSON can say, such as how features were made."""
    text = json.dumps(values, sort_keys=True, default=str, ensure_ascii=False)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=12).hexdigest()


def files_digest(paths):
    """A digest of files by their names, sizes and times of change; missing ones count as such."""
    told = []
    for path in paths:
        try:
            state = os.stat(path)
            told.append((str(path), state.st_size, state.st_mtime_ns))
        except OSError:
            told.append((str(path), -1, 0))
    return digest(told)


def model_digest(directory):
    """A digest of a checkpoint: its small files, and of weight files the size and both ends."""
    found = hashlib.blake2b(digest_size=12)
    for name in sorted(os.listdir(directory)):
        path = os.path.join(directory, name)
        if not os.path.isfile(path) or not name.endswith((".json", ".model", ".txt", ".safetensors", ".bin", ".pdparams")):
            continue
        size = os.path.getsize(path)
        found.update(f"{name}:{size}:".encode())
        with open(path, "rb") as file:
            found.update(file.read(1 << 20))
            file.seek(max(0, size - (1 << 20)))
            found.update(file.read(1 << 20))
    return found.hexdigest()


@contextlib.contextmanager
def written(path):
    """A binary file for what shall stand at ``path``: it appears there whole when the block ends, or not at all."""
    folder = os.path.dirname(os.path.abspath(path))
    os.makedirs(folder, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=".", suffix=os.path.basename(path), dir=folder)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise


def compute_features(folder, count, function, processes, dtype="float32", chunk=CHUNK, progress=None):
    """Rows ``[count, E]`` of a folder of features; those that are not there yet are computed.

    Args:
        folder: of these features alone; its name says how they are made (:func:`digest`).
        count: rows.
        function: ``function(start, stop) -> [stop - start, E]``.
        processes: :class:`~paddlemix.training.processes.Processes`; each computes its share of the parts, all return the same.
        dtype: of the rows on disk.
        chunk: rows of a part.
        progress: called with the number of rows after each part.

    Returns:
        A read-only mapped array.

    Raises:
        DataError: there is nothing to compute, or the folder holds something else.
    """
    if count < 1:
        raise DataError("there is nothing to compute features of")
    path = os.path.join(folder, _NAME)
    starts = range(0, count, chunk)
    if not os.path.exists(path):
        error = None
        try:
            for start in starts[processes.rank :: processes.world]:
                part = _part(folder, start)
                if not os.path.exists(part):
                    rows = np.asarray(function(start, min(start + chunk, count)))
                    with written(part) as file:
                        np.save(file, rows.astype(dtype))
                if progress is not None:
                    progress(min(chunk, count - start))
        except UserError as caught:  # the others must not wait for ever
            error = caught
        failed = [told for told in processes.gather(None if error is None else str(error)) if told]
        if error is not None:
            raise error
        if failed:
            raise DataError(f"another process could not go on: {failed[0]}")
    processes.wait()
    if processes.is_first and not os.path.exists(path):
        _merge(folder, path, starts, count, dtype)
    processes.wait(everybody=False)
    return open_features(path, count)


def open_features(path, count=None):
    """The mapped array of features in a file ``[rows, E]``.

    Raises:
        DataError: it is no such file, or has not ``count`` rows.
    """
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} holds no features ({str(error)[:100]}): remove it to compute them again") from None
    if array.ndim != 2 or array.dtype.kind != "f" or (count is not None and len(array) != count):
        raise DataError(f"{path} holds {array.dtype} {list(array.shape)} instead of {count or 'some'} rows: remove it")
    return array


def _part(folder, start):
    return os.path.join(folder, f"part-{start:09d}.npy")


def _merge(folder, path, starts, count, dtype):
    width = np.load(_part(folder, 0), mmap_mode="r", allow_pickle=False).shape[1]
    with written(path) as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": (count, width)}
        )
        for start in starts:
            rows = np.load(_part(folder, start), allow_pickle=False)
            if rows.shape[1] != width:
                raise DataError(f"{_part(folder, start)} has {rows.shape[1]} columns, others {width}: remove {folder}")
            file.write(np.ascontiguousarray(rows, dtype).data)
    for start in starts:
        os.remove(_part(folder, start))


# ---------------------------------------------------------------------- pictures


class PictureFeatures:
    """Features of pictures, as a function of numbers for :func:`compute_features`.

    Args:
        paths: the pictures.
        read: turns a path into pixels ``[3, S, S]``.
        encode: turns pixels ``[B, 3, S, S]`` into features ``[B, E]`` on the host.
        width: ``E``.
        batch_size: pictures at once.

    Attributes:
        bad: ``{number: sentence}`` of pictures that could not be read by this process.
    """

    def __init__(self, paths, read, encode, width, batch_size=16, threads=2):
        self.paths, self.read, self.encode, self.width, self.batch_size = paths, read, encode, width, batch_size
        self.bad, self._pool = {}, ThreadPoolExecutor(threads)

    def _pixels(self, number):
        try:
            return self.read(self.paths[number])
        except ImageError as error:
            self.bad[number] = str(error)
            print(f"left out: {error}", file=sys.stderr)
            return None

    def _ahead(self, spans):
        """Pixels of one span after the other; those of the next are read while one is at work."""
        waiting = None
        for span in spans:
            coming = [self._pool.submit(self._pixels, number) for number in span]
            if waiting is not None:
                yield waiting
            waiting = coming
        if waiting is not None:
            yield waiting

    def __call__(self, start, stop):
        spans = [range(at, min(at + self.batch_size, stop)) for at in range(start, stop, self.batch_size)]
        rows = np.full([stop - start, self.width], np.nan, "float32")
        for span, coming in zip(spans, self._ahead(spans)):
            pixels = {number: future.result() for number, future in zip(span, coming)}
            pixels = {number: array for number, array in pixels.items() if array is not None}
            if pixels:
                rows[np.array([*pixels]) - start] = self.encode(np.stack([*pixels.values()]))
        return rows


def readable(features):
    """Which rows are of pictures that could be read, ``[n]`` bool."""
    return np.isfinite(np.asarray(features[:, 0], "float32"))
