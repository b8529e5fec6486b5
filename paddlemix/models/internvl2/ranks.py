"""A chat model over several devices: loading each rank's share, and the program of the ranks that rank 0 starts."""

import contextlib
import importlib
import math
import os
import sys

import paddle

from paddlemix import device
from paddlemix.checkpoints.checkpoint import Checkpoint
from paddlemix.errors import ConfigError, DeviceError, ParallelError, UserError
from paddlemix.models.blocks.division import check_division
from paddlemix.models.blocks.mirror import follow, lead
from paddlemix.models.blocks.parallel import divide
from paddlemix.models.blocks.quantising import load_quantised, weight_bytes
from paddlemix.parallel.groups import Group
from paddlemix.parallel.workers import Inbox, Workers, launched
from paddlemix.quantised import bytes_per_value

from .configuration import InternVLChatConfig

_ROOM = 1.2  # beside the weights: activations, keys and values


def load(cls, source, dtype, engine, keep, wanted, weights=(None, None)):
    """The model of class ``cls`` over ``wanted`` ranks; None where one will do.

    Args:
        cls: :class:`~.modeling.InternVLChatModel` or a subclass.
        source: the :class:`Checkpoint`.
        dtype, engine, keep, wanted: as ``from_pretrained`` takes them, ``wanted`` as ``tensor_parallel``.
        weights: the same, ``weight_dtype`` and ``quantize_parts``.

    Raises:
        UserError: it cannot be so.
    """
    config = source.config
    if isinstance(wanted, Group):  # to learn
        if source.packed:
            raise ConfigError(
                f"{source.directory} has weights in few bits, which do not learn where layers are divided: take the original "
                "checkpoint, or leave out --tensor_parallel_degree"
            )
        return _loaded(cls, source, dtype, keep, wanted, weights)
    size = needed(source, dtype, weights) if wanted == "auto" else wanted
    if isinstance(size, bool) or not isinstance(size, int):
        raise ConfigError(f"tensor_parallel is {wanted!r}: give a number of devices, or 'auto'")
    check_division(config, size)
    if size == 1:
        return None
    if engine == "inference":
        raise DeviceError("--engine inference packs whole weights: with --tensor_parallel use --engine eager, or auto")
    dtype = device.resolve_dtype(dtype)
    if launched() > 1:
        from paddlemix.parallel.launched import tensor_group

        return _loaded(cls, source, dtype, keep, tensor_group(size), weights)
    kind = device.current()
    if not device.is_cpu() and device.count(kind) < size:
        raise DeviceError(f"tensor_parallel is {size}, but {device.count(kind)} devices of kind {kind} are visible: use fewer")
    settings = {"directory": source.directory, "dtype": dtype, "class": [cls.__module__, cls.__name__], "weights": weights}
    settings["devices"] = [device.of_rank(rank) for rank in range(size)]
    workers = Workers(size, "paddlemix.models.internvl2.ranks", settings)
    try:
        model = _loaded(cls, source, dtype, keep, workers.group, weights)
        workers.wait_ready()
        lead(model, workers)
    except BaseException:
        workers.close()
        raise
    model.workers = workers
    return model


def needed(source, dtype, weights=(None, None)):
    """How many devices of the kind in use the weights of a checkpoint take; ``weights`` as for :func:`load`.

    Raises:
        DeviceError: there are not so many.
    """
    if device.is_cpu():
        return 1  # whose memory all ranks share
    size = 4 if device.resolve_dtype(dtype) == "float32" else 2
    packed = {found.weight.name: found.location.dtype for found in source.sources if found.location.packed}
    table = source.config.weight_table()
    few = sum(math.prod(weight.shape) * bytes_per_value(packed[weight.name]) for weight in table if weight.name in packed)
    others = weight_bytes([weight for weight in table if weight.name not in packed], size, *weights)
    weights, memory = (few + others) * _ROOM, device.total_memory()
    if memory is None:
        raise DeviceError("tensor_parallel 'auto' needs to know a device's memory, which this one does not tell: give a number")
    least = math.ceil(weights / memory)
    visible = device.count(device.current())
    for size in range(least, visible + 1):
        try:
            check_division(source.config, size)
        except ConfigError:
            break
        return size
    raise DeviceError(
        f"the weights take {weights / 1e9:,.0f} GB, so {least} devices of {memory / 1e9:,.0f} GB, but {visible} are visible"
    )


def _loaded(cls, source, dtype, keep, group, weights):
    with paddle.LazyGuard():
        model = cls(source.config)
        divide(model, group)
    load_quantised(model, source, dtype, keep, *weights, shares=model.division.share)
    model.eval()
    model.source = source
    return model


def main():
    """The program of a rank that rank 0 has started."""
    inbox = Inbox()
    told = inbox.settings
    module, name = told["class"]
    if not module.startswith("paddlemix."):
        raise ParallelError(f"{module} is no module of this package")
    try:
        device.set_device(told["devices"][told["rank"]])
        cls = getattr(importlib.import_module(module), name)
        group = inbox.join()
        config = InternVLChatConfig.from_pretrained(told["directory"])
        model = _loaded(cls, Checkpoint(told["directory"], config), told["dtype"], None, group, told["weights"])
    except UserError as error:
        inbox.ready(error)
        sys.exit(1)
    inbox.ready()
    with contextlib.suppress(ParallelError):  # another rank has ended, of which rank 0 tells
        follow(model, inbox)
    os._exit(1)


if __name__ == "__main__":
    main()
