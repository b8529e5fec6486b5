"""Groups of ranks and what they tell each other, on the collectives that every backend has.

On gloo each group has a store of its own: groups that share one meet each other's keys there, and with more than two processes
fail to connect. A group can therefore be made without Paddle's global environment, and again with another number of ranks.

:meth:`Group.summed`, :meth:`Group.copied` and :meth:`Group.gathered` are those with gradients: where a product's inputs are
divided its parts are summed, and where its outputs are, every rank takes all inputs, whose gradient is then the sum
(Shoeybi et al., arXiv 1909.08053).
"""

import contextlib
import os
import socket
import sys
import threading
import time
import weakref
from collections import Counter
from concurrent import futures

import numpy as np
import paddle
from paddle.autograd import PyLayer
from paddle.base import core

from paddlemix import device
from paddlemix.errors import ConfigError, ParallelError

__all__ = ["Group", "connect", "free_port", "limited", "now_doing"]

_TIMEOUT = "PADDLEMIX_COLLECTIVE_TIMEOUT"  # of a collective on a device, in seconds; gloo gives up after 30 by itself

_made = 0  # highest number of a group of this process
_doing = ""  # what a message says of when a collective failed


def now_doing(what):
    """Let messages of collectives that fail say ``what`` this process was doing, such as ``step 12``."""
    global _doing
    _doing = what


def free_port():
    """A port of this machine that nobody listens on."""
    with contextlib.closing(socket.socket()) as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def limited(seconds, function):
    """What ``function()`` returns or raises, where it waits for a store: those of Paddle know no limit.

    Raises:
        concurrent.futures.TimeoutError: after ``seconds``; the thread that it waits in is left behind.
    """
    found = futures.Future()

    def run():
        try:
            found.set_result(function())
        except BaseException as error:
            found.set_exception(error)

    threading.Thread(target=run, name="meeting", daemon=True).start()
    return found.result(seconds)


def connect(rank, size, host, port, timeout=120, name="the ranks"):
    """The :class:`Group` of ``size`` ranks that meet at ``host:port``, where the first of them listens.

    Raises:
        ParallelError: they did not all come within ``timeout`` seconds.
    """
    before = os.environ.get("PADDLE_TRAINER_ID")
    os.environ["PADDLE_TRAINER_ID"] = str(rank)  # Paddle's groups read it when they are made
    try:
        # A little longer than the store's own limit, so that a thread is left behind only in what has none.
        return limited(timeout + 2, lambda: _met(rank, size, host, port, timeout, name))
    except (OSError, RuntimeError, SystemError, ValueError, futures.TimeoutError) as error:
        said = f" ({str(error).splitlines()[0][:160]})" if str(error) else ""
        raise ParallelError(
            f"rank {rank} did not meet the others of {size} at {host}:{port} within {timeout} seconds{said}: "
            "look for the first rank that ended"
        ) from None
    finally:
        if before is None:
            del os.environ["PADDLE_TRAINER_ID"]
        else:
            os.environ["PADDLE_TRAINER_ID"] = before


def _met(rank, size, host, port, timeout, name):
    """What :func:`connect` returns.

    A group's number, part of the keys by which ranks find each other, must be new in each process and the same in all: ranks
    that have made different numbers of groups before would wait for each other for ever.
    """
    global _made
    store = core.TCPStore(host, port, rank == 0, size, timeout)
    store.set(f"process/{rank}", f"{socket.gethostname()} {os.getpid()} {_made}".encode())
    processes = [bytes(store.get(f"process/{other}")).decode().rsplit(" ", 2) for other in range(size)]
    _made = 1 + max(int(made) for _, _, made in processes)
    group = Group(rank, size, store, _process_group(store, rank, size, _made), name)
    group.processes = [(machine, process) for machine, process, _ in processes]
    return group


def _process_group(store, rank, size, number):
    from paddle.distributed.collective import _new_process_group_impl

    return _new_process_group_impl(device.collectives(), store, rank, size, f"paddlemix_{number}", None, number)


