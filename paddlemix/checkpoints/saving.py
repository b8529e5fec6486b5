"""Writing weights: of a model, and of a checkpoint in another layout or dtype."""

import contextlib
import os
import tempfile

import numpy as np

from paddlemix.errors import CheckpointError
from paddlemix.quantised import group_size

from .contents import OpenFiles, by_parameter, check_choices, clip, converted, fill, is_by_columns
from .files import name_some
from .packed import outgoing
from .safetensors_files import OutgoingTensor, write_safetensors
from .tensors import ARRAY_DTYPES, DTYPES, blocks, convert_dtype, holds_exactly, row_count, rows_per_block

# What other programs want to see in a file: transformers reads "pt" only, and PaddleNLP takes "pt" for transposed.
_METADATA = {"torch": {"format": "pt"}, "paddle": {"format": "np"}, "hf": {"format": "pt"}}


def save_checkpoint(
    model, config, directory, layout="torch", max_shard_size="5GB", dtype=None, progress=None, stored_dtypes=None
):
    """Write weights under their published names, as safetensors with an index where there are several files.

    Args:
        model: an ``InternVLChatModel``, or its ``state_dict()``.
        config: its configuration.
        directory: is made if it does not exist. Weights in it stay intact until the new ones are complete.
        layout: ``torch`` for the original's and every engine that reads it, ``paddle`` for the existing Paddle port, ``hf``
            for transformers' own.
        max_shard_size: largest file, such as ``"5GB"``.
        dtype: ``float32``, ``bfloat16`` or ``float16``; by default each tensor keeps its own.
        progress: is called with the number of bytes after each block.
        stored_dtypes: what the tensors came in, by published name (:attr:`Checkpoint.stored_dtypes`). They go back to it
            if these dtypes hold all values exactly, as they do unless the model was trained; None for not.

    Raises:
        CheckpointError: parameters are missing, unexpected or of a wrong shape, or the disk refuses.
    """
    check_choices(layout, dtype)
    parameters = model.state_dict() if hasattr(model, "state_dict") else model
    table = config.weight_table("hf") if layout == "hf" else config.weight_table()
    shapes = {weight.name: weight.shape for weight in table}
    wrong = sorted(shapes.keys() ^ parameters.keys())
    wrong += [name for name, shape in shapes.items() if name in parameters and tuple(parameters[name].shape) != shape]
    if wrong:
        raise CheckpointError(
            f"the model does not fit its configuration and was not saved: {len(wrong)} parameters are missing, "
            f"unexpected or of another shape ({name_some(wrong)})"
        )
    latest = {}  # the parameter in work as an array: its parts follow each other, and fetching it is a copy

    def fetch(name):
        if name not in latest:
            latest.clear()
            value = parameters[name]
            latest[name] = value if isinstance(value, np.ndarray) else value.detach().numpy()
        return latest[name]

    def is_exact(weight):
        """Whether each part of a parameter has a dtype that it came in, and that dtype holds its values."""
        source, array = _dtype_name(weight.name, parameters[weight.name]), fetch(weight.name)
        outputs = array.T if weight.linear else array
        for part in weight.parts:
            target = stored_dtypes.get(part.name)
            if target is None or ARRAY_DTYPES[target].itemsize > array.itemsize:
                return False  # what memory holds in fewer bits is not what came
            for _, output, count in part.runs if target != source else ():
                if not holds_exactly(outputs[output : output + count], source, target):
                    return False
        return True

    chosen = {}
    if stored_dtypes is not None and dtype is None and all(map(is_exact, table)):
        chosen = stored_dtypes

    def outgoing(weight, part, owners):
        source = _dtype_name(weight.name, parameters[weight.name])
        target = dtype or chosen.get(part.name, source)
        by_columns = is_by_columns(weight, layout)
        shape = part.shape[::-1] if by_columns else part.shape

        def stacked():
            for owner in owners:
                yield converted(part.name, np.ascontiguousarray(fetch(owner.name))[None], source, target)

        def rows():
            array = fetch(weight.name)
            outputs = array.T if weight.linear else array.reshape([-1]) if not array.ndim else array
            for start, stop in blocks(row_count(shape), rows_per_block(shape, array.itemsize)):
                block = np.empty((stop - start, *shape[1:]), array.dtype)
                if by_columns:
                    for row, output, count in part.runs:
                        block[:, row : row + count] = array[start:stop, output : output + count]
                else:
                    for row, output in clip(part.runs, start, stop):
                        block[row] = outputs[output]
                yield converted(part.name, block, source, target)

        if part.index is not None:
            return OutgoingTensor(part.name, target, part.stored_shape, stacked)
        return OutgoingTensor(part.name, target, shape, rows)

    published = {}  # by name: several weights own a tensor that has experts stacked
    for weight in table:
        for part in weight.parts:
            published.setdefault(part.name, (weight, part, []))[2].append(weight)
    tensors = [outgoing(*entry) for entry in published.values()]
    write_safetensors(directory, tensors, _METADATA[layout], max_shard_size, progress)


