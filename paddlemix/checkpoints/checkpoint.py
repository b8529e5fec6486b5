"""Weights of a checkpoint: the way into a model; :mod:`~.contents` tells what a directory holds, :mod:`~.saving` writes.

A configuration's ``weight_table()`` (:mod:`~.names`) says of every parameter of the model which published tensors it is
made of and where their rows go; loading reads it in one direction and saving in the other.

Nothing here needs Paddle except :func:`load_checkpoint` and :func:`take_over`, so that conversion runs with NumPy alone.
"""

import itertools
import math
import mmap
import os
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor, wait

import numpy as np

from paddlemix.errors import CheckpointError
from paddlemix.quantised import joined, quantise

from .contents import LAYOUTS, Checkpoint, OpenFiles, by_parameter, check_choices, fill
from .saving import convert_checkpoint, save_checkpoint, save_packed
from .tensors import ARRAY_DTYPES, convert_dtype

__all__ = [
    "LAYOUTS",
    "Checkpoint",
    "convert_checkpoint",
    "load_checkpoint",
    "read_parameters",
    "save_checkpoint",
    "save_packed",
]


_LARGE = 1 << 20  # bytes


def read_parameters(config, directory, dtype, quantised=(), skip=(), shares=None, sinks=None):
    """Read a checkpoint in either layout, a few blocks at a time.

    Args:
        config: the model's configuration, which has a ``weight_table()``.
        directory: where the weight files are; or a :class:`Checkpoint` of it.
        dtype: ``float32``, ``bfloat16`` or ``float16``.
        quantised: names of parameters that will be in few bits. They come as ``[out, in]``, in bfloat16 where all their parts
            are, else in float32; or as a :class:`~paddlemix.quantised.Quantised` where the files have them in few bits.
        skip: names of parameters that are not read.
        shares: called with a parameter's name; the :class:`~.contents.Share` of it that is wanted, None for all of it, or
            ``NOTHING``. None wants all of all. With it what is in few bits in the files, but not among ``quantised``, comes in
            floating point.
        sinks: called with the name and shape ``[out, in]`` of one of ``quantised``: what takes its rows as they are read, by
            ``put(first output, rows)``, and then comes in the place of its array; or None for an array. Not where its rows are
            not outputs. None for none.

    Yields:
        ``(name, array)`` for every parameter as soon as it is complete, in no particular order. Arrays have the
        parameter's shape and start at a multiple of 64 bytes; bfloat16 comes as its bits in ``uint16``.

    Raises:
        CheckpointError: see :class:`Checkpoint`; or a value does not fit into float16; or a parameter is in few bits in the
            files that is not among ``quantised``.
    """
    check_choices("torch", dtype)
    checkpoint = directory if isinstance(directory, Checkpoint) else Checkpoint(directory, config)
    packed = checkpoint.packed
    if packed - set(quantised) and shares is None:
        raise CheckpointError(
            f"{checkpoint.directory} is a quantised checkpoint, which can be asked but not trained, merged or converted: take "
            "the original one, in bfloat16 or float16"
        )
    stored = {}
    for source in checkpoint.sources:
        stored.setdefault(source.weight.name, set()).add(source.location.dtype)
    targets = {name: "bfloat16" if stored[name] == {"bfloat16"} else "float32" for name in quantised if name in stored}
    source_weights = {source.weight.name: source.weight for source in checkpoint.sources}
    arrays, turned = {}, set()
    wanted = checkpoint.sources if shares is None else list(_shared(checkpoint.sources, shares))
    unread = Counter(source.weight.name for source in wanted)
    whole = {source.weight.name for source in wanted if source.by_columns or source.is_share or source.part.index is not None}
    for name, sources in by_parameter(wanted, packed - set(skip)).items():
        weight = sources[0].weight
        with OpenFiles() as files:
            value = _joined(weight, sources, files)
        yield name, value if name in quantised else _plain(weight, value, dtype)

    def fill_calls(sources, files):
        for source in sources:
            weight, target = source.weight, targets.get(source.weight.name, dtype)
            if weight.name not in arrays:
                turn = weight.name in targets and weight.linear
                if sinks is not None and weight.name in targets and weight.name not in whole:
                    sink = sinks(weight.name, weight.shape[::-1] if turn else weight.shape)
                    if sink is not None:
                        arrays[weight.name] = sink
                        yield source, files.get(source.location), sink, target
                        continue
                array = aligned_empty(weight.shape[::-1] if turn else weight.shape, ARRAY_DTYPES[target])
                arrays[weight.name] = array.T if turn else array
                turned.update([weight.name] if turn else [])
            yield source, files.get(source.location), arrays[weight.name], target

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        plain = [source for source in wanted if source.weight.name not in packed and source.weight.name not in skip]
        for _, sources in itertools.groupby(plain, key=lambda source: source.location.path):
            with OpenFiles() as files:
                for name in _in_background(pool, fill, fill_calls(sources, files)):
                    unread[name] -= 1
                    if not unread[name]:
                        array = arrays.pop(name)
                        stacked = name in targets and source_weights[name].parts[0].index is not None and name not in turned
                        yield name, array.T if name in turned else np.ascontiguousarray(array.T) if stacked else array