class Group:
    """Some ranks, of which this process is number ``rank`` of ``size``.

    Attributes:
        calls, bytes: how many collectives of each kind this rank took part in, and the bytes of their tensors.
    """

    def __init__(self, rank, size, store, process_group, name="the ranks"):
        self.rank, self.size, self.store, self.name = rank, size, store, name
        self._group = process_group
        self.calls, self.bytes = Counter(), Counter()
        self._turns = 0
        self.processes = []  # machine and process of each rank
        self.overlaps, self._thread = False, None
        self._latest = None  # on a device: name of the last collective, when it began, and what tells whether it has ended
        if size > 1 and not device.is_cpu():
            watched = weakref.ref(self), paddle.device.get_device(), _limit()
            threading.Thread(target=_watch, args=watched, daemon=True).start()

    @property
    def is_first(self):
        """Whether this is rank 0."""
        return self.rank == 0

    # ------------------------------------------------------------------ without gradients

    def _run(self, name, tensor, *more):
        if self.size == 1:
            return tensor
        self.calls[name] += 1
        self.bytes[name] += tensor.size * tensor.element_size()
        self._call(name, tensor, *more)
        return tensor

    def _call(self, name, *given):
        if self._thread is None:
            self._now(name, *given)
        else:  # behind those that were begun before
            self._thread.submit(self._now, name, *given).result()

    def _later(self, name, tensor, *more):
        """Begin a collective; ``result()`` of what is returned waits for its end."""
        if self.size == 1 or not self.overlaps:
            self._run(name, tensor, *more)
            return _Done()
        self.calls[name] += 1
        self.bytes[name] += tensor.size * tensor.element_size()
        if self._thread is not None:
            return self._thread.submit(self._now, name, tensor, *more)
        return _Task(self, name, self._issued(name, tensor, *more, False))

    def _issued(self, name, *given):
        began = time.monotonic()
        self._latest = name, began, None
        task = getattr(self._group, name)(*given)
        self._latest = name, began, task
        return task

    def overlap(self):
        """From now on what is begun by a ``..._later`` goes on while this process computes.

        gloo holds its caller even where it is asked not to, so that there a thread of our own issues all collectives of the
        group, in one order.
        """
        self.overlaps = self.size > 1
        if self.overlaps and device.is_cpu() and self._thread is None:
            self._thread = futures.ThreadPoolExecutor(1, thread_name_prefix="collectives")

    def _now(self, name, *given):
        began = time.monotonic()
        try:
            self._issued(name, *given, True).wait()
        except (RuntimeError, ValueError, OSError) as error:
            raise ParallelError(self._sentence(name, time.monotonic() - began, str(error))) from None

    def _sentence(self, name, seconds, said):
        """What to say of a collective that failed with what is ``said``; None where it hangs."""
        when = f"{_doing}: {name} among {self.name}" if _doing else f"{name} among {self.name}"
        hung = said is None or seconds > 25
        for _ in range(20):  # who died is known a moment after its connections are
            ended = self._ended()
            if ended or hung:
                break
            time.sleep(0.1)
        if ended:
            return self._ended_sentence(when, ended[0])
        if hung or "imeout" in said or "TIMEOUT" in said:
            return f"{when} timed out after {seconds:.0f} seconds: another rank hangs, or is as much behind"
        said = said.strip().splitlines()[-1][:160] if said.strip() else "no reason given"
        return f"{when} failed ({said}): another rank has ended or cannot be reached; look at the logs of all"

    def _ended(self):
        """Ranks on this machine whose process does not run any more."""
        here = socket.gethostname()
        return [rank for rank, (host, pid) in enumerate(self.processes) if host == here and not _runs(pid)]

    def _ended_sentence(self, when, rank):
        return f"{when} failed: rank {rank} (process {self.processes[rank][1]}) has ended; look at its log for why"

    def all_reduce(self, tensor, op="SUM"):
        """Sum (or ``MAX``) of every rank's ``tensor``, in its place."""
        return self._run("all_reduce", tensor, getattr(core.ReduceOp, op))

    def reduce(self, tensor, to):
        """Sum of every rank's ``tensor``, in its place in rank ``to``."""
        return self._run("reduce", tensor, to, core.ReduceOp.SUM)

    def all_reduce_later(self, tensor):
        """Begin :meth:`all_reduce`; what it gives is in ``tensor`` once ``result()`` of what is returned has come back."""
        return self._later("all_reduce", tensor, core.ReduceOp.SUM)

    def reduce_later(self, tensor, to):
        """The same of :meth:`reduce`."""
        return self._later("reduce", tensor, to, core.ReduceOp.SUM)

    def broadcast_later(self, tensor, source=0):
        """The same of :meth:`broadcast`."""
        return self._later("broadcast", tensor, source)

    def broadcast(self, tensor, source=0):
        """Rank ``source``'s ``tensor`` in the place of every rank's."""
        return self._run("broadcast", tensor, source)

    def all_gather(self, tensor):
        """List of every rank's ``tensor``, which are of one shape."""
        if self.size == 1:
            return [tensor]
        parts = [paddle.empty_like(tensor) for _ in range(self.size)]
        self.calls["all_gather"] += 1
        self.bytes["all_gather"] += tensor.size * tensor.element_size()
        self._call("all_gather", parts, tensor)
        return parts

    def sum_numbers(self, values):
        """Sums of ``values``, a list of numbers, over all ranks: float64 array."""
        values = np.asarray(values, dtype=np.float64)
        if self.size == 1:
            return values
        # Two float32 carry most of a float64 to devices that have none.
        high = values.astype(np.float32)
        tensor = paddle.to_tensor(np.stack([high, (values - high).astype(np.float32)]))
        return self.all_reduce(tensor).numpy().astype(np.float64).sum(0)

    def gather_bytes(self, value):
        """List of every rank's ``value``, bytes."""
        sizes = self.sum_numbers(np.eye(self.size)[self.rank] * len(value)).astype(int)
        padded = np.zeros(max(1, sizes.max()), np.uint8)
        padded[: len(value)] = np.frombuffer(value, np.uint8)
        parts = self.all_gather(paddle.to_tensor(padded))
        return [part.numpy()[:size].tobytes() for part, size in zip(parts, sizes)]

    def meet(self, first_alone=False):
        """Wait, for however long, until all ranks are here; or, with ``first_alone``, until the first is.

        Through the store: a collective on gloo gives up after 30 seconds.
        """
        if self.size == 1:
            return
        key, self._turns = f"meet/{self._turns}", self._turns + 1
        if self.is_first or not first_alone:
            self._counted(key, 1)
        pause, needed, looked = 0.0005, 1 if first_alone else self.size, time.monotonic()
        while self._counted(key) < needed:
            time.sleep(pause)
            pause = min(pause * 1.5, 0.05)
            if time.monotonic() > looked + 2:
                looked = time.monotonic()
                if ended := self._ended():
                    raise ParallelError(self._ended_sentence(f"waiting for {self.name}", ended[0]))

    def _counted(self, key, more=0):
        """The store's number ``key``, after ``more``; the store ends with the first rank."""
        try:
            return self.store.add(key, more)
        except (RuntimeError, ValueError, OSError, SystemError) as error:
            raise ParallelError(self._sentence("waiting", 0, str(error))) from None

    # ------------------------------------------------------------------ with gradients

    def summed(self, x):
        """Sum of every rank's ``x``, of which each rank's gradient is the sum's."""
        if x.stop_gradient or not paddle.is_grad_enabled():
            return self.all_reduce(_own(x))
        return _Summed.apply(x, self)

    def copied(self, *tensors):
        """``tensors``, alike in every rank and used by each for its share: their gradients are summed, in one call."""
        if not paddle.is_grad_enabled() or all(x.stop_gradient for x in tensors):
            return tensors if len(tensors) > 1 else tensors[0]
        found = _Copied.apply(self, *tensors)
        return found if len(tensors) > 1 else found[0]

    def gathered(self, x, widths):
        """Every rank's ``x [..., widths[rank]]`` side by side; the gradient is this rank's part of it."""
        if x.stop_gradient or not paddle.is_grad_enabled():
            return self._gather(x, widths)
        return _Gathered.apply(x, self, widths)

    def _gather(self, x, widths):
        widest = max(widths)
        if x.shape[-1] < widest:
            x = paddle.concat([x, paddle.zeros([*x.shape[:-1], widest - x.shape[-1]], x.dtype)], axis=-1)
        parts = self.all_gather(x.contiguous())
        return paddle.concat([p if w == widest else p[..., :w] for p, w in zip(parts, widths)], axis=-1)


