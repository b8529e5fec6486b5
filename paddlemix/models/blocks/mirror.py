"""A divided model whose rank 0 decides alone: what it computes with its layers, the other ranks compute with theirs.

Rank 0 chats, decodes or serves as if the model were whole. The few layers that a chat model is asked for (vision tower,
projector, token embedding, decoder, output head) first tell the workers what is to be computed, then all do it together.
Tensors go by broadcast, everything else in the message: caches are numbers, and what happened to one since the last call goes
along with the next. Each rank holds the keys and values of its own heads.
"""

import contextlib
import functools
import itertools
import threading
import weakref

import numpy as np
import paddle

from paddlemix.errors import ParallelError, UserError

from .decoding.step import PagedCache, PagesView
from .language import KVCache
from .layers import AttentionMask

__all__ = ["follow", "lead"]


def lead(model, workers):
    """Let rank 0's ``model`` take its workers along; they are in :func:`follow`."""
    leader = _Leader(workers)
    language, vision = model.language_model, model.vision_model
    language.new_cache = functools.partial(leader.new_cache, language.config)
    language.adopt_pages = leader.adopt_pages
    language.lm_head.is_led = True
    language.embed = leader.along("embed", language.embed)
    language.forward = leader.decoder(language.forward)
    language.lm_head.forward = leader.along("head", language.lm_head.forward)
    vision.forward = leader.along("vision", vision.forward)
    vision.steps = leader.steps(vision.steps)
    model.mlp1.forward = leader.along("projector", model.mlp1.forward)


def follow(model, inbox):
    """Do what rank 0 does, until it ends and this process with it."""
    follower = _Follower(model, inbox.group)
    with paddle.no_grad():
        while True:
            message = inbox.next()
            try:
                follower.do(message)
            except ParallelError:
                raise
            except UserError:  # rank 0 has the same and tells it
                continue


class _Leader:
    def __init__(self, workers):
        self.workers = workers
        self._numbers, self._changes, self._lock = itertools.count(), [], threading.Lock()

    def note(self, *change):
        """Send ``change``, of a cache, with the next call."""
        with self._lock:
            self._changes.append(change)

    @contextlib.contextmanager
    def _call(self, name, tensors=(), **values):
        with self.workers.turn(), paddle.no_grad():
            with self._lock:
                changes, self._changes = self._changes, []
            described = [[_name(t.dtype), t.shape] for t in tensors]
            with self.workers.call({"do": name, "changes": changes, "tensors": described, **values}):
                yield

    def _send(self, tensors):
        for tensor in tensors:
            self.workers.group.broadcast(tensor)

    def along(self, name, function):
        """``function(x, *numbers)`` together with the workers; ``x`` is a tensor."""

        @functools.wraps(function)
        def together(x, *more):
            if name == "embed":
                with self._call(name, ids=x.numpy()):
                    return function(x)
            x = x.contiguous()
            with self._call(name, [x], more=list(more)):
                self._send([x])
                return function(x, *more)

        return together

    def steps(self, function):
        """A tower's ``steps``, of which each is a call of its own."""

        def together(x, *more):
            number, x = next(self._numbers), x.contiguous()
            with self._call("steps", [x], number=number, more=list(more)):
                self._send([x])
                states = function(x, *more)
            try:
                while True:
                    with self._call("step", number=number):
                        state = next(states, None)
                    if state is None:
                        return
                    yield state
            finally:
                self.note("drop", number)

        return together

    def decoder(self, function):
        """The language model's ``forward``."""

        @functools.wraps(function)
        def together(inputs_embeds, position_ids=None, mask=None, cache=None, picture=None, router_logits=None, positions=None):
            if position_ids is None:
                start = 0 if cache is None else cache.length
                position_ids = np.arange(start, start + inputs_embeds.shape[1], dtype="int64")[None]
            mask, numbers, x = mask or AttentionMask(), np.asarray(position_ids), inputs_embeds.contiguous()
            described = {name: getattr(mask, name) for name in ("starts", "segments", "prefix", "visible")}
            seen = None if cache is None else cache.described()
            with self._call("decoder", [x], position_ids=numbers, mask=described, cache=seen, positions=positions):
                self._send([x])
                return function(x, position_ids, mask, cache, picture, router_logits, positions)

        return together

    def new_cache(self, config, batch, capacity, dtype):
        """See :meth:`~.language.LanguageModel.new_cache`."""
        return _LedCache(self, config, batch, capacity, _name(dtype))

    def adopt_pages(self, pages, slots, dtype):
        """Let the workers make a :class:`PagedCache` like ``pages``."""
        pages.number = next(self._numbers)
        self.note("pages", pages.number, slots, _name(dtype))
        _forget(pages, self, pages.number)


