"""The published tensors in a directory, checked against a configuration, and how their rows go into parameters and back.

Published tensors come in two layouts with the same names: ``torch`` is the original's, ``paddle`` that of the existing Paddle
port, with 2-D weights of linear layers transposed to ``[in, out]``, as they are inside the model; ``hf`` has names of its own.
"""

import contextlib
import dataclasses
import math
import os
import re
from collections import Counter
from typing import NamedTuple

import numpy as np

from paddlemix.errors import CheckpointError
from paddlemix.quantised import padded

from . import mxfp4, packed
from .files import find_weight_files, fingerprint, name_some, open_weight_file
from .hf_names import STACKED, is_hf, normalised
from .names import Part, Weight, head_name
from .tensors import ARRAY_DTYPES, DTYPES, blocks, convert_dtype, row_count

LAYOUTS = ("torch", "paddle", "hf")

_SINK_BYTES = 2 << 20  # of rows in float32 that a sink gets at a time
_BUFFERS = re.compile(r"(^|\.)(rotary_emb\.\w+|position_ids)$")  # computed, not learned; some old files have them
_PADDLENLP_BASE = re.compile(r"^language_model\.(?:qwen2|llama)\.")  # what PaddleNLP calls `model`


class Location(NamedTuple):
    """Where a published tensor is; ``scales``: of what is packed as MXFP4, with dtype and shape of what it is read as;
    ``packed``: how all tensors of a weight in few bits are stored, whose ``dtype`` is then int8 or int4."""

    path: str
    key: str
    dtype: str
    shape: tuple
    scales: "Location | None" = None
    packed: "packed.Packed | None" = None


class Share(NamedTuple):
    """Which part of a parameter is wanted: along ``axis``, ``runs`` of ``(start in the whole, count)``, one after the other."""

    axis: int
    runs: tuple

    @property
    def size(self):
        """How many places it has along its axis."""
        return sum(count for _, count in self.runs)

    def of(self, shape):
        """The shape of the share of a parameter of ``shape``."""
        return (*shape[: self.axis], self.size, *shape[self.axis + 1 :])

    def take(self, array):
        """The share of a whole ``array``."""
        runs = [slice(start, start + count) for start, count in self.runs]
        parts = [array[(slice(None),) * self.axis + (run,)] for run in runs]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, self.axis)

    def put(self, array, share):
        """Write a ``share`` in its places of the whole ``array``."""
        at = 0
        for start, count in self.runs:
            before = (slice(None),) * self.axis
            array[(*before, slice(start, start + count))] = share[(*before, slice(at, at + count))]
            at += count


class Source(NamedTuple):
    """Where a part of a weight is found; ``by_columns``: rows of the stored tensor are inputs of the weight, not outputs.

    ``inputs``: of a linear weight of whose inputs a share is wanted, ``(input, place, count)`` each; None for all.
    """

    location: Location
    weight: Weight
    part: Part
    by_columns: bool
    inputs: tuple | None = None
    is_share: bool = False

    def shared(self, share):
        """The same of a share of the weight, of which nothing else is read; None where nothing of the share is in this part."""
        weight, part = self.weight._replace(shape=share.of(self.weight.shape)), self.part
        places = [0]
        for _, count in share.runs:
            places.append(places[-1] + count)
        if self.weight.linear and share.axis == 0:
            inputs = tuple((start, at, n) for (start, n), at in zip(share.runs, places))
            return self._replace(weight=weight, inputs=inputs, is_share=True)
        runs = []
        for row, output, count in part.runs:
            for (start, n), at in zip(share.runs, places):
                first, last = max(output, start), min(output + count, start + n)
                if first < last:
                    runs.append((row + first - output, at + first - start, last - first))
        return self._replace(weight=weight, part=part._replace(runs=tuple(runs)), is_share=True) if runs else None