class _Done:
    def result(self):
        """Nothing is left to wait for."""


class _Task:
    """A collective on a stream of its device."""

    def __init__(self, group, name, task):
        self._group, self._name, self._task = group, name, task

    def result(self):
        """Let what is computed from now on wait for it."""
        try:
            self._task.wait()
        except (RuntimeError, ValueError, OSError) as error:
            raise ParallelError(self._group._sentence(self._name, 0, str(error))) from None


def _limit():
    told = os.environ.get(_TIMEOUT, "1800")
    with contextlib.suppress(ValueError):
        if float(told) > 0:
            return float(told)
    raise ConfigError(f"{_TIMEOUT} is '{told}': it must be a number of seconds above 0")


def _watch(group, place, limit):
    """End this process where a collective of ``group``, a weak reference, takes more than ``limit`` seconds on ``place``.

    What is computed there waits for it, and whoever needs that waits with it, so that nobody else could say so.
    """
    device.set_device(place)  # threads have their own
    tells = False  # whether tasks can tell that they have ended
    while (alive := group()) is not None:
        if alive._latest is not None:
            name, began, task = alive._latest
            ended = task is not None and task.is_completed()
            tells = tells or ended
            seconds = time.monotonic() - began
            if (task is None or tells and not ended) and seconds > limit:
                print(f"error: {alive._sentence(name, seconds, None)}", file=sys.stderr, flush=True)
                os._exit(1)
        del alive
        time.sleep(min(5, limit / 4))