def _name(dtype):
    return str(dtype).removeprefix("paddle.")


def _forget(cache, leader, number):
    weakref.finalize(cache, leader.note, "drop", number).atexit = False


class _Follower:
    """What a worker has: the model, caches by number, and towers in the middle of their steps."""

    def __init__(self, model, group):
        self.model, self.group, self.held = model, group, {}

    def do(self, message):
        for change in message["changes"]:
            self._change(*change)
        tensors = []
        for dtype, shape in message["tensors"]:
            tensors.append(self.group.broadcast(paddle.empty(shape, dtype)))
        getattr(self, f"_{message['do']}")(message, *tensors)

    def _change(self, kind, number, *more):
        if kind == "drop":
            self.held.pop(number, None)
        elif kind == "cache":
            self.held[number] = KVCache(self.model.language_model.config, *more)
        elif kind == "pages":
            self.held[number] = PagedCache(self.model.language_model.config, *more)
        elif kind == "repeated":
            source, *sizes = more
            self.held[number] = self.held[source].repeated(*sizes)
        else:
            getattr(self.held[number], kind)(*more)

    def _embed(self, message):
        self.model.language_model.embed(paddle.to_tensor(message["ids"]))

    def _head(self, message, x):
        self.model.language_model.lm_head(x)

    def _projector(self, message, x):
        self.model.mlp1(x)

    def _vision(self, message, x):
        self.model.vision_model(x, *message["more"])

    def _steps(self, message, x):
        self.held[message["number"]] = self.model.vision_model.steps(x, *message["more"])

    def _step(self, message):
        next(self.held[message["number"]], None)

    def _decoder(self, message, x):
        cache, seen = None, message["cache"]
        if seen is not None and "pages" in seen:
            cache = PagesView(self.held[seen["pages"]], seen["new"], seen["seen"], seen["length"])
        elif seen is not None:
            cache = self.held[seen["number"]]
        mask = AttentionMask(**message["mask"])
        self.model.language_model(x, message["position_ids"], mask, cache, positions=message["positions"])


class _LedCache(KVCache):
    """Rank 0's cache, whose changes the workers hear of."""

    def __init__(self, leader, config, batch, capacity, dtype):
        super().__init__(config, batch, capacity, dtype)
        self._join(leader, "cache", batch, capacity, dtype)

    def _join(self, leader, kind, *more):
        self._leader, self.number = leader, next(leader._numbers)
        leader.note(kind, self.number, *more)
        _forget(self, leader, self.number)

    def described(self):
        """What a message says of it."""
        return {"number": self.number}

    def truncate(self, length):
        if length < self.length:
            self._leader.note("truncate", self.number, length)
        super().truncate(length)

    def grown(self, capacity):
        self._leader.note("grown", self.number, capacity)
        return super().grown(capacity)

    def reorder(self, parents, start=0):
        self._leader.note("reorder", self.number, parents, start)
        super().reorder(parents, start)

    def _like(self, batch, capacity):
        other = _LedCache.__new__(_LedCache)
        KVCache.__init__(other, self.config, batch, capacity, self.dtype)
        return other

    def repeated(self, times, capacity):
        other = super().repeated(times, capacity)
        other._join(self._leader, "repeated", self.number, times, capacity)
        return other
