"""The model's part of decoding many: keys and values in pages, and one step for a list of sequences.

A step goes through the same decoder as everything else, with a :class:`PagesView` in the place of its
:class:`~..language.KVCache`: what is asked of a cache is ``reserve(count)``, ``length`` (positions that the rows see),
``rotary_lengths`` (of whole sequences, which decide the scaling of rotary positions), and
``append(layer, k, v)``, which stores the new positions and returns all that the queries see.

An answer must not depend on who else is there, but matrix products choose their way of adding by the number of rows. So they
are computed in multiples of 16 rows, filled up with some that nobody reads, except of a model that computes each row alone
(``rows_alone``: the CPU engine with weights in few bits or a layout that it has a kernel for), for a step and short prompts.
"""

import numpy as np
import paddle
from paddle.nn import functional as F

from paddlemix import device

from ..kv_cache import INT8, Int8Rows, layout_of
from ..last import ROWS
from ..layers import AttentionMask, take_rows
from .routing import routed

__all__ = ["ROWS", "PagedCache", "PagesView", "Stepper"]

MOST_ALONE = 32  # rows that every kind of weights computes alone


class PagedCache:
    """Keys and values of every layer for ``slots`` positions, ``[slots, K, D]`` each, in the order of the pages.

    On CPU in float32, where nothing else can be stored by position, or in 8 bits where ``dtype`` is int8; attention rounds to
    its own dtype anyway.
    """

    number = None  # what the ranks of a divided model call it

    def __init__(self, config, slots, dtype):
        shape = [slots, config.num_key_value_heads, config.head_dim]
        self.dtype = dtype if dtype == INT8 or not device.is_cpu() else "float32"

        def store(_):
            return Int8Rows(*shape) if dtype == INT8 else paddle.zeros(shape, self.dtype)

        layers = range(config.num_hidden_layers)
        self.keys, self.values = (list(map(store, layers)) for _ in "kv")
        self.slides = any(map(config.window, layers))

    @staticmethod
    def bytes_per_position(config, itemsize=4):
        """Memory that one position takes, in bytes; ``itemsize`` is that of a number, None for 8 bits and their scales."""
        head = Int8Rows.bytes_of(config.head_dim) if itemsize is None else config.head_dim * itemsize
        return 2 * config.num_hidden_layers * config.num_key_value_heads * head


class PagesView:
    """The part of a :class:`PagedCache` that one forward pass reads and writes.

    Args:
        cache: the whole.
        new: slots of the new positions, ``[B * N]``.
        seen: slots of all positions that the rows see, ``[B, S]``, the new ones last.
        length: for each new token how long its sequence is, ``[B, N]``.
    """

    is_paged = True

    def __init__(self, cache, new, seen, length):
        self.rotary_lengths, self.length, self.dtype = length, seen.shape[1], cache.dtype
        self._cache, self._shape = cache, list(seen.shape)
        self._new = self._seen = None
        self._given = {"new": new, "seen": seen, "length": length}

    def described(self):
        """What the ranks of a divided model are told of it."""
        return {"pages": self._cache.number, **self._given}

    def reserve(self, count):
        """Nothing to do: the slots are known."""

    def append(self, layer, k, v):
        """Write ``k, v [B, N, K, D]``; return what the rows see, ``[B, S, K, D]`` each."""
        out, cache = [], self._cache
        if cache.dtype == INT8:
            for store, new in ((cache.keys[layer], k), (cache.values[layer], v)):
                store.put(self._given["new"], new)
                seen = store.take(self._given["seen"].reshape(-1)).astype(k.dtype)
                out.append(seen.reshape([*self._shape, *store.shape[1:]]))
            return out
        if self._new is None:
            self._new, self._seen = (paddle.to_tensor(self._given[name].reshape(-1)) for name in ("new", "seen"))
        for store, new in ((cache.keys[layer], k), (cache.values[layer], v)):
            new = new.astype(store.dtype) if new.dtype != store.dtype else new
            paddle.scatter_(store, self._new, new.reshape([-1, *store.shape[1:]]), overwrite=True)
            # By embedding, the one lookup that every backend has natively in every dtype.
            seen = F.embedding(self._seen, store.reshape([store.shape[0], -1]))
            seen = seen.astype(k.dtype) if k.dtype != store.dtype else seen
            out.append(seen.reshape([*self._shape, *store.shape[1:]]))
        return out

    def layout(self):
        """A :class:`~paddlemix.kernels.decoder.KVLayout`; None where layers slide."""
        cache = self._cache
        return None if cache.slides else layout_of(cache.dtype, cache.keys, cache.values, slots=self._given["seen"])


