"""Where the lines of a large text file are: an index that is built once and mapped into memory by whoever reads the file.

An annotation file of pretraining has 10^8 lines. The index has four bytes for each, the low half of its offset; the high half
follows from the few places where that wraps around. It stands beside the file as ``NAME.index``, or where that cannot be
written in the user's cache folder, and is built anew when size or time of the file have changed. Small files are indexed in
memory.
"""

import hashlib
import os
import struct
import tempfile

import numpy as np

from paddlemix.errors import DataError
from paddlemix.files import check_regular, open_regular, user_cache

LARGE = 16 << 20  # bytes of a file whose index is kept: below, it is built in the time that opening one takes
MOST = 256 << 20  # bytes of a line; no record is longer

_CHUNK = 1 << 19  # what is scanned stays in the processor's own cache
_HEADER = struct.Struct("<8s5Q16x")  # magic; size and time of the file; lines, wraps, blank lines
_MAGIC = b"pdmxidx1"
_BLANK = np.isin(np.arange(256), list(b" \t\r\n\x0b\x0c"))


class LineIndex:
    """The lines of a file that are not blank; ``len()`` of them.

    Args:
        path: of the file.
        keep: whether an index of a large file is kept on the disk.

    Raises:
        DataError: the file cannot be read.
    """

    def __init__(self, path, keep=True):
        self.path = path
        try:
            status = check_regular(path)
            self._stamp = status.st_size, status.st_mtime_ns
            stored = index_places(path, "index") if keep and status.st_size >= LARGE else ()
            found = next((index for index in map(_Opened(status), stored) if index), None)
            self._low, self._wraps, self._blanks = found or _build(path, status, stored)
        except (OSError, ValueError) as error:  # ValueError: a NUL in the name
            reason = getattr(error, "strerror", None) or error
            raise DataError(f"annotation file {path} cannot be read ({reason}): check the meta file") from None

    def __len__(self):
        return len(self._low)

    def where(self, number):
        """(path, line number from 1) of the ``number``-th line that is not blank."""
        return self.path, number + 1 + int(np.searchsorted(self._blanks, number, side="right"))

    def record(self, number, parse, root):
        """What ``parse`` makes of its bytes and the folder ``root``."""
        return parse(self.read(number), root)

    def stamp(self):
        """What tells this file from others, and from itself at another time."""
        return [os.path.abspath(self.path), *self._stamp]

    def offset(self, number):
        """Where it begins in the file, in bytes."""
        return int(self._low[number]) + (int(np.searchsorted(self._wraps, number, side="right")) << 32)

    def read(self, number):
        """Its bytes.

        Raises:
            DataError: the file is gone or was cut, or the line is longer than any record.
        """
        try:
            with open(self.path, "rb") as file:
                file.seek(self.offset(number))
                line = file.readline(MOST)
        except OSError as error:
            raise DataError(f"annotation file {self.path} cannot be read any more: {error.strerror}") from None
        if len(line) == MOST:
            raise DataError(f"is longer than {MOST >> 20} MB: write one record in each line")
        return line


def index_places(path, name):
    """Where an index called ``name`` of the file at ``path`` may stand, in order: beside it, and in the user's cache folder."""
    path = os.path.abspath(path)
    return f"{path}.{name}", str(user_cache() / "indices" / f"{hashlib.sha256(os.fsencode(path)).hexdigest()[:16]}.{name}")


def write_index(places, write):
    """Write an index whole or not at all to the first of ``places`` that takes it; ``write`` gets the open file.

    Returns:
        The place, or None where there is none.
    """
    for place in places:
        try:
            os.makedirs(os.path.dirname(place), exist_ok=True)
            descriptor, unfinished = tempfile.mkstemp(prefix=".unfinished-", dir=os.path.dirname(place))
        except OSError:
            continue
        try:
            with open(descriptor, "w+b") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(unfinished, 0o644)
            os.replace(unfinished, place)
        except OSError:
            os.unlink(unfinished)
            continue
        except BaseException:
            os.unlink(unfinished)
            raise
        return place
    return None


