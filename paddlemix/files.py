"""Reading files that users and checkpoints name: regular files alone, of bounded size, and JSON that is what it should be.

A name can lead to a pipe that nobody writes to, to a device without an end, or to a file of ``/proc`` that is larger than
the machine; opening or reading those would hang or take all memory.

Also writing a text whole, and files of lines that grow from run to run, of which one that was killed leaves a part of a line.
"""

import contextlib
import errno
import json
import os
import stat
from pathlib import Path

from paddlemix.errors import ConfigError, DataError

_KINDS = (
    (stat.S_ISDIR, errno.EISDIR, "it is a folder"),
    (stat.S_ISFIFO, errno.EINVAL, "it is a named pipe, not a file"),
    (stat.S_ISSOCK, errno.EINVAL, "it is a socket, not a file"),
    (stat.S_ISCHR, errno.EINVAL, "it is a device, not a file"),
    (stat.S_ISBLK, errno.EINVAL, "it is a device, not a file"),
)


def user_cache():
    """The folder of the user's cache that is ours; it need not exist.

    Raises:
        RuntimeError: nobody knows the home folder.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "paddlemix"


def check_regular(path):
    """Status of the regular file at ``path``.

    Raises:
        OSError: there is none, or it is a folder, a pipe, a socket or a device; ``strerror`` says so.
    """
    return _regular(os.stat(path), path)


def _regular(status, path):
    for is_kind, number, words in _KINDS:
        if is_kind(status.st_mode):
            raise OSError(number, words, os.fspath(path))
    return status


def open_regular(path):
    """Open a regular file for reading bytes, without ever waiting for somebody to write to it.

    Raises:
        OSError: as :func:`check_regular`, or the system refuses.
    """
    check_regular(path)  # before opening too, since that alone can start something with a device
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)))
        _regular(os.fstat(file.fileno()), path)
        stack.pop_all()
        return file


def read_regular(path, most):
    """Contents of a regular file of at most ``most`` bytes.

    Raises:
        OSError: as :func:`open_regular`, or the file is larger, which ``strerror`` says.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        # Files of /proc have size 0 and some never end; one that grows while it is read is cut.
        content = file.read(size) if size <= most else b""
    if size > most:
        raise OSError(errno.EFBIG, f"it has {size} bytes, and at most {most} make sense", os.fspath(path))
    return content


def read_json(path, error=ConfigError, most=32 << 20, absent="download or copy it there"):
    """The JSON object in a file.

    Args:
        path: file of UTF-8 text.
        error: the class to raise.
        most: largest size in bytes.
        absent: what the message says to do when the file does not exist.

    Raises:
        ConfigError or ``error``: the file is missing, too large, no regular file, no JSON, or holds something else than
            an object.
    """
    try:
        content = read_regular(path, most)
    except FileNotFoundError:
        raise error(f"{path} does not exist: {absent}") from None
    except (OSError, ValueError) as problem:  # ValueError: a NUL in the name
        raise error(f"{path} cannot be read ({getattr(problem, 'strerror', None) or problem}): check the path") from None
    return parse_json(content, path, error)


def parse_json(content, path, error=ConfigError):
    """The JSON object in ``content``, the bytes of the file ``path``; raises as :func:`read_json`."""
    try:
        values = json.loads(content.decode("utf-8"))
    except RecursionError:
        raise error(f"{path} is not valid JSON (it is nested too deep): download or copy it again") from None
    except ValueError as problem:  # also text that is not UTF-8, and numbers of thousands of digits
        raise error(f"{path} is not valid JSON ({problem}): download or copy it again") from None
    if not isinstance(values, dict):
        raise error(f"{path} holds no JSON object: download or copy it again")
    return values


@contextlib.contextmanager
def naming(path):
    """Say of which file it is that there is no more room for it."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, error.filename or str(path)) from None


def write_whole(path, text):
    """Write a text in UTF-8, whole or not at all.

    Raises:
        OSError: it cannot be written; ``filename`` says which.
    """
    unfinished = Path(path).with_name(f".{Path(path).name}.tmp")
    try:
        with naming(path), open(unfinished, "wb") as file:
            file.write(text.encode("utf-8"))
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        unfinished.unlink(missing_ok=True)  # what is there already may need the room
        raise
    os.replace(unfinished, path)


def lock(file, another="another file"):
    """Keep an open file from other runs until it is closed, where the system can do that.

    Args:
        file: open for writing.
        another: what the message says to use instead.

    Raises:
        DataError: another run writes to it.
    """
    with contextlib.suppress(ImportError):
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{file.name} is being written by another run: wait for it, or use {another}") from None


def whole_lines(file):
    """Yield (number, line) of a file that is open for reading and writing bytes; a last line that was cut is taken away."""
    file.seek(0)
    for number, line in enumerate(file, 1):
        if not line.endswith(b"\n"):
            file.truncate(file.tell() - len(line))
            break
        yield number, line
    file.seek(0, os.SEEK_END)


def drop_cut_line(path):
    """Take away a last line that was cut, of the file at ``path`` if there is one."""
    if os.path.exists(path):
        with open(path, "rb+") as file:
            for _ in whole_lines(file):
                pass