class Stepper:
    """Runs sequences through a language model.

    Args:
        language_model: a :class:`~..language.LanguageModel`, fused or not.
        table: the :class:`~.pages.PageTable` of their pages.
        dtype: of embeddings, and of the cache where the device stores it.
    """

    def __init__(self, language_model, table, dtype="float32"):
        self.model, self.table, self.dtype = language_model, table, dtype
        slots = table.pages * table.page_size
        kept = INT8 if getattr(language_model, "cache_dtype", None) == INT8 else dtype
        self.cache = PagedCache(language_model.config, slots, kept)
        if hasattr(language_model, "adopt_pages"):  # other ranks have pages of their heads too
            language_model.adopt_pages(self.cache, slots, kept)

    def _slots(self, sequence, first, last):
        positions = np.arange(first, last)
        size = self.table.page_size
        return np.asarray(sequence.pages, "int64")[positions // size] * size + positions % size

    @property
    def short(self):
        """Most tokens of a piece of a prompt that are computed as rows, each alone, like those of decoding; 0 for none."""
        return MOST_ALONE if getattr(self.model, "rows_alone", False) else 0

    @paddle.no_grad()
    def decode(self, sequences):
        """Compute the last token of each sequence; the logits that follow it, ``[len(sequences), V]``."""
        if self.short:
            return self.alone([(sequence, 1, None) for sequence in sequences])
        last = [(sequence, len(sequence.tokens) - 1) for sequence in sequences]
        return self.model.lm_head(self._rows(last, -(-len(last) // ROWS) * ROWS))[: len(last)]

    @paddle.no_grad()
    def alone(self, pieces):
        """As :meth:`prefill`, for pieces of at most :attr:`short` tokens, of answers or prompts: each token by itself."""
        parts, room = [[]], MOST_ALONE
        for piece in pieces:
            if piece[1] > room:
                parts.append([])
                room = MOST_ALONE
            parts[-1].append(piece)
            room -= piece[1]
        logits = []
        for part in parts:
            tokens, features, ends = [], [], []
            for sequence, count, own in part:
                if own is not None:
                    features.append((own[0] + len(tokens), own[1]))
                tokens += [(sequence, sequence.computed + i) for i in range(count)]
                ends.append(len(tokens) - 1)
            hidden = self._rows(tokens, len(tokens), features)
            logits.append(self.model.lm_head(hidden if len(ends) == len(tokens) else take_rows(hidden, ends)))
        return logits[0] if len(logits) == 1 else paddle.concat(logits)

    def _rows(self, tokens, rows, features=()):
        """Hidden states ``[rows, D]`` of tokens, (sequence, position) each, of a sequence in a row with those before it;
        ``features`` are (rows, ``[R, D]``) that stand for some of them."""
        longest = max(position for _, position in tokens) + 1
        seen = np.zeros([rows, longest], "int64")
        starts = np.full(rows, longest - 1)
        ids, positions = np.zeros([rows, 1], "int64"), np.zeros([rows, 1], "int64")
        lengths = np.ones([rows, 1], "int64")
        for row, (sequence, position) in enumerate(tokens):
            starts[row] = longest - 1 - position
            seen[row, starts[row] :] = self._slots(sequence, 0, position + 1)
            ids[row], positions[row] = sequence.tokens[position], position
            lengths[row] = max(position + 1, sequence.prompt)
        view = PagesView(self.cache, seen[:, -1], seen, lengths)
        with routed([sequence.adapter for sequence, _ in tokens], rows):
            embeds = self._embed(ids, features)
            return self.model(embeds, positions, AttentionMask(starts), view)[:, -1]

    def _embed(self, ids, features):
        """Embeddings ``[B, N, D]`` of ``ids [B, N]``, with ``features`` at their places among all of these."""
        embeds = self.model.embed(paddle.to_tensor(np.maximum(ids, 0))).astype(self.dtype)  # a feature's need not be a token
        if not features:
            return embeds
        places, values = zip(*features)
        flat = embeds.reshape([-1, embeds.shape[-1]])
        values = paddle.concat(values) if len(values) > 1 else values[0]
        places = paddle.to_tensor(np.concatenate(places))
        return paddle.scatter(flat, places, values.astype(flat.dtype), overwrite=True).reshape(embeds.shape)

    @paddle.no_grad()
    def prefill(self, pieces):
        """Compute the next tokens of some sequences.

        Args:
            pieces: (sequence, number of tokens, features) each. Its pages have room for them; features are (their places among
                these tokens, ``[R, D]``) for context tokens of pictures, or None.

        Returns:
            Logits ``[len(pieces), V]`` after the last token of each.
        """
        # What is computed already is filled up at the left, what is new at the right: rows that begin alike need no mask.
        width = -(-max(count for _, count, _ in pieces) // ROWS) * ROWS
        before = max(sequence.computed for sequence, _, _ in pieces)
        rows = len(pieces)
        ids, positions = np.zeros([rows, width], "int64"), np.zeros([rows, width], "int64")
        seen, lengths = np.zeros([rows, before + width], "int64"), np.ones([rows, width], "int64")
        features, starts, ends = [], [], []
        for row, (sequence, count, own) in enumerate(pieces):
            first, last = sequence.computed, sequence.computed + count
            ids[row, :count] = sequence.tokens[first:last]
            positions[row, :count] = np.arange(first, last)
            seen[row, before - first : before + count] = self._slots(sequence, 0, last)
            lengths[row] = np.maximum(positions[row] + 1, sequence.prompt)
            starts.append(before - first)
            ends.append(count - 1)
            if own is not None:
                features.append((own[0] + row * width, own[1]))
        view = PagesView(self.cache, seen[:, before:].reshape(-1), seen, lengths)
        with routed([sequence.adapter for sequence, _, _ in pieces], None if rows == 1 else rows):
            embeds = self._embed(ids, features)
            hidden = self.model(embeds, positions, AttentionMask(starts), view, positions=np.array(ends))[:, 0]
            padding = [hidden[-1:]] * (-rows % ROWS)
            return self.model.lm_head(paddle.concat([hidden, *padding]) if padding else hidden)[:rows]
