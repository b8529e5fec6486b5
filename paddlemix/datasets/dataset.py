"""The data set that a trainer draws samples from, and what becomes of records that cannot be used."""

import hashlib
import json
import os

import numpy as np

from paddlemix.errors import DataError, UserError

from .records import picture_size, read_meta

# So many unusable records in a row are no accident.
_MOST_IN_A_ROW = 20


class InternVLDataset:
    """Samples of several sources, one after the other.

    An index is an integer, or ``(epoch, integer)``: what is random about a sample is decided by the seed, its epoch and its
    index alone, so that it does not matter which process loads it, or whether the run was interrupted before.

    A record that cannot be used is replaced by the next that can, or skipped. The sample says so (``bad``), and
    :class:`BadSampleLog` keeps count in the process that trains.

    Args:
        sources: list of :class:`Source`.
        encoder: :class:`SampleEncoder`.
        seed: 0 or any positive integer.
        skip: whether nothing takes the place of a record that cannot be used: its sample has ``name`` and ``bad`` alone.
    """

    def __init__(self, sources, encoder, seed=0, skip=False):
        self.sources, self.encoder, self.seed, self.skip = sources, encoder, seed, skip
        self.same_every_epoch = False  # whether what is random about a sample is decided for all epochs
        self._ends = np.cumsum([len(source) for source in sources])

    @classmethod
    def from_meta(cls, path, encoder, seed=0):
        """The data set of a meta file.

        Raises:
            DataError: see :func:`read_meta`.
        """
        return cls(read_meta(path), encoder, seed)

    def __len__(self):
        return int(self._ends[-1])

    def __getitem__(self, key):
        """The sample of :meth:`SampleEncoder.encode` with three entries more.

        ``name`` is where the record stands, ``file:line``, ``index`` its index. ``bad`` lists what was passed over on the way
        to it, dictionaries with ``dataset``, ``file``, ``line`` and ``reason``.

        Raises:
            DataError: this record and many after it cannot be used.
            IndexError: there is no such index.
        """
        epoch, index = key if isinstance(key, tuple) else (0, key)
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is not in 0..{len(self) - 1}")
        bad = []
        for step in range(min(_MOST_IN_A_ROW, len(self))):
            current = (index + step) % len(self)
            source, place = self.locate(current)
            try:
                record = source.read(place)
                rng = np.random.default_rng([self.seed, 0 if self.same_every_epoch else epoch, current])
                sample = self.encoder.encode(record, source.data_augment, source.max_dynamic_patch, rng)
            except UserError as error:
                file, line = source.where(place)
                bad.append({"dataset": source.name, "file": str(file), "line": line, "reason": str(error)})
                if self.skip:
                    return {"name": source.place(place), "bad": bad}
            else:
                return {**sample, "name": source.place(place), "index": current, "bad": bad}
        raise DataError(
            f"{len(bad)} records in a row cannot be used, the first of them {_sentence(bad[0])}; "
            "run python -m paddlemix.datasets.internvl2.check to see all that is wrong"
        )

    def locate(self, index):
        """(source, index within it) of an index."""
        number = int(np.searchsorted(self._ends, index, side="right"))
        return self.sources[number], int(index - (self._ends[number - 1] if number else 0))

    def source_sizes(self):
        """Number of samples of each source, ``repeat_time`` applied: list of int."""
        return [len(source) for source in self.sources]


