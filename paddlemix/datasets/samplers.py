"""In which order samples are drawn, and which process gets which.

One endless stream of samples, epoch after epoch, is cut into global batches, one for each optimizer step. What a global batch
holds depends on its size alone, not on how many processes share it; so does what its micro-batches hold. A step is resumed
by its number.
"""

from functools import lru_cache

import numpy as np

from paddlemix.errors import ConfigError

from .shuffling import shuffled

_NEAR = 4096  # places of a stream that are computed together


class SampleOrder:
    """The stream of samples: every epoch is a new permutation, or a new draw where sources are weighted.

    Any place of the stream is computed by itself, in no memory to speak of: there may be 10^8 samples.

    Args:
        sizes: number of samples of each source.
        seed: 0 or any positive integer.
        resample: draw from sources in proportion to the square root of their size instead of their size
            (``use_data_resampling``). Within a source, samples repeat only when all of it has been drawn.
        replacement: draw sources independently, so that how often each comes up is itself random.
        shuffle: False for the order of the records, in every epoch.
    """

    def __init__(self, sizes, seed=0, resample=False, replacement=False, shuffle=True):
        if not shuffle and (resample or replacement):
            raise ConfigError("use_data_resampling and replacement draw at random: they need shuffling")
        self.sizes, self.seed = [int(size) for size in sizes], seed
        self.resample, self.replacement, self.shuffle = resample, replacement, shuffle
        self._starts = np.cumsum([0, *self.sizes])
        self._drawn = lru_cache(maxsize=4)(self._counts)
        self._near = lru_cache(maxsize=8)(self._block)

    def __len__(self):
        return sum(self.sizes)

    def __getitem__(self, position):
        """Key of the sample at a position of the stream, ``(epoch, index)``."""
        epoch, place = divmod(int(position), len(self))
        return epoch, int(self._near(epoch, place // _NEAR)[place % _NEAR])

    def _block(self, epoch, number):
        """Places are mostly asked for in order, and many cost hardly more than one."""
        return self.indices(epoch, np.arange(number * _NEAR, min((number + 1) * _NEAR, len(self))))

    def indices(self, epoch, places):
        """Indices of the samples at ``places`` of an epoch, int64 in the shape of ``places``."""
        if not self.shuffle:
            return np.asarray(places, dtype=np.int64)
        slots = shuffled(places, len(self), [self.seed, epoch])
        if not (self.resample or self.replacement):
            return slots
        ends = np.cumsum(self._drawn(epoch))
        sources = np.searchsorted(ends, slots, side="right")
        found = np.empty_like(slots)
        for source in np.unique(sources):
            own = sources == source
            draws = slots[own] - (ends[source - 1] if source else 0)
            rounds, size = draws // self.sizes[source], self.sizes[source]
            within = np.empty_like(draws)
            for turn in np.unique(rounds):  # none is drawn again before all were drawn
                now = rounds == turn
                within[now] = shuffled(draws[now] % size, size, [self.seed, epoch, source, turn])
            found[own] = self._starts[source] + within
        return found

    def _counts(self, epoch):
        """How many samples an epoch draws of each source."""
        weights = np.sqrt(self.sizes) if self.resample else np.array(self.sizes, dtype=np.float64)
        shares = weights / weights.sum()
        if self.replacement:
            return np.random.default_rng([self.seed, epoch]).multinomial(len(self), shares)
        # The largest remainders are rounded up, so that the sum is right.
        exact = shares * len(self)
        counts = exact.astype(np.int64)
        counts[np.argsort(counts - exact, kind="stable")[: len(self) - counts.sum()]] += 1
        return counts


class TrainBatchSampler:
    """Micro-batches of one process, lists of keys ``(epoch, index)``; a batch sampler for Paddle's ``DataLoader``.

    With ``tokens``, samples of similar length share a micro-batch: those of a global batch are sorted by length, then cut.
    With ``tiles``, micro-batches go to processes so that all of them have about as many tiles to compute in a step.

    Args:
        order: :class:`SampleOrder`.
        batch_size: samples of a micro-batch (``per_device_train_batch_size``).
        accumulation: micro-batches of a step in each process (``gradient_accumulation_steps``).
        rank, world: this process and the number of them, among those that get different data.
        tokens, tiles: what each sample costs, arrays [len(order)] from :func:`measure`; either may be None.
        steps: total number of steps; None for no end.

    Attributes:
        steps_per_epoch: optimizer steps that pass over the data once; the last takes what it lacks from the next epoch.
    """

    def __init__(self, order, batch_size, accumulation=1, rank=0, world=1, tokens=None, tiles=None, steps=None):
        if not 0 <= rank < world:
            raise ConfigError(f"rank {rank} is not one of {world} processes")
        if batch_size < 1 or accumulation < 1:
            raise ConfigError("per_device_train_batch_size and gradient_accumulation_steps must be at least 1")
        self.order, self.batch_size, self.accumulation = order, batch_size, accumulation
        self.rank, self.world, self.steps = rank, world, steps
        self.tokens, self.tiles = tokens, tiles
        self.global_batch = batch_size * accumulation * world
        self.steps_per_epoch = -(-len(order) // self.global_batch)
        self._first_step = 0

    def resume(self, step):
        """Let the next iteration begin with optimizer step ``step``, that is, after ``step`` steps are done."""
        self._first_step = step

    def __len__(self):
        """Micro-batches of the next iteration; of an epoch if there is no end."""
        steps = self.steps_per_epoch if self.steps is None else self.steps - self._first_step
        return steps * self.accumulation

    def __iter__(self):
        step = self._first_step
        while self.steps is None or step < self.steps:
            yield from self.step(step)[self.rank]
            step += 1

    def step(self, number):
        """What every process computes in a step: for each process its micro-batches, lists of keys."""
        start = number * self.global_batch
        keys = [self.order[position] for position in range(start, start + self.global_batch)]
        if self.tokens is not None:
            keys.sort(key=lambda key: -self.tokens[key[1]])
        micro_batches = [keys[i : i + self.batch_size] for i in range(0, len(keys), self.batch_size)]
        if self.tiles is None:
            return [micro_batches[rank :: self.world] for rank in range(self.world)]
        work = [sum(int(self.tiles[index]) for _, index in batch) for batch in micro_batches]
        return _balance(micro_batches, work, self.world)


def sequential_batches(count, batch_size, rank=0, world=1):
    """Batches of indices for evaluation: every sample once, in order; processes take turns and may differ by one batch."""
    batches = [list(range(i, min(i + batch_size, count))) for i in range(0, count, batch_size)]
    return batches[rank::world]


def _balance(micro_batches, work, world):
    """Deal micro-batches to ``world`` processes, equally many to each, with sums of work as even as greedy dealing gets.

    Processes compute at the same time what was dealt in the same round, so a round holds micro-batches of similar work.
    """
    heaviest_first = sorted(range(len(work)), key=lambda i: -work[i])
    dealt, load = [[] for _ in range(world)], [0] * world
    for start in range(0, len(work), world):
        ranks = sorted(range(world), key=lambda rank: load[rank])
        for rank, i in zip(ranks, heaviest_first[start : start + world]):
            dealt[rank].append(micro_batches[i])
            load[rank] += work[i]
    return dealt