class Checkpoint:
    """The published tensors in a directory, checked against a configuration; their values are not read yet.

    Attributes:
        directory: where it is.
        layout: ``torch`` or ``paddle``, found out from the shapes.
        sources: a list of where each part of each weight is, file by file.
        dtypes: for each dtype that occurs, the number of values in it.
        fingerprints: :func:`~.files.fingerprint` of each weight file, by path.

    Raises:
        CheckpointError: files are missing or damaged; tensors are missing, unexpected, of a wrong shape, of a dtype
            that is not supported, or twice there.
    """

    def __init__(self, directory, config):
        self.directory = directory
        paths, index = find_weight_files(directory)
        self.fingerprints = {path: fingerprint(path) for path in paths}
        found = locate(paths, index)
        only = getattr(config, "reads_only", "")  # a tower can be read from the file of a whole model
        found = {name: location for name, location in found.items() if name.startswith(only)}
        found = packed.grouped(found, _said(config), lambda *values: Location(*values[:4], packed=values[4]))
        # Names of LLaVA's own begin like those of transformers' layout of other models.
        in_hf, self.config, self._table = getattr(config, "has_hf_layout", True) and is_hf(found), config, ()
        if in_hf:
            found = normalised(directory, found)
            self._table = "hf", any(map(STACKED.fullmatch, found))
        table = [_as_stored(weight, found) for weight in config.weight_table(*self._table)]
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
                borrowed = [Source(found[embedding], weight, part, False)]
        self.layout = _check_tensors(directory, parts, found, config)
        self.layout = "hf" if in_hf else self.layout
        sources = [Source(found[part.name], w, part, is_by_columns(w, self.layout)) for w, part in parts] + borrowed
        # File by file, so that each is opened once; the sort is stable, so within a file in the table's order.
        self.sources = sorted(sources, key=lambda source: source.location.path)
        self.dtypes = Counter()
        for source in sources:
            self.dtypes[source.location.dtype] += math.prod(source.part.shape)

    @property
    def packed(self):
        """Names of the parameters that are in few bits in the files."""
        return {source.weight.name for source in self.sources if source.location.packed}

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
        return [path for path, before in self.fingerprints.items() if fingerprint(path) != before]


def by_parameter(sources, names=None):
    """``{parameter: its sources}`` of those whose parameter is among ``names``; None for all."""
    parts = {}
    for source in sources:
        if names is None or source.weight.name in names:
            parts.setdefault(source.weight.name, []).append(source)
    return parts


def locate(paths, index=None):
    """Where all tensors of some weight files are, by their published names; ``index``: see :func:`~.files.find_weight_files`.

    What is packed as MXFP4 is one tensor, as which it is read.
    """
    found = {}
    for path in paths:
        with open_weight_file(path) as tensors:
            for key, tensor in tensors.items():
                if _BUFFERS.search(key):
                    continue
                name = _PADDLENLP_BASE.sub("language_model.model.", key)
                if name in found:
                    raise CheckpointError(f"{name} is both in {found[name].path} and in {path}: remove the wrong file")
                found[name] = Location(path, key, tensor.dtype, tensor.shape)
            lost = [key for key, file in (index or {}).items() if file == os.path.basename(path) and key not in tensors]
            if lost:
                raise CheckpointError(
                    f"{path} lacks {len(lost)} tensors that the index says are in it ({name_some(lost)}): "
                    "the two are not of the same checkpoint; download or copy both again"
                )
    for name in mxfp4.packed_names(found):
        blocks, scales = found.pop(name + mxfp4.BLOCKS), found.pop(name + mxfp4.SCALES)
        found[name] = blocks._replace(dtype="bfloat16", shape=mxfp4.unpacked_shape(blocks.shape), scales=scales)
    return found


class OpenFiles(contextlib.ExitStack):
    """Tensors of weight files, each of which stays open until this is closed."""

    def __init__(self):
        super().__init__()
        self._opened = {}

    def packed(self, source):
        """The :class:`~paddlemix.quantised.Quantised` at a source in few bits."""
        found = packed.read(source.location, self.get, source.part.name)
        rows, inputs = source.part.shape
        if found.inputs != inputs:  # our own files know the width with what fills up
            found = dataclasses.replace(found, inputs=inputs)
        return found

    def get(self, location):
        """The stored tensor at a location."""
        stored = self._stored(location)
        return stored if location.scales is None else mxfp4.unpacked(stored, self._stored(location.scales))

    def _stored(self, location):
        if location.path not in self._opened:
            self._opened[location.path] = self.enter_context(open_weight_file(location.path))
        return self._opened[location.path][location.key]

    def close(self):
        super().close()
        self._opened = {}


def _said(config):
    """The ``quantization_config`` of a configuration or of its language model's."""
    parts = (config, getattr(config, "llm_config", None))
    return next(filter(None, (part.extra.get("quantization_config") for part in parts if hasattr(part, "extra"))), None)


def _as_stored(weight, found):
    """A weight, as one part of its own name where a file in our own layout has it so."""
    location = found.get(weight.name)
    if location is None or location.packed is None or location.packed.kind != packed.METHOD:
        return weight
    out, inputs = weight.shape[::-1] if weight.linear else weight.shape
    if location.shape == (out, padded(inputs, location.packed.group)):
        found[weight.name] = location._replace(shape=(out, inputs))
    return weight._replace(parts=(Part(weight.name, (out, inputs), ((0, 0, out),)),))


