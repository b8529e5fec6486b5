"""Packing: several samples in a row, one after the other, so that little of a batch is padding.

Samples keep to themselves: positions restart and attention does not cross (``segment_ids`` of :class:`Collator`), so a
packed sample is computed as it would be alone. No sample is dropped, and none is split.
"""

from collections import deque

from paddlemix.errors import ConfigError, DataError

from .loading import BatchLoader

_MOST_SKIPPED = 1000  # records in a row that cannot be used before a row is full: no accident


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

    def empty(self):
        """Another packer like this, without rows."""
        return Packer(self.max_tokens, self.max_tiles, self.buffer_size, self.allow_overflow)

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

    A step of all processes has a fixed number of rows, and each of them is packed by a lane of its own, from every ``lanes``-th
    sample of the stream. Which process has which lanes makes no difference to what they pack, nor does the number of workers:
    so a run goes on exactly with another number of processes, if a step has as many rows as before.

    Args:
        dataset: :class:`InternVLDataset`, whose encoder keeps every sample within a row.
        order: :class:`SampleOrder`.
        packer: :class:`Packer`, empty; every lane gets one like it.
        collator: :class:`Collator`.
        batch_size: rows of a batch.
        rank, world: this process and the number of them, among those that get different data.
        num_workers: processes that load samples; 0 loads them in this one.
        accumulation: batches of this process in a step.

    Raises:
        ConfigError: the encoder lets samples through that are larger than a row.
    """

    def __init__(self, dataset, order, packer, collator, batch_size=1, rank=0, world=1, num_workers=0, accumulation=1):
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
        self.dataset, self.order, self.collator, self.num_workers = dataset, order, collator, num_workers
        self.lanes = batch_size * accumulation * world  # rows of a step
        batches = [range(first, first + batch_size) for first in range(rank * batch_size, self.lanes, world * batch_size)]
        self._batches = [[_Lane(number, self.lanes, packer.empty()) for number in batch] for batch in batches]
        self._turn = 0  # of the batch in a step

    def __iter__(self):
        samples = _Ahead(self.dataset, self.order, self._own, self.num_workers)
        while True:
            lanes = self._batches[self._turn]
            rows, bad = [], []
            for lane in lanes:
                rows.append(self._row(lane, samples, bad))
            self._turn = (self._turn + 1) % len(self._batches)
            batch = self.collator.collate_rows(rows)
            yield {**batch, "bad": bad + batch["bad"]}

    @staticmethod
    def _row(lane, samples, bad):
        """The next row of a lane; what could not be used on the way joins ``bad``."""
        row = None
        while row is None:
            sample = samples.next(lane)
            if "input_ids" in sample:
                row = lane.packer.add(sample)
            else:  # skipped
                bad += sample["bad"]
                if len(bad) >= _MOST_SKIPPED:
                    first = bad[0]
                    raise DataError(
                        f"{len(bad)} records in a row cannot be used, the first of them {first['file']}:{first['line']}: "
                        f"{first['reason']}"
                    )
        return row

    @property
    def _own(self):
        return [lane for batch in self._batches for lane in batch]

    @property
    def epoch(self):
        """Epochs of the data passed so far, a fraction."""
        return sum(lane.taken for lane in self._own) * self.lanes / len(self._own) / len(self.order)

    def state_dict(self):
        """What resumes exactly behind the last batch of a step: for every lane of this process the samples taken, and those
        waiting in unfinished rows.
        """
        lanes = {
            str(lane.number): {
                "taken": lane.taken,
                "rows": [[list(sample["key"]) for sample in row] for row in lane.packer.rows],
            }
            for lane in self._own
        }
        return {"lanes": lanes, "of": self.lanes}

    def load_state_dict(self, *states):
        """Go back to the state that all processes together had; waiting samples are loaded again.

        Raises:
            ConfigError: a step had another number of rows, or states are missing.
        """
        if any(state["of"] != self.lanes for state in states):
            raise ConfigError(
                f"the data state is of steps of {states[0]['of']} rows, not {self.lanes}: keep --per_device_train_batch_size "
                "times --gradient_accumulation_steps times processes as it was"
            )
        known = {number: lane for state in states for number, lane in state["lanes"].items()}
        for lane in self._own:
            if str(lane.number) not in known:
                raise ConfigError(
                    f"the data state lacks row {lane.number}: the checkpoint must have the states of all processes"
                )
            state = known[str(lane.number)]
            lane.taken = state["taken"]
            lane.packer.rows = [[self._load(tuple(key)) for key in row] for row in state["rows"]]
        self._turn = 0

    def _load(self, key):
        return {**self.dataset[key], "key": key}


class _Lane:
    """A row of every step: its share of the stream, and its unfinished rows.

    Attributes:
        number: the first place of the stream that is its own; then every ``stride``-th is.
        taken: samples that were taken from the stream.
        packer: :class:`Packer`.
    """

    def __init__(self, number, stride, packer):
        self.number, self.stride, self.packer, self.taken = number, stride, packer, 0

    def place(self, count):
        """Place in the stream of the sample that comes after ``count`` others."""
        return self.number + self.stride * count


class _Ahead:
    """Samples of several lanes, loaded ahead by one set of workers: always for the lane that has fewest waiting."""

    def __init__(self, dataset, order, lanes, num_workers):
        self._order, self._lanes = order, lanes
        self._asked = {lane.number: lane.taken for lane in lanes}  # samples asked for, those of before included
        self._waiting = {lane.number: deque() for lane in lanes}
        self._wanted = None
        self._coming = deque()  # lane and key of what is being loaded, in order
        self._loaded = iter(BatchLoader(dataset, self, _only, num_workers))

    def __iter__(self):
        while True:
            lane = min(self._lanes, key=lambda lane: (self._asked[lane.number] - lane.taken, lane is not self._wanted))
            key = self._order[lane.place(self._asked[lane.number])]
            self._asked[lane.number] += 1
            self._coming.append((lane.number, key))
            yield [key]

    def next(self, lane):
        """The next sample of a lane, which has then taken it."""
        self._wanted = lane
        while not self._waiting[lane.number]:
            sample = next(self._loaded)
            number, key = self._coming.popleft()
            self._waiting[number].append({**sample, "key": key})
        lane.taken += 1
        return self._waiting[lane.number].popleft()


def rows_per_epoch(order, packer, cost, samples=10_000):
    """How many rows a pass over the data fills, estimated by packing the start of the stream by measured lengths.

    The same for every process and number of processes, so that learning rates and resumed runs agree on the end.

    Args:
        order: :class:`SampleOrder`.
        packer: :class:`Packer`, empty.
        cost: called with an index; (tokens, tiles) of that sample, as from :func:`measure`.
        samples: length of the start of the stream.

    Returns:
        A fraction: rows do not end where epochs do.
    """
    rows = packed = 0
    for position in range(samples):
        _, index = order[position]
        length, pictures = map(int, cost(index))
        if not 0 < length <= packer.max_tokens or pictures > packer.max_tiles:
            continue  # cannot be used: the next one takes its place
        sample = {"input_ids": range(length), "image_flags": range(pictures), "min_length": length}
        row = packer.add(sample)
        rows, packed = rows + (row is not None), packed + len(row or ())
    return len(order) * rows / packed if rows else float(len(order))


def _only(samples):
    return samples[0]


def _size(sample):
    """Tokens of a sample; of both answers, where it is a pair."""
    return len(sample["input_ids"]) + len(sample.get("rejected_input_ids", ()))


def _tokens(row):
    return sum(map(_size, row))


def _tiles(row):
    return sum(len(sample["image_flags"]) for sample in row)
