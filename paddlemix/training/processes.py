"""The processes of a run, one a device, that work on the same step at the same time."""

import time

import numpy as np
import paddle
import paddle.distributed as dist
from paddle.base import core


class Processes:
    """Which process this is, and what they tell each other. With one process nothing is sent.

    Attributes:
        rank, world: number of this process and how many there are.
    """

    def __init__(self):
        if dist.ParallelEnv().world_size > 1 and not dist.is_initialized():
            dist.init_parallel_env()
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self._turns = 0

    @property
    def is_first(self):
        """Whether this is the process that writes and reports."""
        return self.rank == 0

    def sum(self, values):
        """Sums of ``values``, a list of numbers, over all processes: float64 array."""
        values = np.asarray(values, dtype=np.float64)
        if self.world > 1:
            # Two float32 carry most of a float64 to devices that have none.
            high = values.astype(np.float32)
            tensor = paddle.to_tensor(np.stack([high, (values - high).astype(np.float32)]))
            dist.all_reduce(tensor)
            values = tensor.numpy().astype(np.float64).sum(0)
        return values

    def gather(self, value):
        """List of every process's ``value``, any object."""
        if self.world == 1:
            return [value]
        values = []
        dist.all_gather_object(values, value)
        return values

    def wait(self, everybody=True):
        """Wait until all processes are here, or only the first (``everybody=False``).

        Through the store that the processes met at: collectives give up after 30 seconds on CPU, and writing a large
        model takes longer.
        """
        if self.world == 1:
            return
        store, key = core.create_or_get_global_tcp_store(), f"paddlemix/turn/{self._turns}"
        self._turns += 1
        if everybody or self.is_first:
            store.add(key, 1)
        needed = self.world if everybody else 1
        while store.add(key, 0) < needed:
            time.sleep(0.05)

    def first_then_others(self, function):
        """Call ``function`` in the first process, and in the others once it has returned; for what leaves a cache."""
        result = function() if self.is_first else None
        self.wait(everybody=False)
        return result if self.is_first else function()
