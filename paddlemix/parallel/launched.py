"""Groups of the processes that a launcher has started, numbered as in Fleet's hybrid topology.

Ranks next to each other divide a layer, and those that have the same share of it divide the data.
"""

import functools
import os
from concurrent import futures

from paddle.base import core

from paddlemix.errors import ConfigError, ParallelError

from .groups import Group, connect, free_port, limited

__all__ = ["data_group", "sharding_groups", "tensor_group", "world_group"]

_PATIENCE = 900  # seconds, as the store that a launcher's processes meet at


def _rank():
    return int(os.environ.get("PADDLE_TRAINER_ID", "0"))


def _world():
    return int(os.environ.get("PADDLE_TRAINERS_NUM", "1"))


def _check(size):
    if _world() % size:
        raise ConfigError(f"{_world()} processes cannot be divided into groups of {size}: start a multiple of it")


@functools.cache
def world_group():
    """All processes."""
    return _group(range(_world()), "all processes")


@functools.cache
def tensor_group(size):
    """The ``size`` processes that this one divides layers with.

    Raises:
        ConfigError: the processes are no multiple of it.
    """
    _check(size)
    first = _rank() // size * size
    return _group(range(first, first + size), "tensor parallel")


@functools.cache
def data_group(size):
    """The processes that have the same share of layers as this one where ``size`` divide one, and divide the data.

    Also where these are all processes it is a group of its own: numbers that all sum between steps must not wait behind weights
    that are on their way.
    """
    _check(size)
    return _group(range(_rank() % size, _world(), size), "data parallel")


@functools.cache
def sharding_groups(size, count):
    """``(those that divide states with this process, those that have the same share)``, of :func:`data_group` ``(size)``.

    Args:
        size: how many processes divide a layer.
        count: how many of the data group divide states, those next to each other in it; 0 or less for all. More than there are
            count as all.

    Raises:
        ConfigError: the data group cannot be divided so.
    """
    data = data_group(size)
    if not 0 < count < data.size:
        return data, Group(0, 1, None, None)
    if data.size % count:
        raise ConfigError(
            f"--sharding_parallel_degree is {count}, but {data.size} processes divide the data: use a number that divides it"
        )
    everyone = range(_rank() % size, _world(), size)
    first = data.rank // count * count
    return _group(everyone[first : first + count], "sharding"), _group(everyone[data.rank % count :: count], "same shards")


def _group(ranks, name):
    """The group of ``ranks``, in which every one of them has to ask for it."""
    ranks = list(ranks)
    if len(ranks) == 1:
        return Group(0, 1, None, None, name)
    store, place = core.create_or_get_global_tcp_store(), ranks.index(_rank())
    key = f"paddlemix/{name}/{ranks[0]}"
    if place == 0:  # a store of its own, on the machine of the group's first process
        host = os.environ.get("PADDLE_CURRENT_ENDPOINT", "127.0.0.1:0").rpartition(":")[0]
        store.set(key, f"{host}:{free_port()}".encode())
    try:
        host, _, port = bytes(limited(_PATIENCE, lambda: store.get(key))).decode().rpartition(":")
    except futures.TimeoutError:
        raise ParallelError(
            f"process {_rank()} waited {_PATIENCE} seconds for process {ranks[0]}, the first of {name}: look at its log for why"
        ) from None
    return connect(place, len(ranks), host, int(port), name=name)
