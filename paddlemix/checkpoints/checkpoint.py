"""Weights of a checkpoint: their layouts, and the way into and out of a model.

A configuration's ``weight_table()`` (:mod:`~.names`) says of every parameter of the model which published tensors it is
made of and where their rows go; loading reads it in one direction and saving in the other. Published tensors come in two
layouts: ``torch`` is the original's, ``paddle`` that of the existing Paddle port, with the same names and 2-D weights of
linear layers transposed to ``[in, out]``. Inside the model linear weights are ``[in, out]`` as well.

Nothing here needs Paddle except :func:`load_checkpoint`, so that conversion runs with NumPy alone.
"""

import contextlib
import dataclasses
import itertools
import math
import os
import re
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor, wait
from typing import NamedTuple

import numpy as np

from paddlemix.errors import CheckpointError

from .files import find_weight_files, fingerprint, name_some, open_weight_file
from .hf_names import STACKED, is_hf, normalised
from .names import Part, Weight, head_name
from .safetensors_files import OutgoingTensor, write_safetensors
from .tensors import ARRAY_DTYPES, DTYPES, blocks, convert_dtype, holds_exactly, row_count, rows_per_block

LAYOUTS = ("torch", "paddle", "hf")
# What other programs want to see in a file: transformers reads "pt" only, and PaddleNLP takes "pt" for transposed.
_METADATA = {"torch": {"format": "pt"}, "paddle": {"format": "np"}, "hf": {"format": "pt"}}

# ---------------------------------------------------------------------- what a directory holds

_BUFFERS = re.compile(r"(^|\.)(rotary_emb\.\w+|position_ids)$")  # computed, not learned; some old files have them
_PADDLENLP_BASE = re.compile(r"^language_model\.(?:qwen2|llama)\.")  # what PaddleNLP calls `model`


class _Location(NamedTuple):
    path: str
    key: str
    dtype: str
    shape: tuple


class _Source(NamedTuple):
    """Where a part of a weight is found; ``by_columns``: rows of the stored tensor are inputs of the weight, not outputs."""

    location: _Location
    weight: Weight
    part: Part
    by_columns: bool


class Checkpoint:
    """The published tensors in a directory, checked against a configuration; their values are not read yet.

    Attributes:
        directory: where it is.
        layout: ``torch`` or ``paddle``, found out from the shapes.
        sources: a list of where each part of each weight is, file by file.
        dtypes: for each dtype that occurs, the number of values in it.

    Raises:
        CheckpointError: files are missing or damaged; tensors are missing, unexpected, of a wrong shape, of a dtype
            that is not supported, or twice there.
    """

    def __init__(self, directory, config):
        self.directory = directory
        self._fingerprints, found = _scan(directory)
        only = getattr(config, "reads_only", "")  # a tower can be read from the file of a whole model
        found = {name: location for name, location in found.items() if name.startswith(only)}
        # Names of LLaVA's own begin like those of transformers' layout of other models.
        in_hf, self.config, self._table = getattr(config, "has_hf_layout", True) and is_hf(found), config, ()
        if in_hf:
            found = normalised(directory, found)
            self._table = "hf", any(map(STACKED.fullmatch, found))
        table = config.weight_table(*self._table)
        parts = [(weight, part) for weight in table for part in weight.parts]
        for _, part in parts:
            earlier = part.name.replace(".base_layer.", ".")  # what older versions of PEFT call it
            if part.name not in found and earlier in found:
                found[part.name] = found.pop(earlier)
        borrowed = []
        language = getattr(config, "llm_config", None)
        if language is not None and language.tie_word_embeddings:
            found.pop(
                "language_model.lm_head.weight" if in_hf else head_name(language), None
            )  # a copy of the embedding, or of no meaning
        elif language is not None and (in_hf or language.may_lack_head) and parts[-1][1].name not in found:
            # Without a head of its own, the head is the token embedding, which no layout transposes.
            weight, part = parts.pop()
            embedding = next(part.name for weight, part in parts if weight.name.endswith(".embed_tokens.weight"))
            if embedding in found:
                borrowed = [_Source(found[embedding], weight, part, False)]
        self.layout = _check_tensors(directory, parts, found, config)
        self.layout = "hf" if in_hf else self.layout
        sources = [_Source(found[part.name], w, part, _by_columns(w, self.layout)) for w, part in parts] + borrowed
        # File by file, so that each is opened once; the sort is stable, so within a file in the table's order.
        self.sources = sorted(sources, key=lambda source: source.location.path)
        self.dtypes = Counter()
        for source in sources:
            self.dtypes[source.location.dtype] += math.prod(source.part.shape)

    def describes(self, config):
        """Whether a model of this configuration has these tensors and no others."""
        parts = {part.name: part.shape for weight in config.weight_table(*self._table) for part in weight.parts}
        return parts == {source.part.name: source.part.shape for source in self.sources}

    @property
    def stored_dtypes(self):
        """The dtype in the files of each published tensor that the model is made of, by name."""
        return {source.part.name: source.location.dtype for source in self.sources}

    def changed_files(self):
        """Those weight files that are no longer what they were when this was made, by :func:`~.files.fingerprint`."""
        return [path for path, before in self._fingerprints.items() if fingerprint(path) != before]


