"""Ranks that a process starts itself, so that nobody types a launcher: it is rank 0, and its workers do as it says.

What a worker waits for comes through a pipe, its standard input, so that it waits for as long as it takes and costs nothing
meanwhile, and so that it ends when rank 0 does, in whatever way: then the pipe is closed. It says that it is ready, or what is
wrong, on its standard output. Messages are JSON with arrays behind it, never pickles.
"""

import contextlib
import json
import os
import queue
import signal
import struct
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import numpy as np

import paddlemix
from paddlemix import errors
from paddlemix.errors import ParallelError

from .groups import connect, free_port

__all__ = ["Inbox", "Workers", "launched"]

_HEAD = struct.Struct("<QQ")
_ENDING = 5  # seconds that workers have to end by themselves


def launched():
    """How many ranks a launcher has started, of which this process is one; 1 without."""
    return int(os.environ.get("PADDLE_TRAINERS_NUM", "1"))


# ---------------------------------------------------------------------- messages


def pack(value):
    """Bytes of ``value``: what JSON holds, and arrays of NumPy in it."""
    arrays = []

    def replace(item):
        if isinstance(item, np.ndarray):
            arrays.append(np.ascontiguousarray(item))
            return {"array": [arrays[-1].dtype.str, list(item.shape)]}
        if isinstance(item, np.generic):
            return item.item()
        raise TypeError(f"{type(item).__name__} cannot be sent to a rank")

    text = json.dumps(value, default=replace).encode()
    body = b"".join(array.tobytes() for array in arrays)
    return _HEAD.pack(len(text), len(body)) + text + body


def unpack(file):
    """The next value that :func:`pack` made; None at the end of ``file``."""
    head = file.read(_HEAD.size)
    if len(head) < _HEAD.size:
        return None
    sizes = _HEAD.unpack(head)
    text, body = (file.read(size) for size in sizes)
    if len(body) < sizes[1]:
        return None
    at = 0

    def restore(item):
        nonlocal at
        if set(item) != {"array"}:
            return item
        dtype, shape = np.dtype(item["array"][0]), item["array"][1]
        count = int(np.prod(shape))
        array = np.frombuffer(body, dtype, count, at).reshape(shape).copy()
        at += array.nbytes
        return array

    return json.loads(text, object_hook=restore)


# ---------------------------------------------------------------------- rank 0


