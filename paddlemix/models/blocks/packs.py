"""Weights as the engine's kernels have them, kept in the user's cache, so that a model is mapped the next time.

An entry (:mod:`paddlemix.checkpoints.cache`) is of one checkpoint's files, one dtype, and one way to pack: the kernels'
library, the processor's instructions and the number of threads.
"""

import hashlib
from pathlib import Path

import numpy as np
from paddle import nn

from paddlemix.checkpoints import cache
from paddlemix.checkpoints.contents import OpenFiles
from paddlemix.kernels import cpu as kernels

from .layers import Linear

_STACKS = ("vision_model.encoder.layers.", "language_model.model.layers.", "mlp1.", "language_model.lm_head")
_EMBEDDINGS = "language_model.model.embed_tokens.weight"


class Packs:
    """The packed weights of a model that is about to be loaded, or room for them.

    Args:
        model: a chat model without weights of use yet.
        checkpoint: a :class:`~paddlemix.checkpoints.checkpoint.Checkpoint` of all that is loaded.
        dtype: of the engine.

    Attributes:
        embeddings: ``[V, D]`` rows of token embeddings mapped from the checkpoint, or None where they are not in one piece.
    """

    def __init__(self, model, checkpoint, dtype):
        self._model, self._checkpoint, self._dtype = model, checkpoint, dtype
        self._made, self._key, self._blobs, self.embeddings = [], None, None, None

    def look(self, bits):
        """Look for the weights; the names of the parameters that need not be read.

        Args:
            bits: ``{parameter: 8 or 4}`` of those in few bits, which are not kept here.
        """
        if not cache.enabled():
            return ()
        own = hashlib.sha256(b"".join(Path(__file__).with_name(name).read_bytes() for name in ("engine.py", "packs.py")))
        way = f"packed {self._dtype} {kernels.identity()} {own.hexdigest()}"
        self._key = cache.key_of(self._checkpoint, {**bits, way: 0})
        found = cache.find_blobs(self._key)
        if found is None:
            return ()
        self._blobs = iter(found)
        names = {f"{path}.weight" for path, layer in self._model.named_sublayers() if type(layer) in (Linear, nn.Linear)}
        skip = {name for name in names if name.startswith(_STACKS) and not name.endswith(".mlp.gate.weight")} - set(bits)
        if _EMBEDDINGS not in bits:
            self.embeddings = _mapped(self._checkpoint)
            skip |= {_EMBEDDINGS} if self.embeddings is not None else set()
        return skip

    @property
    def hit(self):
        """Whether the weights are there."""
        return self._blobs is not None

    def linear(self, shape, bias, dtype, make):
        """The next :class:`~paddlemix.kernels.cpu.PackedLinear`, of ``shape`` (in, out): mapped, or what ``make()`` gives."""
        if self.hit:
            return kernels.PackedLinear.mapped(next(self._blobs), shape, bias, dtype)
        layer = make()
        if self._key is not None:
            self._made.append(layer)
        return layer

    def store_later(self):
        """Keep what was made, in the background; the thread, or None."""
        made, self._made = self._made, []
        return cache.store_blobs_later(self._key, made) if made else None


def _mapped(checkpoint):
    """The token embeddings of a checkpoint where they lie in its file; None where they are not as they are looked up."""
    found = [source for source in checkpoint.sources if source.weight.name == _EMBEDDINGS]
    if len(found) != 1:
        return None
    (source,) = found
    location, rows = source.location, source.weight.shape[0]
    dtype = {"bfloat16": np.uint16, "float32": np.float32}.get(location.dtype)
    plain = location.scales is None and location.packed is None and tuple(location.shape) == tuple(source.weight.shape)
    if dtype is None or not plain or source.is_share or [tuple(run) for run in source.part.runs] != [(0, 0, rows)]:
        return None
    with OpenFiles() as files:
        offset = files.get(location).offset
    return None if offset is None else np.asarray(np.memmap(location.path, dtype, "r", offset, tuple(location.shape)))
