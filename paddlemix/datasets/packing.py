"""Packing: several samples in a row, one after the other, so that little of a batch is padding.

Samples keep to themselves: positions restart and attention does not cross (``segment_ids`` of :class:`Collator`), so a
packed sample is computed as it would be alone. No sample is dropped, and none is split.
"""

from paddlemix.errors import ConfigError

from .loading import BatchLoader


class Packer:
    """Fills rows greedily: each sample goes to the fullest unfinished row that has room for it.

    Args:
        max_tokens: tokens of a row (``max_packed_tokens``).
        max_tiles: tiles of a row (``num_images_expected``).
        buffer_size: unfinished rows to choose from; beyond that the fullest is finished (``max_buffer_size``).
        allow_overflow: where a row is at least half full, a sample may go there whose last answer does not fit: what is
            too much is cut off, but never pictures, nor the whole answer.
    """

    def __init__(self, max_tokens, max_tiles, buffer_size=20, allow_overflow=False):
        self.max_tokens, self.max_tiles = max_tokens, max_tiles
        self.buffer_size, self.allow_overflow = buffer_size, allow_overflow
        self.rows = []

    def add(self, sample):
        """Place a sample; returns the row that this finished, a list of samples, or None."""
        if _size(sample) > self.max_tokens or len(sample["image_flags"]) > self.max_tiles:
            raise ConfigError(
                f"{sample['name']} has {_size(sample)} tokens and {len(sample['image_flags'])} tiles, more than "
                f"max_packed_tokens ({self.max_tokens}) or num_images_expected ({self.max_tiles}): "
                "give the encoder these as max_seq_length and max_tiles"
            )
        fitting = [i for i, row in enumerate(self.rows) if self._fits(row, sample)]
        if not fitting:
            self.rows.append([])
            fitting = [len(self.rows) - 1]
        chosen = max(fitting, key=lambda i: _tokens(self.rows[i]))
        self.rows[chosen].append(sample)
        if _tokens(self.rows[chosen]) >= self.max_tokens or _tiles(self.rows[chosen]) >= self.max_tiles:
            return self._finish(chosen)
        if len(self.rows) > self.buffer_size:
            return self._finish(max(range(len(self.rows)), key=lambda i: _tokens(self.rows[i])))
        return None

    def flush(self):
        """The unfinished rows, which are then gone."""
        return [self._finish(0) for _ in range(len(self.rows))]

    def _fits(self, row, sample):
        room = self.max_tokens - _tokens(row)
        if _tiles(row) + len(sample["image_flags"]) > self.max_tiles:
            return False
        if _size(sample) <= room:
            return True
        pair = "rejected_input_ids" in sample  # both answers of which stay whole
        return self.allow_overflow and not pair and room <= self.max_tokens / 2 and sample["min_length"] <= room

    def _finish(self, i):
        row = self.rows.pop(i)
        excess = _tokens(row) - self.max_tokens
        if excess > 0:
            row[-1] = {**row[-1], **{key: row[-1][key][:-excess] for key in ("input_ids", "labels")}}
        return row