def _by_columns(weight, layout):
    return weight.linear and layout == "paddle"


def _scan(directory):
    """Fingerprints of the weight files, and locations of all tensors of a checkpoint by their published names."""
    paths, index = find_weight_files(directory)
    found, fingerprints = {}, {}
    for path in paths:
        fingerprints[path] = fingerprint(path)
        with open_weight_file(path) as tensors:
            for key, tensor in tensors.items():
                if _BUFFERS.search(key):
                    continue
                name = _PADDLENLP_BASE.sub("language_model.model.", key)
                if name in found:
                    raise CheckpointError(f"{name} is both in {found[name].path} and in {path}: remove the wrong file")
                found[name] = _Location(path, key, tensor.dtype, tensor.shape)
            lost = [key for key, file in (index or {}).items() if file == os.path.basename(path) and key not in tensors]
            if lost:
                raise CheckpointError(
                    f"{path} lacks {len(lost)} tensors that the index says are in it ({name_some(lost)}): "
                    "the two are not of the same checkpoint; download or copy both again"
                )
    return fingerprints, found


def _check_not_quantised(directory, found, config):
    said = [part.extra.get("quantization_config") for part in (config, getattr(config, "llm_config", None)) if part is not None]
    methods = [str(s.get("quant_method", "no named")) if isinstance(s, dict) else str(s) for s in said if s]
    packed = next((name for name in found if name.endswith((".qweight", ".qzeros", ".scales", ".absmax", ".SCB"))), None)
    if methods or packed:
        sign = f"its config.json has a quantization_config of method {methods[0][:40]}" if methods else f"it has {packed}"
        raise CheckpointError(
            f"{directory} is a quantised checkpoint ({sign}): these cannot be read, so take the original one, in bfloat16 or "
            "float16"
        )


def _check_tensors(directory, parts, found, config):
    """The layout of the tensors ``found``, after checking that they are those of ``parts``."""
    _check_not_quantised(directory, found, config)
    for name, location in found.items():
        if location.dtype not in ARRAY_DTYPES:
            raise CheckpointError(
                f"{location.path}: {name} is of dtype {location.dtype}, but weights must be {', '.join(DTYPES)}; "
                "quantised checkpoints (AWQ, GPTQ, 8 and 4 bits) are not supported, take the original one"
            )
    expected = {part.name for _, part in parts}
    wrong, layouts = [], {}
    for weight, part in parts:
        shape = found[part.name].shape if part.name in found else part.stored_shape
        if shape != part.stored_shape and not (weight.linear and shape == part.shape[::-1]):
            wrong.append(f"{part.name} is {list(shape)} instead of {list(part.stored_shape)}")
        elif part.name in found and weight.linear and part.index is None and shape[0] != shape[1]:
            layouts.setdefault("torch" if shape == part.shape else "paddle", part.name)
    missing = list(dict.fromkeys(part.name for _, part in parts if part.name not in found))
    wrong = list(dict.fromkeys(wrong))
    unexpected = [name for name in found if name not in expected]
    problems = [
        f"{len(names)} {what} ({name_some(names)})"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", wrong))
        if names
    ]
    if problems:
        lora = any("lora_" in name for name in unexpected)
        hint = "merge the LoRA weights into the model first" if lora else "take both from the same model"
        named = "".join(f"; {key}" for key in _contradictions(parts, found, config))
        raise CheckpointError(f"the tensors in {directory} do not fit its config.json: {'; '.join(problems)}{named}; {hint}")
    if len(layouts) > 1:
        raise CheckpointError(
            f"{directory} mixes two layouts: {layouts['torch']} is [out, in] as in PyTorch, {layouts['paddle']} is "
            "[in, out] as in Paddle; take all files from the same model"
        )
    # The vision model's qkv is never square, so some shape always tells.
    return next(iter(layouts), "torch")