class _Opened:
    """Opens the index at a path; None where it is missing, damaged, or of the file as it was before."""

    def __init__(self, status):
        self._known = status.st_size, status.st_mtime_ns

    def __call__(self, path):
        try:
            with open_regular(path) as file:
                magic, *known, lines, wraps, blanks = _HEADER.unpack(file.read(_HEADER.size))
                size = os.fstat(file.fileno()).st_size
        except (OSError, struct.error):
            return None
        rest = _HEADER.size + 4 * lines
        if magic != _MAGIC or tuple(known) != self._known or size != rest + 8 * (wraps + blanks):
            return None
        low = np.memmap(path, "<u4", "r", _HEADER.size, (lines,)) if lines else np.empty(0, "<u4")
        others = np.fromfile(path, "<u8", offset=rest)
        return low, others[:wraps], others[wraps:]


def _build(path, status, places):
    """The three arrays of an index, written to the first of ``places`` that takes it."""

    def write(file):
        file.write(bytes(_HEADER.size))
        lines, wraps, blanks = _scan(path, file.write)
        file.write(wraps.tobytes() + blanks.tobytes())
        file.seek(0)
        file.write(_HEADER.pack(_MAGIC, status.st_size, status.st_mtime_ns, lines, len(wraps), len(blanks)))

    place = write_index(places, write)
    opened = place and _Opened(status)(place)
    if opened:
        return opened
    parts = []
    _, wraps, blanks = _scan(path, parts.append)
    return np.frombuffer(b"".join(parts), "<u4"), wraps, blanks


def _scan(path, write):
    """Find the lines of a file; hands the low halves of their offsets, as bytes, to ``write`` in order.

    Returns:
        ``(lines, wraps, blanks)``: how many there are; before which of them the high half of the offset grows by one, and
        before which a blank line stands, uint64 arrays with repetitions.
    """
    buffer = bytearray(_CHUNK)
    whole = np.frombuffer(buffer, np.uint8)
    lines = start = 0  # lines found; where the current one begins
    at = high = 0
    wraps, blanks = [], []
    with open_regular(path) as file:
        status = os.fstat(file.fileno())
        while count := file.readinto(buffer):
            ends = np.flatnonzero(whole[:count] == 10) + (at + 1)
            if at + count >= status.st_size and (not len(ends) or ends[-1] != at + count):
                ends = np.append(ends, at + count)  # the last line has no end of its own
            starts = np.concatenate([[start], ends[:-1]]) if len(ends) else ends
            first = starts - at
            kept = np.ones(len(starts), bool)
            # Only what begins with white space can be blank, and hardly anything does; the first may begin before the chunk.
            doubtful = np.flatnonzero(_BLANK[whole[np.maximum(first, 0)]] | (first < 0))
            for i in doubtful.tolist():
                if first[i] >= 0:
                    kept[i] = bytes(buffer[first[i] : ends[i] - at]).strip() != b""
                else:
                    kept[i] = not _is_blank(file, int(starts[i]), int(ends[i]))
            if not kept.all():
                before = lines + np.cumsum(kept)
                blanks.append(before[~kept])
                starts = starts[kept]
            if len(starts):
                highs = starts >> 32
                if highs[-1] > high:
                    grown = np.diff(np.concatenate([[high], highs]))
                    wraps.append(np.repeat(lines + np.arange(len(starts)), grown))
                    high = int(highs[-1])
                write((starts & 0xFFFFFFFF).astype("<u4").tobytes())
            lines += len(starts)
            start = int(ends[-1]) if len(ends) else start
            at += count
    return lines, *(np.concatenate(values).astype("<u8") if values else np.empty(0, "<u8") for values in (wraps, blanks))


def _is_blank(file, start, end):
    """Whether a line that begins before the current chunk is blank; looks at its first bytes, and at more if need be."""
    descriptor = file.fileno()
    while start < end:
        part = os.pread(descriptor, min(4096, end - start), start)
        if part.strip():
            return False
        if not part:
            break
        start += len(part)
    return True
