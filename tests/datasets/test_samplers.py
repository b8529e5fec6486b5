"""The order of samples: nothing lost, nothing twice, the same whoever computes it and wherever it is resumed."""

from collections import Counter

import numpy as np
import pytest

from paddlemix.datasets.internvl2 import SampleOrder, TrainBatchSampler, sequential_batches
from paddlemix.errors import ConfigError

N = 103


@pytest.fixture
def costs():
    rng = np.random.default_rng(0)
    tiles = rng.integers(0, 13, N)
    return {"tokens": 256 * tiles + rng.integers(20, 400, N), "tiles": tiles}


def take(sampler, steps):
    """Micro-batches of so many steps."""
    iterator = iter(sampler)
    return [next(iterator) for _ in range(steps * sampler.accumulation)]


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("world, accumulation", [(1, 1), (2, 2), (4, 3)])
def test_every_epoch_has_every_sample_once(costs, grouped, world, accumulation):
    costs = costs if grouped else {}
    samplers = [
        TrainBatchSampler(SampleOrder([60, 43], seed=3), 2, accumulation, rank, world, **costs) for rank in range(world)
    ]
    steps = -(-2 * N // samplers[0].global_batch)  # as many as two epochs need
    keys = Counter(key for sampler in samplers for batch in take(sampler, steps) for key in batch)
    for epoch in (0, 1):
        assert {index for e, index in keys if e == epoch} == set(range(N))
    assert set(keys.values()) == {1}
    assert sum(e == 2 for e, _ in keys) == steps * samplers[0].global_batch - 2 * N
    assert len(samplers[0]) == samplers[0].steps_per_epoch * accumulation


@pytest.mark.parametrize("grouped", [False, True])
def test_global_batches_and_micro_batches_do_not_depend_on_the_number_of_processes(costs, grouped):
    """The same global batch of 12 as 1 x 6, 2 x 3 and 3 x 2 micro-batches of two."""
    costs = costs if grouped else {}
    seen = []
    for world in (1, 2, 3):
        samplers = [TrainBatchSampler(SampleOrder([N], seed=1), 2, 6 // world, rank, world, **costs) for rank in range(world)]
        assert {sampler.global_batch for sampler in samplers} == {12}
        of_rank = [take(sampler, 20) for sampler in samplers]
        a = samplers[0].accumulation
        seen.append([sorted(map(tuple, sum((r[i * a : i * a + a] for r in of_rank), []))) for i in range(20)])
    assert seen[0] == seen[1] == seen[2]


@pytest.mark.parametrize("grouped", [False, True])
def test_resuming_continues_the_same_order(costs, grouped):
    costs = costs if grouped else {}
    make = {"batch_size": 3, "accumulation": 2, "rank": 1, "world": 2, "steps": 30, **costs}
    whole = list(TrainBatchSampler(SampleOrder([N], seed=5), **make))
    assert len(whole) == 60
    resumed = TrainBatchSampler(SampleOrder([N], seed=5), **make)
    resumed.resume(13)
    assert len(resumed) == 34 and list(resumed) == whole[26:]
    assert list(resumed) == whole[26:]  # iterating does not move it


def test_epochs_and_seeds_differ():
    order, other = SampleOrder([N], seed=0), SampleOrder([N], seed=1)
    first, second = [[order[p][1] for p in range(e * N, e * N + N)] for e in (0, 1)]
    assert first != second and first != [other[p][1] for p in range(N)] and first != sorted(first)
    assert [SampleOrder([N], shuffle=False)[p] for p in (0, 1, N, N + 1)] == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_samples_of_similar_length_share_a_micro_batch(costs):
    """Padding of a global batch drops to what sorting it gives; in the existing port group_by_length did nothing."""

    def padded(**grouping):
        sampler = TrainBatchSampler(SampleOrder([N]), 4, 8, **grouping)
        return sum(len(b) * max(costs["tokens"][i] for _, i in b) for b in take(sampler, 3))

    total = 3 * 32 * costs["tokens"].mean()
    assert padded(tokens=costs["tokens"]) < 1.2 * total < 1.4 * total < padded()


def test_tiles_are_balanced_over_processes(costs):
    """Worst share of a step's tiles that one of four processes has, over the mean."""

    def imbalance(**balance):
        samplers = [TrainBatchSampler(SampleOrder([N]), 1, 8, rank, 4, **balance) for rank in range(4)]
        worst = []
        for step in range(6):
            loads = [sum(costs["tiles"][i] for batch in s.step(step)[s.rank] for _, i in batch) for s in samplers]
            worst.append(max(loads) / np.mean(loads))
        return np.mean(worst)

    assert imbalance(tiles=costs["tiles"]) < 1.03 < 1.15 < imbalance()
    assert imbalance(**costs) < 1.03


def test_processes_compute_similar_micro_batches_at_the_same_time(costs):
    sampler = TrainBatchSampler(SampleOrder([N]), 2, 4, 0, 4, **costs)
    work = np.array([[sum(costs["tiles"][i] for _, i in batch) for batch in of_rank] for of_rank in sampler.step(0)])
    assert np.ptp(work, axis=0).mean() < np.ptp(work) / 3


def test_resampling_draws_sources_by_the_square_root_of_their_size():
    sizes = [900, 100]
    plain, resampled = SampleOrder(sizes), SampleOrder(sizes, resample=True)

    def small(order):
        return sum(order[p][1] >= 900 for p in range(len(order)))

    assert small(plain) == 100
    assert small(resampled) == 250  # 1000 * 10 / (30 + 10)
    drawn = Counter(resampled[p][1] for p in range(1000))
    assert {n for i, n in drawn.items() if i >= 900} == {2, 3}  # the small source three times at most, all of it twice
    assert {n for i, n in drawn.items() if i < 900} == {1} and len(resampled) == 1000


def test_replacement_makes_counts_random():
    def counts(**options):
        order = SampleOrder([500, 500], **options)
        return [sum(order[p][1] < 500 for p in range(e * 1000, e * 1000 + 1000)) for e in range(5)]

    assert counts() == [500] * 5
    drawn = counts(replacement=True)
    assert len(set(drawn)) > 1 and all(420 < count < 580 for count in drawn)


def test_a_data_set_smaller_than_a_global_batch():
    sampler = TrainBatchSampler(SampleOrder([3]), 8)
    assert sampler.steps_per_epoch == 1
    (batch,) = take(sampler, 1)
    assert Counter(epoch for epoch, _ in batch) == {0: 3, 1: 3, 2: 2}


@pytest.mark.parametrize("count, batch, world", [(10, 3, 1), (10, 3, 2), (2, 4, 3)])
def test_evaluation_sees_every_sample_once_in_order(count, batch, world):
    ranks = [sequential_batches(count, batch, rank, world) for rank in range(world)]
    assert sorted(i for batches in ranks for b in batches for i in b) == list(range(count))
    assert all(b == sorted(b) and len(b) <= batch for batches in ranks for b in batches)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: TrainBatchSampler(SampleOrder([3]), 1, rank=2, world=2), "rank 2 is not one of 2"),
        (lambda: TrainBatchSampler(SampleOrder([3]), 0), "per_device_train_batch_size"),
        (lambda: TrainBatchSampler(SampleOrder([3]), 1, 0), "gradient_accumulation_steps"),
        (lambda: SampleOrder([3], shuffle=False, resample=True), "need shuffling"),
    ],
)
def test_arguments_that_make_no_sense(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
