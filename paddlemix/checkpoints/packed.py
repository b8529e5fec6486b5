"""Weights in few bits in files: our own layout, and those of AWQ and GPTQ, read without going through floating point.

Ours: a parameter ``P`` of the model (``language_model.model.layers.0.self_attn.qkv_proj.weight``) is the tensors ``P.codes``
U8, ``P.scales`` F16, ``P.factors`` F32 and, of 4 bits, ``P.zeros`` F16, in the layout of :mod:`paddlemix.quantised`, which the
kernels compute with where the file is mapped. All other tensors have their published names.

AWQ (arXiv 2306.00978) and GPTQ (arXiv 2210.17323) pack codes in numbers of 32 bits, the first in the lowest: AWQ's gemm form
eight outputs of an input, in the order 0 2 4 6 1 3 5 7, ``X.qweight [in, out / 8]``; GPTQ as many inputs of an output as fit,
``X.qweight [in * bits / 32, out]``. Both have ``X.scales [groups, out]`` and ``X.qzeros [groups, out * bits / 32]``, packed
along the outputs, AWQ's in the same order; GPTQ's first format stores zeros less one, the second as they are. GPTQ's ``X.g_idx
[in]`` tells the group of each input.
"""

import os
from typing import NamedTuple

import numpy as np

from paddlemix.errors import CheckpointError
from paddlemix.files import open_regular
from paddlemix.quantised import BLOCK, GROUPS, PARTS, Quantised, pack, padded

METHOD = "paddlemix"  # what config.json calls our own
READ = ("awq", "gptq", METHOD)
_AWQ_ORDER = np.array([0, 2, 4, 6, 1, 3, 5, 7])
_ENDS = {".qweight": "qweight", ".qzeros": "qzeros", ".scales": "scales", ".g_idx": "g_idx"}
_OWN = {".codes": "codes", ".scales": "scales", ".zeros": "zeros", ".factors": "factors"}


class Packed(NamedTuple):
    """How a weight in few bits is stored: ``kind`` is one of :data:`READ`, ``tensors`` the locations of its tensors."""

    kind: str
    bits: int
    group: int
    tensors: dict
    zeros_less_one: bool = False


def grouped(found, said, new_location):
    """``found`` with one location for all tensors of a packed weight, named ``X.weight``.

    Args:
        found: ``{name: location}``; a location has ``path``, ``key``, ``dtype`` and ``shape``.
        said: the ``quantization_config`` of the configuration, or None.
        new_location: ``new_location(path, name, dtype, shape, packed)``.

    Raises:
        CheckpointError: tensors of a weight are missing or do not fit each other.
    """
    said = said if isinstance(said, dict) else {}
    own = [name.removesuffix(".codes") for name in found if name.endswith(".weight.codes")]
    for name in own:
        tensors = {kind: found.pop(name + end) for end, kind in _OWN.items() if name + end in found}
        found[name] = new_location(tensors["codes"].path, name, *_own_form(name, tensors))
    if said.get("quant_method", "awq") not in READ:
        return found  # who looks for such names says that they cannot be read
    for name in [name.removesuffix(".qweight") for name in found if name.endswith(".qweight")]:
        tensors = {kind: found.pop(name + end) for end, kind in _ENDS.items() if name + end in found}
        missing = {"qweight", "qzeros", "scales"} - tensors.keys()
        if missing:
            raise CheckpointError(
                f"{name}.qweight has no {sorted(missing)[0]} beside it: download or copy the checkpoint again"
            )
        path = tensors["qweight"].path
        found[name + ".weight"] = new_location(path, name + ".weight", *_published_form(name, tensors, said))
    return found


def outgoing(name, weight):
    """The arrays of a parameter ``name`` in our own layout, as ``(tensor's name, dtype, array)``."""
    dtypes = {"codes": "U8", "scales": "float16", "zeros": "float16", "factors": "float32"}
    return [(f"{name}.{kind}", dtypes[kind], array) for kind, array in weight.arrays().items()]


def bits_of(table, bits, parts):
    """``{parameter: bits}`` of the weights of ``parts`` (of :data:`~paddlemix.quantised.PARTS`) in a table of names.

    Matrices have ``bits``; token embeddings and output head 8.
    """
    found = {}
    for weight in table:
        name = weight.name
        inside = name.startswith(tuple(PARTS[part] for part in parts)) and ".lora_" not in name
        if inside and weight.linear and not name.endswith(".mlp.gate.weight"):
            found[name] = 8 if name.endswith("lm_head.weight") else bits
        elif inside and name.endswith(".embed_tokens.weight"):
            found[name] = 8
    return found