def _contradictions(parts, found, config):
    """Which sizes of the configuration the tensors contradict, as far as that can be told, for a message."""
    sections = {name: vars(value) for name, value in vars(config).items() if dataclasses.is_dataclass(value)}

    def keys(value, names=None):
        for section, values in sections.items():
            for key, number in values.items():
                if number == value and not isinstance(number, bool) and (names is None or key in names):
                    yield f"{section}.{key} is {value}"

    said = {}
    layers = re.compile(r"(.*\blayers)\.(\d+)\.")
    depths = [Counter(), Counter()]
    for depth, names in zip(depths, ([part.name for _, part in parts], found)):
        for match in filter(None, map(layers.match, names)):
            depth[match[1]] = max(depth[match[1]], int(match[2]) + 1)
    for stack in depths[0].keys() & depths[1].keys():
        asked, there = depths[0][stack], depths[1][stack]
        if asked != there:
            said.update((key, f"{key} but the files have {there} layers") for key in keys(asked, ("num_hidden_layers",)))
    for _, part in parts:
        there = found[part.name].shape if part.name in found else part.shape
        if len(there) == len(part.shape) and sorted(there) != sorted(part.shape):
            for asked, size in zip(part.shape, there):
                if asked != size:
                    said.update((key, f"{key} where {part.name} has {size}") for key in keys(asked) if key not in said)
    return list(said.values())[:3]


def _clip(runs, start, stop):
    """The part of ``runs`` within rows ``start`` to ``stop``, as ``(slice of these rows, slice of outputs)``."""
    for row, output, count in runs:
        first, last = max(row, start), min(row + count, stop)
        if first < last:
            yield slice(first - start, last - start), slice(output + first - row, output + last - row)


def _converted(name, array, source, target):
    try:
        return convert_dtype(array, source, target)
    except OverflowError as error:
        raise CheckpointError(f"{name} cannot become float16: {error}; use bfloat16 or float32") from None


def _check_choices(layout, dtype):
    if layout not in LAYOUTS:
        raise CheckpointError(f"layout is '{layout}': it must be one of {', '.join(LAYOUTS)}")
    if dtype is not None and dtype not in DTYPES:
        raise CheckpointError(f"dtype is '{dtype}': it must be one of {', '.join(DTYPES)}")


# ---------------------------------------------------------------------- loading


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
    _check_choices("torch", dtype)
    checkpoint = directory if isinstance(directory, Checkpoint) else Checkpoint(directory, config)
    arrays, unread = {}, {source.weight.name: len(source.weight.parts) for source in checkpoint.sources}

    def fill_calls(sources, tensors):
        for source in sources:
            weight = source.weight
            if weight.name not in arrays:
                arrays[weight.name] = _aligned_empty(weight.shape, ARRAY_DTYPES[dtype])
            yield source, tensors[source.location.key], arrays[weight.name], dtype

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        for path, sources in itertools.groupby(checkpoint.sources, key=lambda source: source.location.path):
            with open_weight_file(path) as tensors:
                for name in _in_background(pool, _fill, fill_calls(sources, tensors)):
                    unread[name] -= 1
                    if not unread[name]:
                        yield name, arrays.pop(name)


