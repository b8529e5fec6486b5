"""LLaVA's records: reading them, making samples, and the order of batches of one kind."""

import functools

import numpy as np

from paddlemix.datasets.records import Record, Source, image_paths, load_object, read_meta
from paddlemix.datasets.samplers import SampleOrder
from paddlemix.errors import DataError, UserError
from paddlemix.models.blocks.conversation import IGNORE_INDEX
from paddlemix.models.internvl_llava.encoding import encode_record
from paddlemix.models.internvl_llava.tokenization import IMAGE_TOKEN_INDEX
from paddlemix.processors.clip import process_images

__all__ = ["LlavaEncoder", "ModalityOrder", "parse_llava", "read_sources", "words"]


def parse_llava(line, root=""):
    """A record of LLaVA's JSON: ``{"conversations": [...], "image": path}``, the picture being optional.

    Raises:
        DataError: what is wrong, without saying where.
    """
    record = load_object(line)
    turns = record.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise DataError("needs 'conversations', a list of turns with 'from' and 'value'")
    images = image_paths(record, root)
    if len(images) > 1:
        raise DataError(f"has {len(images)} pictures: a record of LLaVA's has one, so make several records of it")
    return Record(conversations=turns, images=images)


def read_sources(data_path=None, image_folder=None, meta_path=None):
    """The data sets of a run: one JSON file with its folder of pictures, or those of a meta file.

    Raises:
        DataError: a file cannot be read.
    """
    if meta_path is not None:
        return read_meta(meta_path, parse_llava)
    return [Source("data", image_folder or "", data_path, parse=parse_llava)]


class LlavaEncoder:
    """Makes samples of records.

    Args:
        tokenizer: of the model.
        version: how text is written, see :func:`~paddlemix.models.internvl_llava.encoding.encode_record`.
        image_size: side of a picture in pixels.
        image_tokens: tokens of a picture.
        max_length: longest sample in ids, a picture being one.
        aspect_ratio: ``pad`` or ``square``.
        start_end: whether pictures stand between tokens of their own.
    """

    def __init__(self, tokenizer, version, image_size, image_tokens, max_length=2048, aspect_ratio="square", start_end=False):
        self.tokenizer, self.version, self.start_end = tokenizer, version, start_end
        self.image_size, self.image_tokens = image_size, image_tokens
        self.max_length, self.aspect_ratio = max_length, aspect_ratio

    def encode_text(self, record):
        """``(input_ids, labels)`` of a record, cut to the longest sample; a picture is one id.

        Raises:
            UserError: the record cannot be used.
        """
        values = {"conversations": record.conversations, "image": record.images}
        ids, labels = encode_record(values, self.tokenizer, self.version, self.start_end)
        ids, labels = ids[: self.max_length], labels[: self.max_length]
        if record.images and IMAGE_TOKEN_INDEX not in ids:
            raise DataError(f"has no place for its picture within model_max_length ({self.max_length}): raise it")
        if all(label == IGNORE_INDEX for label in labels[1:]):
            raise DataError(f"has no token of an answer within model_max_length ({self.max_length}): raise it")
        return ids, labels

    def encode(self, record, augment=False, max_dynamic_patch=None, rng=None):
        """The sample of a record; see :meth:`~paddlemix.datasets.internvl2.SampleEncoder.encode`."""
        ids, labels = map(np.array, self.encode_text(record))
        counts = np.where(ids == IMAGE_TOKEN_INDEX, self.image_tokens, 1)
        ids, labels = np.repeat(ids, counts), np.repeat(labels, counts)
        pixels = process_images(list(record.images), self.image_size, self.aspect_ratio)
        return {
            "input_ids": ids.astype(np.int64),
            "labels": labels.astype(np.int64),
            "pixel_values": pixels,
            "image_flags": np.ones(len(pixels), dtype=np.int64),
            "min_length": len(ids),
        }


def words(dataset, cache=None):
    """What samples cost: words of their text, negative for those without a picture, and pictures; two int64 arrays.

    The original's measure. A record that cannot be read counts as nothing.
    """
    lengths, pictures = [], []
    for source in dataset.sources:
        found = [_words(source, index) for index in range(source.num_records)]
        repeats = len(source) // source.num_records
        lengths += [count if has_picture else -count for count, has_picture in found] * repeats
        pictures += [has_picture for _, has_picture in found] * repeats
    return np.array(lengths, dtype=np.int64), np.array(pictures, dtype=np.int64)


def _words(source, index):
    try:
        record = source.read(index)
        return sum(len(turn["value"].split()) for turn in record.conversations), int(bool(record.images))
    except (UserError, TypeError, KeyError, AttributeError):
        return 0, 0


class ModalityOrder(SampleOrder):
    """A stream whose batches are of one kind, with pictures or without; the last incomplete ones of both come together.

    Args:
        sizes, seed: as for :class:`SampleOrder`.
        has_picture: of each sample.
        batch: samples that all processes compute at once.
    """

    def __init__(self, sizes, seed, has_picture, batch):
        super().__init__(sizes, seed)
        self._has_picture, self._batch = np.asarray(has_picture, dtype=bool), batch
        self._epoch = functools.lru_cache(maxsize=2)(self._by_kind)

    def indices(self, epoch, places):
        """See :meth:`SampleOrder.indices`."""
        return self._epoch(epoch)[places]

    def _by_kind(self, epoch):
        order = super().indices(epoch, np.arange(len(self)))
        batches, rest = [], []
        for kind in (True, False):
            own = order[self._has_picture[order] == kind]
            whole = len(own) // self._batch * self._batch
            batches += np.split(own[:whole], whole // self._batch) if whole else []
            rest.append(own[whole:])
        shuffled = np.random.default_rng([self.seed, epoch, 1]).permutation(len(batches))
        return np.concatenate([*(batches[i] for i in shuffled), *rest]).astype(np.int64)