class Workers:
    """The other ranks of ``size``, started by this process, which is rank 0.

    Args:
        size: ranks with this one.
        module: run with ``python -m``; it makes an :class:`Inbox`.
        settings: what it is told at its start, as for JSON.

    Attributes:
        group: the :class:`~.groups.Group`.
        ends_program: whether a worker that dies ends this program with one line, or with an error at the next call.

    Raises:
        ParallelError: they cannot be started.
    """

    def __init__(self, size, module, settings):
        self.size, self.group, self.ends_program = size, None, False
        self._lock, self._closing, self.lost = threading.RLock(), threading.Event(), None
        port = free_port()
        root = str(Path(paddlemix.__file__).parents[1])
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {"GLOG_minloglevel": "2", **os.environ, "PYTHONPATH": path}
        threads = max(1, (os.cpu_count() or 1) // size)
        environment.setdefault("OMP_NUM_THREADS", str(threads))
        # The command's own line follows, so that whoever looks for it finds every rank.
        quiet = ["-W", "ignore:No ccache found"]  # of which Paddle speaks at its start
        command = [sys.executable, *quiet, "-m", module, "--", *sys.argv]
        self.processes = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) for _ in range(1, size)
        ]
        self._finalizer = weakref.finalize(self, _end, self.processes, self._closing)
        for rank in range(1, size):
            threading.Thread(target=self._watch, args=(rank,), daemon=True).start()
        try:
            self.tell(*({**settings, "rank": rank, "size": size, "port": port} for rank in range(1, size)))
            self.group = connect(0, size, "127.0.0.1", port, name="tensor parallel")
        except BaseException:
            self.close()
            raise

    def tell(self, *messages):
        """Send a message to each worker, or one to all."""
        packed = [pack(message) for message in messages]
        for i, process in enumerate(self.processes):
            try:
                process.stdin.write(packed[i if len(packed) > 1 else 0])
                process.stdin.flush()
            except (OSError, ValueError):
                self._fail(i + 1)

    def wait_ready(self):
        """Wait until every worker has said that it is ready.

        Raises:
            UserError: one cannot be; the error is its own.
        """
        for rank, process in enumerate(self.processes, 1):
            answer = unpack(process.stdout)
            if answer is None:
                self._fail(rank)
            elif "error" in answer:
                self.close()
                kind = getattr(errors, answer["kind"], ParallelError)
                raise kind(answer["error"])

    def turn(self):
        """A context that one thread at a time is in."""
        return self._lock

    @contextlib.contextmanager
    def call(self, message):
        """Tell all workers, and compute in the block what they compute; to be called in one's :meth:`turn`.

        Raises:
            ParallelError: a worker has ended.
        """
        if self._closing.is_set():
            raise ParallelError(self.lost or "this model is closed: load it again")
        self.tell(message)
        try:
            yield
        except BaseException as error:
            if isinstance(error, errors.UserError) and not isinstance(error, ParallelError):
                raise  # what is wrong with an input is so in every rank
            if not isinstance(error, KeyboardInterrupt):
                self._fail_if_one_ended()
            self.close()  # who is in the middle of a call cannot follow any more
            raise

    def _fail_if_one_ended(self):
        for patience in (1, 0):  # a collective that breaks off may tell sooner than the system
            for rank, process in enumerate(self.processes, 1):
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=patience / self.size)
                    self._fail(rank)

    def _watch(self, rank):
        process = self.processes[rank - 1]
        process.wait()
        if not self._closing.is_set() and self.ends_program:
            print(f"error: {self._sentence(rank)}", file=sys.stderr, flush=True)
            self.close()
            os._exit(1)

    def _sentence(self, rank):
        process = self.processes[rank - 1]
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=5)
        code = process.returncode
        how = f"by {signal.Signals(-code).name}" if code is not None and code < 0 else f"with status {code}"
        return (
            f"rank {rank} of {self.size} (process {process.pid}) ended {how}: look for its message above, or for lack of memory"
        )

    def _fail(self, rank):
        self.lost = self.lost or self._sentence(rank)
        if self.ends_program:
            threading.Event().wait(2)  # the watcher says so, and ends the program
        self.close()
        raise ParallelError(self.lost)

    def close(self):
        """End the workers; without effect the second time."""
        self._finalizer()


def _end(processes, closing):
    closing.set()
    for process in processes:
        with contextlib.suppress(OSError, ValueError):
            process.stdin.close()
    for process in processes:
        try:
            process.wait(timeout=_ENDING)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


# ---------------------------------------------------------------------- the others


class Inbox:
    """What rank 0 tells this worker. When it has gone, in whatever way, this process ends, even in the middle of a collective.

    Attributes:
        settings: what was told first.
        group: the :class:`~.groups.Group`, once :meth:`join` is called.
    """

    def __init__(self):
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal: rank 0 decides
        self._out = os.fdopen(os.dup(1), "wb")
        os.dup2(2, 1)  # what libraries print must not get between messages
        self._messages = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()
        self.settings = self.next()

    def _read(self):
        while (message := unpack(sys.stdin.buffer)) is not None:
            self._messages.put(message)
        os._exit(0)

    def next(self):
        """The next message, for however long it takes."""
        return self._messages.get()

    def join(self):
        """Meet the other ranks."""
        told = self.settings
        self.group = connect(told["rank"], told["size"], "127.0.0.1", told["port"], name="tensor parallel")
        return self.group

    def ready(self, error=None):
        """Say that this rank is ready, or what is wrong."""
        answer = {} if error is None else {"error": str(error), "kind": type(error).__name__}
        self._out.write(pack(answer))
        self._out.flush()