class BadSampleLog:
    """Keeps count of records that could not be used, writes them down, and stops the run when they are too many.

    Args:
        path: JSON-lines file that gets one object for each such record: dataset, file, line and reason. None for no file.
        max_share: of all samples seen so far, how many may be bad.
        handful: so many are allowed however few samples were seen.

    Attributes:
        seen: samples taken note of, bad ones included.
        bad: how many of them could not be used.
    """

    def __init__(self, path=None, max_share=0.01, handful=5):
        self.path, self.max_share, self.handful = path, max_share, handful
        self.seen = self.bad = 0
        self._known = set()
        if path is not None:
            os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)

    def take(self, batch):
        """Take note of a batch: removes ``bad`` from it and returns the batch.

        Raises:
            DataError: too many were bad.
        """
        bad = batch.pop("bad")
        self.seen += len(batch["names"]) + len(bad)
        self.bad += len(bad)
        new = [entry for entry in bad if (entry["file"], entry["line"]) not in self._known]
        self._known.update((entry["file"], entry["line"]) for entry in new)
        if new and self.path is not None:
            with open(self.path, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(entry, ensure_ascii=False) + "\n" for entry in new)
        if bad and self.bad > max(self.handful, self.max_share * self.seen):
            listed = f"; all are in {self.path}" if self.path is not None else ""
            raise DataError(
                f"{self.bad} of {self.seen} samples could not be used, more than {self.max_share:.1%}: the last is "
                f"{_sentence(bad[-1])}{listed}"
            )
        return batch


def measure(dataset, cache_dir=None, progress=None):
    """Estimate what samples cost, without decoding a picture.

    Tiles come from the sizes that records state, or else from the headers of the pictures; the tokens of a text from those
    of the first text of as many bytes; videos count with the mean number of frames.

    Args:
        dataset: :class:`InternVLDataset`.
        cache_dir: folder where results are kept for the next time; they are used only while annotation file, options,
            tokenizer and template are the same. None to keep none.
        progress: wraps the indices of a source's records, such as ``tqdm``; None for silence.

    Returns:
        ``(tokens, tiles)``, int64 arrays [len(dataset)]; a record that cannot be used counts as nothing.
    """
    found = []
    for source in dataset.sources:
        cost = _cached(source, dataset.encoder, cache_dir, progress or iter)
        found.append(np.tile(cost, (len(source) // source.num_records, 1)))
    tokens, tiles = np.concatenate(found).T
    return tokens, tiles


def costs(dataset):
    """What samples cost, one by one as they are asked for: a function from an index to what :func:`measure` has for it."""
    known = {}

    def cost(index):
        source, place = dataset.locate(index)
        return _cost(source, place, dataset.encoder, known)

    return cost


def _cached(source, encoder, cache_dir, progress):
    """Costs of a source's records, int64 [num_records, 2]."""
    if cache_dir is None:
        return _costs(source, encoder, progress)
    facts = [*source.stamp(), source.max_dynamic_patch, encoder.options, encoder.template, len(encoder.tokenizer)]
    key = hashlib.sha256(repr(facts).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    path = os.path.join(cache_dir, f"lengths-{key}.npy")
    if os.path.exists(path):
        return np.load(path)
    cost = _costs(source, encoder, progress)
    os.makedirs(cache_dir, exist_ok=True)
    unfinished = f"{path}.{os.getpid()}.tmp"  # several processes may write it at once
    with open(unfinished, "wb") as file:
        np.save(file, cost)
    os.replace(unfinished, path)
    return cost


def _costs(source, encoder, progress):
    known = {}
    return np.array([_cost(source, index, encoder, known) for index in progress(range(source.num_records))], dtype=np.int64)


def _cost(source, index, encoder, known):
    """(tokens, tiles) of a record; ``known`` has the tokens of texts by what they look like."""
    try:
        record = source.read(index)
        bound = encoder.tile_bound(record, source.max_dynamic_patch)
        sizes = record.sizes or [picture_size(path) for path in record.images]
        tiles = encoder.mean_frames if record.video else sum(encoder.count_tiles(size, bound, record) for size in sizes if size)
        text_bytes = sum(len(turn["value"].encode("utf-8", "replace")) for turn in record.conversations)
        look = text_bytes, len(record.conversations), len(record.images), record.video is None
        if record.length is None and look not in known:
            known[look] = encoder.count_text(record)
    except UserError:
        return 0, 0
    length = record.length or known[look] + tiles * encoder.options.num_image_token
    return encoder.answers * min(length, encoder.options.max_seq_length), tiles


def _sentence(entry):
    return f"{entry['file']}:{entry['line']}: {entry['reason']}"