def _fill(source, stored, array, dtype):
    """Put a published tensor in its place in the parameter ``array``; return the parameter's name."""
    _, weight, part, by_columns = source
    outputs = array.T if weight.linear else array.reshape([-1]) if not array.ndim else array
    for start, stop, rows in _blocks_of(part, stored):
        rows = _converted(part.name, rows, stored.dtype, dtype)
        if by_columns:
            for row, output, count in part.runs:
                array[start:stop, output : output + count] = rows[:, row : row + count]
        else:
            for row, output in _clip(part.runs, start, stop):
                outputs[output] = rows[row]
    return weight.name


def _blocks_of(part, stored):
    """Yield ``(start, stop, rows)`` over a part, which may be one of those that a stored tensor has stacked."""
    if part.index is None:
        yield from stored.blocks()
    else:
        yield 0, part.shape[0], stored.read(part.index, part.index + 1)[0]


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


def _aligned_empty(shape, dtype, alignment=64):
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
    import paddle  # here, because the rest of this file serves programs that do without

    parameters = model.state_dict()
    place = paddle.get_device()
    for name, array in read_parameters(model.config, directory, dtype):
        # to_tensor() takes the bits of bfloat16 for what they are, but copies them; DLPack shares the array's memory.
        tensor = paddle.to_tensor(array, place=place) if dtype == "bfloat16" else paddle.from_dlpack(array).to(place)
        tensor._share_buffer_to(parameters[name])  # set_value would copy, and cannot change the dtype
        if keep is not None and not keep(name):
            parameters[name]._clear_data()


# ---------------------------------------------------------------------- saving


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
    _check_choices(layout, dtype)
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
        by_columns = _by_columns(weight, layout)
        shape = part.shape[::-1] if by_columns else part.shape

        def stacked():
            for owner in owners:
                yield _converted(part.name, np.ascontiguousarray(fetch(owner.name))[None], source, target)

        def rows():
            array = fetch(weight.name)
            outputs = array.T if weight.linear else array.reshape([-1]) if not array.ndim else array
            for start, stop in blocks(row_count(shape), rows_per_block(shape, array.itemsize)):
                block = np.empty((stop - start, *shape[1:]), array.dtype)
                if by_columns:
                    for row, output, count in part.runs:
                        block[:, row : row + count] = array[start:stop, output : output + count]
                else:
                    for row, output in _clip(part.runs, start, stop):
                        block[row] = outputs[output]
                yield _converted(part.name, block, source, target)

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
        with _OneOpenFile() as files:
            parts = {}
            for source in checkpoint.sources:
                parts.setdefault(source.weight.name, []).append(source)
            lazy = {name: _Assembled(files, sources) for name, sources in parts.items()}
            save_checkpoint(lazy, checkpoint.config, directory, layout, max_shard_size, dtype, progress)
        return
    with _OneOpenFile() as files:
        whole = {source.part.name: source for source in checkpoint.sources}  # experts that are stacked are one tensor
        tensors = [_converted_tensor(files, source, layout, dtype) for source in whole.values()]
        write_safetensors(directory, tensors, _METADATA[layout], max_shard_size, progress)


class _Assembled:
    """A parameter that is put together from a checkpoint when it is asked for; in float32 where its parts differ in dtype."""

    def __init__(self, files, sources):
        self.files, self.sources, self.shape = files, sources, sources[0].weight.shape
        dtypes = {source.location.dtype for source in sources}
        self.dtype = dtypes.pop() if len(dtypes) == 1 else "float32"

    def detach(self):
        return self

    def numpy(self):
        array = np.empty(self.shape, ARRAY_DTYPES[self.dtype])
        for source in self.sources:
            _fill(source, self.files.get(source.location), array, self.dtype)
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


class _OneOpenFile(contextlib.ExitStack):
    """Tensors of weight files, of which only the one that was asked for last stays open."""

    path, tensors = None, None

    def get(self, location):
        """The stored tensor at a location."""
        if location.path != self.path:
            self.close()
            self.path, self.tensors = location.path, self.enter_context(open_weight_file(location.path))
        return self.tensors[location.key]


def _converted_tensor(files, source, layout, dtype):
    location, weight, part, was_by_columns = source
    by_columns = _by_columns(weight, layout)
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
            yield np.ascontiguousarray(_converted(part.name, piece, location.dtype, target))

    return OutgoingTensor(part.name, target, shape, rows)