def _runs(pid):
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return not os.path.isdir("/proc/self")


def _own(x):
    """A copy of ``x`` that a collective may write into."""
    return (x if x.is_contiguous() else x.contiguous()).clone()


class _Summed(PyLayer):
    @staticmethod
    def forward(ctx, x, group):
        return group.all_reduce(_own(x))

    @staticmethod
    def backward(ctx, gradient):
        return gradient.clone()


class _Copied(PyLayer):
    @staticmethod
    def forward(ctx, group, *tensors):
        ctx.group, ctx.places = group, [x.place for x in tensors]
        return tuple(x.clone() for x in tensors)

    @staticmethod
    def backward(ctx, *gradients):
        # An operator that a device lacks leaves its gradient on the CPU, where the device's collectives cannot go.
        gradients = [g if str(g.place) == str(place) else g.to(place) for g, place in zip(gradients, ctx.places)]
        if len(gradients) == 1:
            return ctx.group.all_reduce(_own(gradients[0]))
        flat = paddle.concat([g.astype("float32").reshape([-1]) for g in gradients])
        parts = ctx.group.all_reduce(flat).split([g.size for g in gradients])
        return tuple(part.reshape(g.shape).astype(g.dtype) for part, g in zip(parts, gradients))


class _Gathered(PyLayer):
    @staticmethod
    def forward(ctx, x, group, widths):
        ctx.group, ctx.widths = group, widths
        return group._gather(x, widths)

    @staticmethod
    def backward(ctx, gradient):
        first = sum(ctx.widths[: ctx.group.rank])
        return gradient[..., first : first + ctx.widths[ctx.group.rank]].contiguous()
