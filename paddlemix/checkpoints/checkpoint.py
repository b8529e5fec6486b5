"""Weights of a checkpoint: the way into a model; :mod:`~.contents` tells what a directory holds, :mod:`~.saving` writes.

A configuration's ``weight_table()`` (:mod:`~.names`) says of every parameter of the model which published tensors it is
made of and where their rows go; loading reads it in one direction and saving in the other.

Nothing here needs Paddle except :func:`load_checkpoint` and :func:`take_over`, so that conversion runs with NumPy alone.
"""

import itertools
import math
import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor, wait

import numpy as np

from .contents import LAYOUTS, Checkpoint, OpenFiles, check_choices, fill
from .saving import convert_checkpoint, save_checkpoint, save_packed
from .tensors import ARRAY_DTYPES

__all__ = [
    "LAYOUTS",
    "Checkpoint",
    "convert_checkpoint",
    "load_checkpoint",
    "read_parameters",
    "save_checkpoint",
    "save_packed",
]


def read_parameters(config, directory, dtype):
    """Read a checkpoint in either layout, a few blocks at a time.

    Args:
        config: the model's configuration, which has a ``weight_table()``.
        directory: where the weight files are; or a :class:`Checkpoint` of it.
        dtype: ``float32``, ``bfloat16`` or ``float16``.

    Yields:
        ``(name, array)`` for every parameter as soon as it is complete, in no particular order. Arrays have the
        parameter's shape and start at a multiple of 64 bytes; bfloat16 comes as its bits in ``uint16``.

    Raises:
        CheckpointError: see :class:`Checkpoint`; or a value does not fit into float16.
    """
    check_choices("torch", dtype)
    checkpoint = directory if isinstance(directory, Checkpoint) else Checkpoint(directory, config)
    arrays, unread = {}, {source.weight.name: len(source.weight.parts) for source in checkpoint.sources}

    def fill_calls(sources, files):
        for source in sources:
            weight = source.weight
            if weight.name not in arrays:
                arrays[weight.name] = aligned_empty(weight.shape, ARRAY_DTYPES[dtype])
            yield source, files.get(source.location), arrays[weight.name], dtype

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        for _, sources in itertools.groupby(checkpoint.sources, key=lambda source: source.location.path):
            with OpenFiles() as files:
                for name in _in_background(pool, fill, fill_calls(sources, files)):
                    unread[name] -= 1
                    if not unread[name]:
                        yield name, arrays.pop(name)


def _in_background(pool, function, calls, ahead=8):
    """Yield the results of ``function(*call)`` in order, working on no more than ``ahead`` calls at a time."""
    futures = deque()
    try:
        for call in calls:
            futures.append(pool.submit(function, *call))
            if len(futures) > ahead:
                yield futures.popleft().result()
        while futures:
            yield futures.popleft().result()
    finally:
        for future in futures:
            future.cancel()
        wait(futures)


def aligned_empty(shape, dtype, alignment=64):
    """Like ``np.empty``, at an address that suits vector loads."""
    size = math.prod(shape) * dtype.itemsize
    buffer = np.empty(size + alignment, np.uint8)
    start = -buffer.ctypes.data % alignment
    return buffer[start : start + size].view(dtype).reshape(shape)


def load_checkpoint(model, directory, dtype, keep=None):
    """Give a model the weights of a checkpoint, in either layout.

    Args:
        model: an ``InternVLChatModel``; best built under ``paddle.LazyGuard``, so that its parameters take no memory
            before. On CPU each takes over the very array that was read, so the peak is the model and a few blocks.
        directory: where the weight files are; or a :class:`Checkpoint` of it, made before the model was built.
        dtype: ``float32``, ``bfloat16`` or ``float16``: what the parameters become.
        keep: called with a parameter's name; where it is False the parameter gets shape and dtype alone, for training that
            divides weights over processes. None keeps all.

    Raises:
        CheckpointError: see :func:`read_parameters`.
    """
    parameters = model.state_dict()
    for name, array in read_parameters(model.config, directory, dtype):
        take_over(parameters[name], array)
        if keep is not None and not keep(name):
            parameters[name]._clear_data()


def take_over(parameter, array):
    """Let a parameter be an array, in its dtype; bfloat16 comes as ``uint16``. On CPU nothing is copied but bfloat16."""
    import paddle  # here, because the rest of this file serves programs that do without

    place = paddle.get_device()
    # to_tensor() takes the bits of bfloat16 for what they are, but copies them; DLPack shares the array's memory.
    tensor = paddle.to_tensor(array, place=place) if array.dtype == np.uint16 else paddle.from_dlpack(array).to(place)
    tensor._share_buffer_to(parameter)  # set_value would copy, and cannot change the dtype