def _dtype_name(name, value):
    dtype = str(value.dtype).removeprefix("paddle.")
    dtype = "bfloat16" if dtype == "uint16" else dtype
    if dtype not in DTYPES:
        raise CheckpointError(f"{name} is {dtype} and cannot be saved: weights must be {', '.join(DTYPES)}")
    return dtype


def convert_checkpoint(checkpoint, directory, layout, max_shard_size="5GB", dtype=None, progress=None):
    """Write a checkpoint in another layout or dtype, holding no more than one tensor of it.

    Args:
        checkpoint: a :class:`Checkpoint`.
        directory, layout, max_shard_size, dtype, progress: as in :func:`save_checkpoint`.

    Raises:
        CheckpointError: see :func:`read_parameters` and :func:`save_checkpoint`.
    """
    if "hf" in (layout, checkpoint.layout) and layout != checkpoint.layout:
        # Other tensors, not the same ones turned: put together parameter by parameter.
        with reading(checkpoint) as lazy:
            save_checkpoint(lazy, checkpoint.config, directory, layout, max_shard_size, dtype, progress)
        return
    with _OneOpenFile() as files:
        whole = {source.part.name: source for source in checkpoint.sources}  # experts that are stacked are one tensor
        tensors = [_converted_tensor(files, source, layout, dtype) for source in whole.values()]
        write_safetensors(directory, tensors, _METADATA[layout], max_shard_size, progress)


def convert_quantised(checkpoint, directory, bits, quantise, max_shard_size="5GB", dtype=None, progress=None):
    """Write a checkpoint with some weights in few bits, in the layout of :mod:`~.packed`, and the others as they are published.

    Args:
        checkpoint: a :class:`Checkpoint` in floating point.
        directory, max_shard_size, dtype, progress: as in :func:`save_checkpoint`; ``dtype`` is that of the others.
        bits: ``{parameter: 8 or 4}``.
        quantise: ``quantise(array [out, in], bits, group_size)`` gives a :class:`~paddlemix.quantised.Quantised`; the array is
            float32, or uint16 with the bits of bfloat16.

    Raises:
        CheckpointError: as of :func:`convert_checkpoint`, or the weights are in few bits already.
    """
    if checkpoint.packed:
        raise CheckpointError(f"{checkpoint.directory} is a quantised checkpoint already: take the original one to convert")
    parts = by_parameter(checkpoint.sources)
    os.makedirs(directory, exist_ok=True)
    # What is small is written first and what is large last, weight by weight in neither: codes wait on the disk.
    with tempfile.TemporaryDirectory(prefix=".rounding-", dir=directory) as room, _OneOpenFile() as files:
        tensors = []
        for name, sources in parts.items():
            if name not in bits:
                tensors += [_converted_tensor(files, source, "torch", dtype) for source in sources]
                continue
            whole = _Assembled(files, sources)
            array = whole.numpy()
            array = array if whole.dtype in ("float32", "bfloat16") else convert_dtype(array, whole.dtype, "float32")
            array = np.ascontiguousarray(array.T) if sources[0].weight.linear else array
            packed = quantise(array, bits[name], group_size(name, array.shape[1], bits[name]))
            for number, (key, kind, values) in enumerate(outgoing(name, packed)):
                path = os.path.join(room, f"{len(tensors)}-{number}.npy")
                np.save(path, values)
                tensors.append(OutgoingTensor(key, kind, values.shape, lambda path=path: [np.load(path)]))
        write_safetensors(directory, tensors, _METADATA["torch"], max_shard_size, progress)