class PackedBatches:
    """Endless packed batches of one process; iterating again goes on where it stopped.

    Each process packs its own share of the stream of samples, every ``world``-th, in memory. Rows depend on the stream
    alone, not on the number of workers.

    Args:
        dataset: :class:`InternVLDataset`, whose encoder keeps every sample within a row.
        order: :class:`SampleOrder`.
        packer: :class:`Packer`, empty.
        collator: :class:`Collator`.
        batch_size: rows of a batch.
        rank, world: this process and the number of them, among those that get different data.
        num_workers: processes that load samples; 0 loads them in this one.

    Raises:
        ConfigError: the encoder lets samples through that are larger than a row.
    """

    def __init__(self, dataset, order, packer, collator, batch_size=1, rank=0, world=1, num_workers=0):
        options = dataset.encoder.options
        if options.max_seq_length > packer.max_tokens:
            raise ConfigError(
                f"max_seq_length ({options.max_seq_length}) is larger than max_packed_tokens ({packer.max_tokens}): "
                "a sample must fit in a row"
            )
        if options.max_tiles is None or options.max_tiles > packer.max_tiles:
            raise ConfigError(f"the encoder's max_tiles must be at most num_images_expected ({packer.max_tiles})")
        if not 0 <= rank < world:
            raise ConfigError(f"rank {rank} is not one of {world} processes")
        self.dataset, self.order, self.packer, self.collator = dataset, order, packer, collator
        self.batch_size, self.rank, self.world, self.num_workers = batch_size, rank, world, num_workers
        self._position = rank  # of the next sample in the stream

    def __iter__(self):
        samples = self._samples()
        while True:
            rows = []
            while len(rows) < self.batch_size:
                row = self.packer.add(next(samples))
                if row is not None:
                    rows.append(row)
            yield self.collator.collate_rows(rows)

    @property
    def epoch(self):
        """Epochs of the data passed so far, a fraction."""
        return self._position / len(self.order)

    def state_dict(self):
        """What resumes exactly behind the last batch: position in the stream, and the samples waiting in unfinished rows."""
        return {"position": self._position, "rows": [[list(sample["key"]) for sample in row] for row in self.packer.rows]}

    def load_state_dict(self, state):
        """Go back to a state; its waiting samples are loaded again.

        Raises:
            ConfigError: the state is of another rank or number of processes.
        """
        if (state["position"] - self.rank) % self.world:
            raise ConfigError(
                f"the data state is not that of rank {self.rank} of {self.world}: resume with as many processes as before"
            )
        self._position = state["position"]
        self.packer.rows = [[self._load(tuple(key)) for key in row] for row in state["rows"]]

    def _load(self, key):
        return {**self.dataset[key], "key": key}

    def _samples(self):
        """Samples of this process from the current position on; the position counts those handed out."""
        keys = _Keys(self.order, self._position, self.world)
        loaded = BatchLoader(self.dataset, keys, _only, self.num_workers)
        for (key,), sample in zip(keys, loaded):
            self._position += self.world
            yield {**sample, "key": key}


def rows_per_epoch(order, packer, tokens, tiles, samples=10_000):
    """How many rows a pass over the data fills, estimated by packing the start of the stream by measured lengths.

    The same for every process and number of processes, so that learning rates and resumed runs agree on the end.

    Args:
        order: :class:`SampleOrder`.
        packer: :class:`Packer`, empty.
        tokens, tiles: what each sample costs, arrays [len(order)] from :func:`measure`.
        samples: length of the start of the stream.

    Returns:
        A fraction: rows do not end where epochs do.
    """
    rows = packed = 0
    for position in range(samples):
        _, index = order[position]
        length, pictures = int(tokens[index]), int(tiles[index])
        if not 0 < length <= packer.max_tokens or pictures > packer.max_tiles:
            continue  # cannot be used: the next one takes its place
        sample = {"input_ids": range(length), "image_flags": range(pictures), "min_length": length}
        row = packer.add(sample)
        rows, packed = rows + (row is not None), packed + len(row or ())
    return len(order) * rows / packed if rows else float(len(order))


class _Keys:
    """Keys from a position of the stream on, each as a batch of one."""

    def __init__(self, order, position, stride):
        self._order, self._position, self._stride = order, position, stride

    def __iter__(self):
        position = self._position
        while True:
            yield [self._order[position]]
            position += self._stride


def _only(samples):
    return samples[0]


def _size(sample):
    """Tokens of a sample; of both answers, where it is a pair."""
    return len(sample["input_ids"]) + len(sample.get("rejected_input_ids", ()))


def _tokens(row):
    return sum(map(_size, row))


def _tiles(row):
    return sum(len(sample["image_flags"]) for sample in row)
