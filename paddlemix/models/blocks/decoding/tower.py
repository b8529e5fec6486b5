"""Features of pictures for many sequences: kept by what the pictures look like, computed a slice at a time.

A slice is one block of the vision tower for a few tiles, of whichever pictures they are; between slices the loop lets waiting
steps pass.
"""

from collections import OrderedDict, deque

import numpy as np
import paddle

from ..layers import take_rows
from ..router import RoutedTiles
from .routing import routed

__all__ = ["Tower"]


class Tower:
    """Computes and keeps features.

    Args:
        model: has ``feature_steps(pixels)`` and ``vision_batch``.
        capacity: bytes of features to keep beside those that somebody waits for.
        vision_adapters: names of the adapters that are of the tower too: features under these differ.
    """

    def __init__(self, model, capacity=0, vision_adapters=()):
        self.model, self.capacity, self.vision_adapters = model, capacity, set(vision_adapters)
        # Features [tokens, D] by key, or RoutedTiles where tiles have two forms, the longest unused first.
        self._kept, self._bytes = OrderedDict(), 0
        self._wanted, self._claims = {}, {}  # users of each key, and the keys of each sequence
        self._tiles = deque()  # (key, tile [3, H, W])
        self._parts, self._work, self._batch = {}, None, []

    @property
    def is_busy(self):
        """Whether there is something to compute."""
        return bool(self._work or self._tiles)

    def _key(self, sequence, picture):
        return picture.digest, sequence.adapter if sequence.adapter in self.vision_adapters else None

    def want(self, sequence):
        """Order the features that a sequence still needs; returns how many of its pictures need no computing."""
        before = self._claims.pop(sequence, ())  # let go at the end: what it already has is not to be computed again
        hits, keys = 0, []
        for picture in sequence.pictures:
            key = self._key(sequence, picture)
            covered = picture.start + picture.count <= sequence.computed
            known = key in self._kept or self._wanted.get(key, 0) > 0
            hits += covered or known
            if covered:
                continue
            keys.append(key)
            self._wanted[key] = self._wanted.get(key, 0) + 1
            if key in self._kept:
                self._kept.move_to_end(key)
            elif not known and key not in self._parts:
                tiles = picture.tiles() if callable(picture.tiles) else picture.tiles
                self._parts[key] = [None] * len(tiles)
                self._tiles += [(key, i, tile) for i, tile in enumerate(tiles)]
        if keys:
            self._claims[sequence] = keys
        self._let_go(before)
        return hits

    def release(self, sequence):
        """Take back :meth:`want`: the sequence needs no features any more."""
        self._let_go(self._claims.pop(sequence, ()))

    def _let_go(self, keys):
        for key in keys:
            self._wanted[key] -= 1
            if self._wanted[key]:
                continue
            del self._wanted[key]
            if key in self._parts and not any(entry[0] == key for entry in self._batch):  # nobody waits for it any more
                del self._parts[key]
                self._tiles = deque(entry for entry in self._tiles if entry[0] != key)
        self._shrink()

    def has(self, sequence):
        """Whether all features that the rest of a sequence's prompt needs are there."""
        return all(p.start + p.count <= sequence.computed or self._key(sequence, p) in self._kept for p in sequence.pictures)

    def pictures(self, sequence):
        """What is kept of each picture of a sequence that :meth:`has` all."""
        return [self._kept[self._key(sequence, picture)] for picture in sequence.pictures]

    def features(self, sequence, count):
        """Places and values of the context tokens among the next ``count`` tokens, as :meth:`Stepper.prefill` takes them."""
        first, last = sequence.computed, sequence.computed + count
        places, values = [], []
        for picture in sequence.pictures:
            a, b = max(first, picture.start), min(last, picture.start + picture.count)
            if a < b:
                places.append(np.arange(a - first, b - first))
                kept = self._kept[self._key(sequence, picture)]
                kept = kept if picture.compact is None else kept.features(picture.compact)
                kept = kept if picture.rows is None else take_rows(kept, picture.rows)
                values.append(kept[a - picture.start : b - picture.start])
        return (np.concatenate(places), paddle.concat(values)) if places else None

    @paddle.no_grad()
    def slice(self):
        """Compute one slice."""
        if self._work is None:
            adapter = self._tiles[0][0][1]
            while self._tiles and len(self._batch) < self.model.vision_batch and self._tiles[0][0][1] == adapter:
                if self._batch and self._batch[0][2].shape != self._tiles[0][2].shape:
                    break
                self._batch.append(self._tiles.popleft())
            pixels = np.stack([tile for *_, tile in self._batch]).astype("float32")
            self._work = self.model.feature_steps(paddle.to_tensor(pixels))
        adapter = self._batch[0][0][1]
        with routed([adapter], None):
            features = next(self._work)
        if features is None:
            return
        self._work, batch, self._batch = None, self._batch, []
        for (key, index, _), feature in zip(batch, features):
            parts = self._parts.get(key)
            if parts is None:
                continue
            parts[index] = feature
            if all(part is not None for part in parts):
                del self._parts[key]
                if isinstance(feature, RoutedTiles):
                    self._kept[key] = RoutedTiles.joined(parts)
                else:
                    self._kept[key] = paddle.concat(parts)  # of one part too: it is a part of a larger tensor
                self._bytes += _bytes(self._kept[key])
        self._shrink()

    def _shrink(self):
        for key in list(self._kept):
            if self._bytes <= self.capacity:
                return
            if key not in self._wanted:
                self._bytes -= _bytes(self._kept.pop(key))


def _bytes(kept):
    return kept.nbytes if isinstance(kept, RoutedTiles) else kept.size * kept.element_size()