def _check_not_quantised(directory, found, config):
    said = _said(config)
    methods = [str(said.get("quant_method", "no named")) if isinstance(said, dict) else str(said)] if said else []
    methods = [method for method in methods if method not in ("mxfp4", *packed.READ)]  # whose tensors tell for themselves
    odd = next((name for name in found if name.endswith((".qweight", ".qzeros", ".scales", ".absmax", ".SCB"))), None)
    if methods or odd:
        sign = f"its config.json has a quantization_config of method {methods[0][:40]}" if methods else f"it has {odd}"
        raise CheckpointError(
            f"{directory} is a quantised checkpoint ({sign}): of these only AWQ, GPTQ and our own can be read, so take the "
            "original one, in bfloat16 or float16"
        )


def _check_tensors(directory, parts, found, config):
    """The layout of the tensors ``found``, after checking that they are those of ``parts``."""
    _check_not_quantised(directory, found, config)
    for name, location in found.items():
        if location.dtype not in ARRAY_DTYPES and not location.packed:
            raise CheckpointError(
                f"{location.path}: {name} is of dtype {location.dtype}, but weights must be {', '.join(DTYPES)}; "
                "quantised checkpoints other than AWQ and GPTQ are not supported, take the original one"
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


# ---------------------------------------------------------------------- rows of a tensor


def is_by_columns(weight, layout):
    """Whether a layout stores rows of a weight that are its inputs."""
    return weight.linear and layout == "paddle"


def clip(runs, start, stop):
    """The part of ``runs`` within rows ``start`` to ``stop``, as ``(slice of these rows, slice of outputs)``."""
    for row, output, count in runs:
        first, last = max(row, start), min(row + count, stop)
        if first < last:
            yield slice(first - start, last - start), slice(output + first - row, output + last - row)


def converted(name, array, source, target):
    """:func:`~.tensors.convert_dtype`, whose error names the tensor."""
    try:
        return convert_dtype(array, source, target)
    except OverflowError as error:
        raise CheckpointError(f"{name} cannot become float16: {error}; use bfloat16 or float32") from None


def fill(source, stored, array, dtype):
    """Put a published tensor in its place in the parameter ``array``, or into a sink; return the parameter's name."""
    _, weight, part, by_columns, _, is_share = source
    if is_share:
        _fill_share(source, stored, array, dtype)
        return weight.name
    if not isinstance(array, np.ndarray):
        for start, stop in blocks(row_count(stored.shape), max(1, _SINK_BYTES // (4 * math.prod(stored.shape[1:])))):
            rows = converted(part.name, stored.read(start, stop), stored.dtype, dtype)
            for row, output in clip(part.runs, start, stop):
                array.put(output.start, rows[row])
        return weight.name
    outputs = array.T if weight.linear else array.reshape([-1]) if not array.ndim else array
    for start, stop, rows in _blocks_of(part, stored):
        rows = converted(part.name, rows, stored.dtype, dtype)
        if by_columns:
            for row, output, count in part.runs:
                array[start:stop, output : output + count] = rows[:, row : row + count]
        else:
            for row, output in clip(part.runs, start, stop):
                outputs[output] = rows[row]
    return weight.name


def _fill_share(source, stored, array, dtype):
    """:func:`fill` of a share, reading what is in it alone."""
    _, weight, part, by_columns, inputs, _ = source
    outputs = array.T if weight.linear else array  # rows of a weight are its outputs, as in the torch layout
    if len(stored.shape) == 1:
        for row, output, count in part.runs:
            outputs[output : output + count] = converted(part.name, stored.read(row, row + count), stored.dtype, dtype)
        return
    across = inputs or ((0, 0, stored.shape[0 if by_columns else 1]),)
    rows, columns = (across, part.runs) if by_columns else (part.runs, across)
    target = outputs.T if by_columns else outputs
    for row, at, count in rows:
        for start, stop in blocks(count, stored.block_rows):
            for column, place, width in columns:
                values = stored.part(row + start, row + stop, column, column + width)
                target[at + start : at + stop, place : place + width] = converted(part.name, values, stored.dtype, dtype)


def _blocks_of(part, stored):
    """Yield ``(start, stop, rows)`` over a part, which may be one of those that a stored tensor has stacked."""
    if part.index is None:
        yield from stored.blocks()
    else:
        yield 0, part.shape[0], stored.read(part.index, part.index + 1)[0]


def check_choices(layout, dtype):
    """Raise CheckpointError unless ``layout`` and ``dtype`` (or None) are known."""
    if layout not in LAYOUTS:
        raise CheckpointError(f"layout is '{layout}': it must be one of {', '.join(LAYOUTS)}")
    if dtype is not None and dtype not in DTYPES:
        raise CheckpointError(f"dtype is '{dtype}': it must be one of {', '.join(DTYPES)}")