def _own_form(name, tensors):
    shapes = {kind: location.shape for kind, location in tensors.items()}
    dtypes = {kind: location.dtype for kind, location in tensors.items()}
    good = {"codes": "U8", "scales": "float16", "zeros": "float16", "factors": "float32"}
    bits = 4 if "zeros" in shapes else 8
    fits = {"codes", "scales", "factors"} <= shapes.keys() and all(dtypes[kind] == good[kind] for kind in dtypes)
    fits = fits and len(shapes["codes"]) == len(shapes["scales"]) == 2 and shapes["codes"][1] * 8 % bits == 0
    group = 0
    if fits:
        out, width = shapes["codes"][0], shapes["codes"][1] * 8 // bits
        groups = shapes["scales"][1]
        group = width // groups if groups and width % groups == 0 else 0
        fits = group in GROUPS and width % BLOCK == 0 and shapes["scales"][0] == out and shapes["factors"] == (out,)
        fits = fits and shapes.get("zeros", shapes["scales"]) == shapes["scales"]
    if not fits:
        made_of = ", ".join(f"{kind} {dtypes[kind]} {list(shapes[kind])}" for kind in shapes)
        raise CheckpointError(f"{name} is made of {made_of}, which do not fit each other: convert or copy the checkpoint again")
    return f"int{bits}", (out, width), Packed(METHOD, bits, group, tensors)