@contextlib.contextmanager
def reading(checkpoint, names=None, dtype=None):
    """Within the block: ``{parameter: value}`` of a checkpoint for :func:`save_checkpoint`, read when it is asked for.

    Args:
        checkpoint: a :class:`Checkpoint`.
        names: of the parameters; None for all.
        dtype: what they become; None for what they are, float32 where parts of one differ.
    """
    with _OneOpenFile() as files:
        yield {name: _Assembled(files, parts, dtype) for name, parts in by_parameter(checkpoint.sources, names).items()}


class _Assembled:
    """A parameter that is put together from a checkpoint when it is asked for; in float32 where its parts differ in dtype."""

    def __init__(self, files, sources, dtype=None):
        self.files, self.sources, self.shape = files, sources, sources[0].weight.shape
        dtypes = {source.location.dtype for source in sources}
        self.dtype = dtype or (dtypes.pop() if len(dtypes) == 1 else "float32")

    def detach(self):
        return self

    def numpy(self):
        array = np.empty(self.shape, ARRAY_DTYPES[self.dtype])
        for source in self.sources:
            fill(source, self.files.get(source.location), array, self.dtype)
        return array


def save_packed(source, config, directory, layout="torch", max_shard_size="5GB"):
    """Save a model whose weights are in a form that cannot be read back, from the files that it was loaded from.

    Args:
        source: the :class:`Checkpoint` that it was loaded from; None where nobody knows.
        config: its configuration.
        directory, layout, max_shard_size: as in :func:`save_checkpoint`.

    Raises:
        CheckpointError: the files have changed, or do not hold what the model holds; the disk refuses.
    """
    if source is None:
        raise CheckpointError(
            "weights packed for the CPU engine cannot be saved: load the model with engine='eager' to save it"
        )
    if source.packed:
        raise CheckpointError(f"{source.directory} is a quantised checkpoint: copy its folder, or save the original one")
    if not source.describes(config):
        raise CheckpointError(
            f"{source.directory} does not hold what the packed model holds, since LoRA adapters were merged or sizes changed: "
            "load it with engine='eager' to save it, or merge it by `python -m paddlemix.models.internvl2.merge_lora`"
        )
    changed = source.changed_files()
    if changed:
        raise CheckpointError(
            f"{changed[0]} has changed or is gone since the packed model was loaded from it, so the model cannot be saved: "
            "put the file back, or load the model again"
        )
    convert_checkpoint(source, directory, layout, max_shard_size)


class _OneOpenFile(OpenFiles):
    """Of which only the file that was asked for last stays open."""

    path = None

    def get(self, location):
        """The stored tensor at a location."""
        if location.path != self.path:
            self.close()
            self.path = location.path
        return super().get(location)


def _converted_tensor(files, source, layout, dtype):
    location, weight, part, was_by_columns = source[:4]  # all of it: who converts has no share
    by_columns = is_by_columns(weight, layout)
    shape = part.shape[::-1] if by_columns else part.stored_shape
    target = dtype or location.dtype

    def rows():
        stored = files.get(location)
        if by_columns == was_by_columns:
            pieces = (piece for _, _, piece in stored.blocks())
        else:
            whole = stored.read(0, stored.shape[0]).T
            spans = blocks(shape[0], rows_per_block(shape, whole.itemsize))
            pieces = (whole[start:stop] for start, stop in spans)
        for piece in pieces:
            yield np.ascontiguousarray(converted(part.name, piece, location.dtype, target))

    return OutgoingTensor(part.name, target, shape, rows)
