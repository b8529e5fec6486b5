"""MXFP4 (OCP Microscaling Formats 1.0): 4-bit numbers, 32 of them under one power of two; gpt-oss's experts are published so.

``X_blocks [E, rows, groups, 16]`` holds two values a byte, the low half first, of 32 inputs a group; ``X_scales [E, rows,
groups]`` the exponents plus 127. What becomes of them is ``X [E, groups * 32, rows]``, the order of the bfloat16 files, and
exact: bfloat16 holds every product.
"""

import numpy as np

from paddlemix.errors import CheckpointError

from .tensors import StoredTensor, convert_dtype

BLOCKS, SCALES = "_blocks", "_scales"
_BYTES = 16  # of a group
_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)


def _bits():
    """bfloat16 of each byte's two values under each scale, ``[256 scales, 256 bytes, 2]`` uint16; scale 255 is NaN."""
    halves = np.concatenate([_VALUES, -_VALUES])
    bytes_ = np.arange(256)
    pairs = np.stack([halves[bytes_ & 15], halves[bytes_ >> 4]], -1)
    with np.errstate(over="ignore"):  # 4 and 6 under the largest scale are infinite
        values = np.ldexp(pairs[None], np.arange(256)[:, None, None] - 127).astype(np.float32)
    values[255] = np.nan
    return convert_dtype(values, "float32", "bfloat16")


_table = None


def decode(blocks, scales):
    """bfloat16 values of packed ones.

    Args:
        blocks: ``[..., rows, groups, 16]`` uint8.
        scales: ``[..., rows, groups]`` uint8.

    Returns:
        ``[..., groups * 32, rows]`` uint16, the bits of bfloat16.
    """
    global _table
    if _table is None:  # 256 KB, which other checkpoints have no use for
        _table = _bits().view(np.uint32).reshape(-1)  # both values of a byte at once
    index = scales[..., None].astype(np.uint16) << 8 | blocks
    values = _table[index].view(np.uint16).reshape([*scales.shape[:-1], -1])
    return np.ascontiguousarray(values.swapaxes(-1, -2))


def packed_names(found):
    """Names ``X`` among the tensors ``found`` of which there are ``X_blocks`` or ``X_scales`` of a model's experts.

    Args:
        found: ``{name: has dtype and shape}``.

    Raises:
        CheckpointError: one is there without the other, or they do not fit each other.
    """
    names = {name.removesuffix(end) for name in found for end in (BLOCKS, SCALES) if name.endswith(end) and ".experts." in name}
    for name in names:
        for here, other in ((BLOCKS, SCALES), (SCALES, BLOCKS)):
            if name + here not in found:
                raise CheckpointError(f"{name}{other} has no {name}{here} beside it: download or copy the checkpoint again")
        blocks, scales = found[name + BLOCKS], found[name + SCALES]
        if {blocks.dtype, scales.dtype} != {"U8"}:
            raise CheckpointError(f"{name}{BLOCKS} and {SCALES} are {blocks.dtype} and {scales.dtype}: MXFP4 is made of U8")
        if len(blocks.shape) != 4 or blocks.shape[3] != _BYTES or scales.shape != blocks.shape[:3]:
            raise CheckpointError(
                f"{name}{BLOCKS} is {list(blocks.shape)} and {SCALES} {list(scales.shape)}: MXFP4 has [experts, rows, groups, "
                f"{_BYTES}] and [experts, rows, groups]; download or copy the checkpoint again"
            )
    return names


def unpacked_shape(blocks):
    """Shape of what ``X_blocks`` of shape ``blocks`` becomes."""
    experts, rows, groups, width = blocks
    return experts, groups * 2 * width, rows


def unpacked(blocks, scales):
    """The tensor that two stored ones stand for, read expert by expert, as a :class:`~.tensors.StoredTensor`."""

    def read(start, stop):
        return decode(blocks.read(start, stop), scales.read(start, stop))

    return StoredTensor("bfloat16", unpacked_shape(blocks.shape), read, 1)


def without_mark(config):
    """The dictionary of a ``config.json``, or of a part of it, without the key that says that weights are MXFP4.

    What is in memory, and what is written, is not.
    """
    said = config.get("quantization_config")
    if isinstance(said, dict) and said.get("quant_method") == "mxfp4":
        config = {key: value for key, value in config.items() if key != "quantization_config"}
    parts = ("llm_config", "text_config")
    return {key: without_mark(value) if key in parts and isinstance(value, dict) else value for key, value in config.items()}