def _joined(weight, sources, files):
    """A parameter in few bits, made of its parts; those that are not so yet become so in 8 bits."""
    parts = []
    for source in sources:
        if source.location.packed:
            value = files.packed(source)
        else:
            array = aligned_empty(source.part.shape, ARRAY_DTYPES["float32"])
            whole = source._replace(part=source.part._replace(runs=((0, 0, len(array)),)), inputs=None, is_share=False)
            fill(whole, files.get(source.location), array.T if weight.linear else array, "float32")
            value = quantise(array, 8)
        for first, _, count in source.inputs or ():  # a share of them
            value = value.columns(first, count)
        parts.append((value, source.part.runs))
    return joined(parts)


def _plain(weight, value, dtype):
    """A parameter in floating point that is in few bits in the files."""
    array = convert_dtype(value.dequantised(), "float32", dtype)
    there = aligned_empty(weight.shape, array.dtype)
    there[...] = array.T if weight.linear else array
    return there


NOTHING = object()


def _shared(sources, shares):
    for source in sources:
        share = shares(source.weight.name)
        if share is NOTHING:
            continue
        source = source if share is None else source.shared(share)
        if source is not None:
            yield source


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
    """Like ``np.empty``, at an address that suits vector loads; what is large goes back to the system once nobody needs it."""
    size = math.prod(shape) * dtype.itemsize
    if size >= _LARGE:
        return np.frombuffer(mmap.mmap(-1, size), dtype).reshape(shape)
    buffer = np.empty(size + alignment, np.uint8)
    start = -buffer.ctypes.data % alignment
    return buffer[start : start + size].view(dtype).reshape(shape)


def load_checkpoint(model, directory, dtype, keep=None, shares=None, skip=()):
    """Give a model the weights of a checkpoint, in either layout.

    Args:
        model: an ``InternVLChatModel``; best built under ``paddle.LazyGuard``, so that its parameters take no memory
            before. On CPU each takes over the very array that was read, so the peak is the model and a few blocks.
        directory: where the weight files are; or a :class:`Checkpoint` of it, made before the model was built.
        dtype: ``float32``, ``bfloat16`` or ``float16``: what the parameters become.
        keep: called with a parameter's name; where it is False the parameter gets shape and dtype alone, for training that
            divides weights over processes. None keeps all.
        shares: see :func:`read_parameters`.
        skip: names of parameters that stay without values.

    Raises:
        CheckpointError: see :func:`read_parameters`.
    """
    parameters, quantised = model.state_dict(), getattr(model, "quantised_layers", {})
    there = {name for name, layer in quantised.items() if layer.quantised is not None}  # from the cache
    sinks = None if shares is not None else lambda name, shape: quantised[name].rows(shape)
    for name, array in read_parameters(model.config, directory, dtype, quantised, there.union(skip), shares, sinks):
        if name in quantised:
            quantised[name].take(array)
            continue
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