def _published_form(name, tensors, said):
    weight, zeros, scales = (tensors[kind] for kind in ("qweight", "qzeros", "scales"))
    wrong = f"{name}.qweight {list(weight.shape)}, qzeros {list(zeros.shape)} and scales {list(scales.shape)}"
    if {len(weight.shape), len(zeros.shape), len(scales.shape)} != {2} or {weight.dtype, zeros.dtype} != {"I32"}:
        raise CheckpointError(f"{wrong} are not of AWQ or GPTQ: download or copy the checkpoint again")
    groups, out = scales.shape
    bits = zeros.shape[1] * 32 // out if out else 0
    kind = "gptq" if weight.shape[1] == out else "awq"
    inputs = weight.shape[0] * 32 // bits if kind == "gptq" and bits else weight.shape[0]
    good = bits in ((4, 8) if kind == "gptq" else (4,)) and zeros.shape == (groups, out * bits // 32) and groups > 0
    good = good and weight.shape == ((inputs * bits // 32, out) if kind == "gptq" else (inputs, out // 8)) and inputs >= groups
    method, version = said.get("quant_method", kind), str(said.get("version", "gemm")).lower()
    if not good or method != kind or (kind == "awq" and version != "gemm"):
        raise CheckpointError(
            f"{wrong} are not AWQ in 4 bits (gemm) nor GPTQ in 4 or 8 bits, as their config.json says ({str(method)[:20]}, "
            f"version {version[:20]}): take the original checkpoint, in bfloat16 or float16"
        )
    group = said.get("group_size")
    if not isinstance(group, int) or isinstance(group, bool) or -(-inputs // max(group, 1)) != groups:
        group = inputs if groups == 1 else inputs // groups
    if groups > 1 and (group % GROUPS[0] or -(-inputs // group) != groups):
        raise CheckpointError(
            f"{name} has groups of {group} inputs: multiples of {GROUPS[0]} are read, so take the original checkpoint"
        )
    order = tensors.get("g_idx")
    if order is not None and (order.shape != (inputs,) or order.dtype not in ("I32", "I64")):
        raise CheckpointError(
            f"{name}.g_idx is {order.dtype} {list(order.shape)}, but there are {inputs} inputs: copy it again"
        )
    less_one = kind == "gptq" and said.get("checkpoint_format", "gptq") != "gptq_v2"
    return f"int{bits}", (out, inputs), Packed(kind, bits, group, tensors, less_one)


def read(location, get, name):
    """The :class:`~paddlemix.quantised.Quantised` at a packed location.

    Args:
        location: has ``shape`` and ``packed``.
        get: ``get(location) -> StoredTensor``, for AWQ and GPTQ.
        name: for messages.

    Raises:
        CheckpointError: groups have unequal numbers of inputs, or zeros that our layout has no place for.
    """
    packed = location.packed
    if packed.kind == METHOD:
        arrays = {kind: _mapped(stored, get(stored)) for kind, stored in packed.tensors.items()}
        return Quantised(packed.bits, location.shape[1], packed.group, zeros=arrays.pop("zeros", None), **arrays)
    stored = {kind: get(tensor) for kind, tensor in packed.tensors.items()}
    arrays = {kind: tensor.read(0, tensor.shape[0]) for kind, tensor in stored.items()}
    out, inputs = location.shape
    scales = arrays["scales"]
    if stored["scales"].dtype == "bfloat16":
        scales = (scales.astype(np.uint32) << 16).view(np.float32)
    numbers, zeros = (np.ascontiguousarray(arrays[kind]).view(np.uint32) for kind in ("qweight", "qzeros"))
    most = (1 << packed.bits) - 1
    shifts = np.arange(0, 32, packed.bits, dtype=np.uint32)

    def along_outputs(numbers):
        values = (numbers[:, :, None] >> shifts & most).astype(np.int16)
        if packed.kind == "awq":
            there = np.empty_like(values)
            there[:, :, _AWQ_ORDER] = values
            values = there
        return values.reshape([len(numbers), -1])

    if packed.kind == "awq":
        codes = along_outputs(numbers)  # [in, out]
    else:
        codes = (numbers[:, None, :] >> shifts[:, None] & most).astype(np.int16).reshape([-1, out])
    zeros = along_outputs(zeros) + np.int16(packed.zeros_less_one)
    if packed.zeros_less_one:
        zeros &= most  # less one, a zero of 0 is the largest number
    order = None
    if "g_idx" in arrays:
        codes, order = _by_groups(codes, arrays["g_idx"], packed.group, len(scales), name)
    group = next(size for size in reversed(GROUPS) if len(scales) == 1 or packed.group % size == 0)
    width = padded(inputs, group)
    rows = np.zeros([out, width], np.int16)
    rows[:, :inputs] = codes.T
    times = width // group if len(scales) == 1 else packed.group // group
    scales, zeros = (np.repeat(array.T, times, axis=1) for array in (scales, zeros))
    scales, zeros = (_wide(array, width // group) for array in (scales, zeros))
    factors = np.ones(out, np.float32)
    if scales.dtype != np.float16:
        top = np.abs(scales).max(1)
        factors = np.where(top > 0, top, 1).astype(np.float32)
        scales = (scales / factors[:, None]).astype(np.float16)
    if packed.bits == 8:
        if (zeros != 128).any():
            raise CheckpointError(f"{name} is GPTQ in 8 bits with other zeros than 128: take the original checkpoint")
        rows[:, :inputs] -= 128
        return Quantised(8, inputs, group, pack(rows, 8), np.ascontiguousarray(scales), None, factors, order)
    zeros = np.ascontiguousarray(zeros, np.float16)
    return Quantised(4, inputs, group, pack(rows, 4), np.ascontiguousarray(scales), zeros, factors, order)


def _by_groups(codes, index, group, groups, name):
    """``codes [in, out]`` in the order of their groups, and that order, None where they are so already."""
    index = index.astype(np.int64)
    sizes = np.bincount(index, minlength=groups) if len(index) and index.min() >= 0 else np.zeros(0)
    expected = np.full(groups, group)
    expected[-1] = len(index) - group * (groups - 1)
    if not np.array_equal(sizes, expected):
        raise CheckpointError(f"{name}: g_idx does not put {group} inputs into each of {groups} groups: copy it again")
    order = np.argsort(index, kind="stable").astype(np.int32)
    if np.array_equal(order, np.arange(len(order))):
        return codes, None
    return codes[order], order


def _wide(array, groups):
    """``array [out, some]`` with exactly ``groups`` columns; more than there are belong to inputs that fill up."""
    missing = groups - array.shape[1]
    return np.pad(array, [(0, 0), (0, missing)], mode="edge") if missing > 0 else array[:, :groups]


def _mapped(location, stored):
    """A tensor of our own layout where it lies in the file."""
    dtype = {"U8": np.uint8, "float16": np.float16, "float32": np.float32}[location.dtype]
    with open_regular(location.path) as file:
        if stored.offset + int(np.prod(location.shape)) * np.dtype(dtype).itemsize > os.fstat(file.fileno()).st_size:
            raise CheckpointError(f"{location.path} is cut short: download or copy it again")
        return np.asarray(np.memmap(file, dtype, "r", stored.offset, location.shape)) if np.prod(location.shape) else None
