"""The processes of a run, one a device, that work on the same step at the same time."""

import json

import paddle.distributed as dist

from paddlemix.parallel.launched import data_group, sharding_groups, tensor_group, world_group


class Processes:
    """Which process this is, and what they tell each other. With one process nothing is sent.

    Processes that divide layers (tensor parallel) have the same data, and count as one.

    Args:
        tensor: how many processes divide a layer.
        sharding: how many of those that divide the data divide optimiser states and more; 0 or less for all.

    Attributes:
        rank, world: number of this process's share of the data and how many shares there are.
        tensor, data, everybody: the :class:`~paddlemix.parallel.groups.Group` of those that divide a layer with this one, of
            those that have the same share of it, and of all.
        sharded, replicas: of ``data``, the group of those that divide states with this one, and that of its counterparts in the
            other such groups.
    """

    def __init__(self, tensor=1, sharding=-1):
        if dist.ParallelEnv().world_size > 1 and not dist.is_initialized():
            dist.init_parallel_env()  # for losses that go over all processes by Paddle's own group
        self.everybody = world_group()
        self.tensor, self.data = tensor_group(tensor), data_group(tensor)
        self.sharded, self.replicas = sharding_groups(tensor, sharding)
        self.rank, self.world = self.data.rank, self.data.size

    @property
    def is_first(self):
        """Whether this is the process that writes and reports."""
        return self.everybody.is_first

    def sum(self, values):
        """Sums of ``values``, a list of numbers, over all shares of the data: float64 array.

        Where processes of one share differ, as one that has failed does, it is not 0 in any.
        """
        return self.everybody.sum_numbers(values) / self.tensor.size

    def gather(self, value):
        """List of the ``value`` of every share of the data, as for JSON."""
        texts = self.everybody.gather_bytes(json.dumps(value).encode()) if self.everybody.size > 1 else None
        return [value] if texts is None else [json.loads(text) for text in texts[:: self.tensor.size]]

    def wait(self, everybody=True):
        """Wait until all processes are here, or only the first (``everybody=False``).

        Through the store that the processes met at: collectives give up after 30 seconds on CPU, and writing a large
        model takes longer.
        """
        self.everybody.meet(first_alone=not everybody)

    def first_then_others(self, function):
        """Call ``function`` in the first process, and in the others once it has returned; for what leaves a cache."""
        result = function() if self.is_first else None
        self.wait(everybody=False)
        return result if self.is_first else function()
