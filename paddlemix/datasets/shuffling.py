"""A random order that needs no memory: any place of it is computed by itself.

A permutation of 10^8 rows would take 800 MB in every process. A Feistel network (Luby and Rackoff 1988) over pairs of digits is
a permutation by construction, whatever its round function; what falls outside the range goes through it again.
"""

import numpy as np

_ROUNDS = 6


def shuffled(places, size, seed):
    """What stands at ``places`` of a random permutation of ``range(size)``.

    Args:
        places: integers below ``size``, an array of any shape.
        size: at most 2^62.
        seed: integers that decide the permutation, such as ``[seed, epoch]``.

    Returns:
        int64 array of the shape of ``places``.
    """
    places = np.asarray(places, dtype=np.uint64)
    keys = np.random.SeedSequence(seed).generate_state(_ROUNDS, np.uint64)
    side = np.uint64(np.ceil(np.sqrt(size)))
    while int(side) ** 2 < size:  # a square root of a large number may be rounded down
        side += np.uint64(1)
    found = _round_trip(places.reshape(-1), side, keys)
    while len(outside := np.flatnonzero(found >= size)):
        found[outside] = _round_trip(found[outside], side, keys)
    return found.astype(np.int64).reshape(places.shape)


def _round_trip(places, side, keys):
    left, right = places // side, places % side
    for key in keys:
        left, right = right, (left + _mixed(right + key) % side) % side
    return left * side + right


def _mixed(x):
    """splitmix64 (Steele, Lea and Flood 2014): every bit of the result depends on every bit of ``x``."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
