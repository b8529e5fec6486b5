"""Keys and values of earlier positions: the cache of one sequence, or of rows that are alike, in floating point or 8 bits."""

import functools

import numpy as np
import paddle

from paddlemix import device
from paddlemix.kernels import fused
from paddlemix.kernels.decoder import KVLayout

from .layers import take_rows

__all__ = ["INT8", "Int8Rows", "KVCache", "layout_of"]

INT8 = "int8"


class Int8Rows:
    """Keys or values of slots in 8 bits, ``[slots, K, D]``, each 32 numbers of a head with a scale of their own; on the host.

    Attributes:
        codes: int8 array ``[slots, K, D]``.
        scales: float32 array ``[slots, K, D / 32]``, or ``[slots, K, 1]`` where 32 does not divide ``D``.
    """

    def __init__(self, slots, heads, width):
        self.codes = np.zeros([slots, heads, width], np.int8)
        self.scales = np.zeros([slots, heads, width // self.group_of(width)], np.float32)

    @staticmethod
    def group_of(width):
        """Numbers that share a scale."""
        return 32 if width % 32 == 0 else width

    @classmethod
    def bytes_of(cls, width):
        """Memory of one head's keys or values at one position."""
        return width + 4 * (width // cls.group_of(width))

    @property
    def shape(self):
        """``[slots, K, D]``, as a tensor has it."""
        return list(self.codes.shape)

    @property
    def nbytes(self):
        """Memory."""
        return self.codes.nbytes + self.scales.nbytes

    def put(self, rows, values):
        """Round ``values [R, K, D]``, float32 or bfloat16, into the slots ``rows``."""
        groups = values.astype("float32").numpy().reshape([-1, *self.scales.shape[1:], self.group])
        top = np.abs(groups).max(-1)
        self.scales[rows] = top / np.float32(127)
        inverse = np.divide(127, top, out=np.zeros_like(top), where=top > 0)
        self.codes[rows] = np.rint(groups * inverse[..., None]).reshape([-1, *self.codes.shape[1:]])

    @property
    def group(self):
        """Numbers that share a scale here."""
        return self.codes.shape[2] // self.scales.shape[2]

    def take(self, rows):
        """The slots ``rows``, a slice or an array, as a float32 tensor ``[R, K, D]``."""
        codes = self.codes[rows]
        values = codes.reshape([*codes.shape[:2], -1, self.group]).astype(np.float32) * self.scales[rows][..., None]
        return paddle.to_tensor(values.reshape(codes.shape))

    def move(self, to, source, rows):
        """Copy the slots ``rows`` of another into the slots ``to``."""
        self.codes[to], self.scales[to] = source.codes[rows], source.scales[rows]

    def grown(self, slots):
        """The same with ``slots`` slots."""
        other = Int8Rows(slots, *self.codes.shape[1:])
        held = slice(0, len(self.codes))
        other.move(held, self, held)
        return other


def layout_of(dtype, keys, values, capacity=0, slots=None):
    """A :class:`~paddlemix.kernels.decoder.KVLayout` of the stores of all layers."""
    if dtype == INT8:
        stores = [(k.codes, v.codes, k.scales, v.scales) for k, v in zip(keys, values)]
    else:
        dtype, stores = str(keys[0].dtype).removeprefix("paddle."), list(zip(keys, values))
    return KVLayout(dtype, stores, capacity, slots)


def _copy(to, rows, source, others):
    """Copy the slots ``others`` of a store into the slots ``rows`` of another, which may be the same."""
    if isinstance(to, Int8Rows):
        to.move(rows, source, others)
    else:
        paddle.scatter_(to, paddle.to_tensor(rows), take_rows(source, others), overwrite=True)


@functools.cache
def _shows_writes(_kind, dtype):
    """Whether what is written into a tensor shows in what was reshaped from it before, which a fallback to CPU may break."""
    store = paddle.zeros([2, 1, 1, 1], dtype)
    seen = store.reshape([1, 2, 1, 1])
    paddle.scatter_(store, paddle.to_tensor([1]), paddle.ones([1, 1, 1, 1], dtype), overwrite=True)
    return bool(seen[0, 1, 0, 0].astype("float32").item() == 1)


class KVCache:
    """Keys and values of every layer, allocated once for ``capacity`` positions and filled in place.

    A layer with a sliding window keeps the positions that its window reaches, and a few before, so that a conversation can
    go back by these (:meth:`reusable`).

    Args:
        config: the language configuration.
        batch: rows ``B``.
        capacity: positions a row can hold.
        dtype: dtype of keys and values, ``int8`` among them; sliding layers, which are short, are then in float32.
    """

    SLACK = 64  # positions before its window that a sliding layer keeps

    def __init__(self, config, batch, capacity, dtype):
        self.config, self.batch, self.capacity, self.length = config, batch, capacity, 0
        self.windows, self.dtype = [config.window(i) for i in range(config.num_hidden_layers)], dtype
        shape = [batch * capacity, config.num_key_value_heads, config.head_dim]
        nothing = [batch, 0, *shape[1:]]

        def store(window):
            if dtype == INT8 and not window:
                return Int8Rows(*shape)
            # An axis of 1, so that one new token a row, [B, 1, K, D], is written as it is.
            room = nothing if window else [shape[0], 1, *shape[1:]]
            return paddle.zeros(room, "float32" if dtype == INT8 else dtype)

        self._keys, self._values = ([store(window) for window in self.windows] for _ in "kv")
        self._rows = self._rows_there = None
        self._seen = {}  # of each layer, its stores and the same in the shape that attention takes

    @property
    def rotary_lengths(self):
        """How long sequences are, which decides the scaling of rotary positions: a number, or one for each new token."""
        return self.length

    def reserve(self, count):
        """Make the next ``count`` positions the ones that :meth:`append` fills in each layer."""
        if self.length + count > self.capacity:
            raise ValueError(f"the KV cache holds {self.capacity} positions; {self.length + count} were asked for")
        self._rows = (np.arange(self.batch)[:, None] * self.capacity + np.arange(self.length, self.length + count)).reshape(-1)
        self._rows_there = None
        self.length += count

    def reusable(self, length):
        """How many of the first ``length`` positions :meth:`truncate` can go back to: all of them, or 0."""
        for window, keys in zip(self.windows, self._keys):
            if window and self.length - keys.shape[1] > max(0, length - window + 1):
                return 0
        return length

    def truncate(self, length):
        """Forget everything from position ``length`` on."""
        gone, self.length = max(0, self.length - length), min(self.length, length)
        for i, window in enumerate(self.windows):
            if window and gone:
                kept = max(0, self._keys[i].shape[1] - gone)
                self._keys[i], self._values[i] = (store[:, :kept].contiguous() for store in self.stores(i))

    def grown(self, capacity):
        """This cache if it holds ``capacity`` positions, else a larger one with the same contents (one row only)."""
        if capacity <= self.capacity:
            return self
        for stores in (self._keys, self._values):
            for i, store in enumerate(stores):
                if isinstance(store, Int8Rows):
                    stores[i] = store.grown(capacity)
                elif not self.windows[i]:
                    room = paddle.zeros([capacity - self.capacity, *store.shape[1:]], store.dtype)
                    stores[i] = paddle.concat([store, room])
        self.capacity = capacity
        return self

    def _like(self, batch, capacity):
        return KVCache(self.config, batch, capacity, self.dtype)

    def repeated(self, times, capacity):
        """Another cache of ``capacity`` positions that holds each row ``times`` times, one after the other."""
        other = self._like(self.batch * times, capacity)
        held = np.arange(self.length)
        sources = (np.arange(self.batch).repeat(times)[:, None] * self.capacity + held).reshape(-1)
        rows = (np.arange(other.batch)[:, None] * capacity + held).reshape(-1)
        whole = np.arange(self.batch).repeat(times)
        for mine, its in ((self._keys, other._keys), (self._values, other._values)):
            for i, store in enumerate(mine):
                if self.windows[i]:
                    its[i] = take_rows(store, whole)
                else:
                    _copy(its[i], rows, store, sources)
        other.length = self.length
        return other

    def reorder(self, parents, start=0):
        """Let row ``i`` go on from row ``parents[i]``: the positions from ``start`` on are copied, those before are alike."""
        moved = np.flatnonzero(parents != np.arange(self.batch))
        if not len(moved) or start >= self.length:
            return
        held = np.arange(start, self.length)
        sources = (parents[moved][:, None] * self.capacity + held).reshape(-1)
        rows = (moved[:, None] * self.capacity + held).reshape(-1)
        for stores in (self._keys, self._values):
            for i, store in enumerate(stores):
                if self.windows[i]:
                    stores[i] = take_rows(store, parents)
                else:
                    _copy(store, rows, store, sources)

    def stores(self, layer):
        """The layer's keys and values on the cache's own memory, ``[B, capacity, K, D]`` each; of a sliding layer only the
        last positions, as many as it has. None where they are in 8 bits."""
        if self.windows[layer]:
            return self._keys[layer], self._values[layer]
        if self.dtype == INT8:
            return None
        shape = [self.batch, self.capacity, *self._keys[layer].shape[-2:]]
        return self._keys[layer].reshape(shape), self._values[layer].reshape(shape)

    def _shown(self, layer):
        """:meth:`stores`, reshaped once where that shows what is written later."""
        stores = self._keys[layer], self._values[layer]
        if not _shows_writes(device.current(), stores[0].dtype):
            return self.stores(layer)
        kept, shown = self._seen.get(layer, (None, None))
        if kept is None or kept[0] is not stores[0] or kept[1] is not stores[1]:
            shown = self.stores(layer)
            self._seen[layer] = stores, shown
        return shown

    def append(self, layer, k, v):
        """Write ``k, v [B, N, K, D]`` of the reserved positions.

        Returns:
            All that they can see, ``[B, S, K, D]``. Where attention takes whole caches, ``S`` may be the capacity: the first
            :attr:`length` positions are what was written.
        """
        if self.windows[layer]:
            return self._slide(layer, k, v)
        stores = self._keys[layer], self._values[layer]
        if self.dtype == INT8:
            seen = (np.arange(self.batch)[:, None] * self.capacity + np.arange(self.length)).reshape(-1)
            shape = [self.batch, self.length, *k.shape[2:]]
            for store, new in zip(stores, (k, v)):
                store.put(self._rows, new)
            return [store.take(seen).reshape(shape).astype(k.dtype) for store in stores]
        if self._rows_there is None:
            self._rows_there = paddle.to_tensor(self._rows)
        for store, new in zip(stores, (k, v)):
            new = new if new.shape[1] == 1 else new.reshape([-1, *store.shape[1:]])
            paddle.scatter_(store, self._rows_there, new, overwrite=True)
        if k.shape[1] == self.length and k.dtype == stores[0].dtype:
            return [k, v]  # there is nothing before
        shown = self._shown(layer)
        # Where slices are copies, reading what is not filled costs less than they do, unless it is most of it.
        if self.capacity <= 3 * self.length and fused.takes_whole_caches(k.dtype):
            return list(shown)
        return [store[:, : self.length] for store in shown]

    @property
    def nbytes(self):
        """Memory of all layers."""
        stores = (*self._keys, *self._values)
        return sum(x.nbytes if isinstance(x, Int8Rows) else x.size * x.element_size() for x in stores)

    def layout(self):
        """A :class:`~paddlemix.kernels.decoder.KVLayout`; None with sliding layers, whose positions have no fixed place."""
        return None if any(self.windows) else layout_of(self.dtype, self._keys, self._values, self.capacity)

    def _slide(self, layer, k, v):
        """:meth:`append` of a sliding layer: what is behind the window and the slack is forgotten."""
        seen, kept = [], self.windows[layer] - 1 + self.SLACK
        for stores, new in ((self._keys, k), (self._values, v)):
            old = stores[layer]
            whole = paddle.concat([old, new.astype(old.dtype)], axis=1) if old.shape[1] else new.astype(old.dtype)
            stores[layer] = whole if whole.shape[1] <= kept else whole[:, -kept:].contiguous()
            seen.append(whole)
        return seen
