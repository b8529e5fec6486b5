"""The order that needs no memory: a permutation, of any size, that differs by seed and looks like chance."""

import numpy as np
import pytest

from paddlemix.datasets.shuffling import shuffled


@pytest.mark.parametrize("size", [*range(1, 40), 100, 1023, 1024, 1025, 99_999, 100_000])
def test_every_place_comes_once(size):
    found = shuffled(np.arange(size), size, [3, 1])
    assert np.array_equal(np.sort(found), np.arange(size))


def test_places_are_found_one_by_one_and_seeds_differ():
    whole = shuffled(np.arange(1000), 1000, [0, 0])
    assert [int(shuffled(i, 1000, [0, 0])) for i in range(0, 1000, 97)] == whole[::97].tolist()
    for seed in ([0, 1], [1, 0]):
        assert (shuffled(np.arange(1000), 1000, seed) == whole).mean() < 0.01
    huge = 10**12 + 7  # 10^12 rows cost as much as a hundred
    assert len(set(shuffled(np.arange(100), huge, 5).tolist())) == 100


def test_it_looks_like_chance():
    """Means, neighbours and fixed points over many seeds, against a permutation's own."""
    size, orders = 257, np.stack([shuffled(np.arange(257), 257, seed) for seed in range(400)])
    deviation = size / np.sqrt(12 * 400)
    assert abs(orders.mean(0) - (size - 1) / 2).max() < 4.5 * deviation
    assert (np.diff(orders, axis=1) == 1).sum(1).mean() == pytest.approx(1, abs=0.25)
    assert (orders == np.arange(size)).sum(1).mean() == pytest.approx(1, abs=0.25)
