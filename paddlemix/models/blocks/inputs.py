"""What models are given: pixels, token ids and masks as callers have them, to arrays of one dtype and layout.

Callers bring tensors of any device and dtype, arrays, and lists of either. What can be meant in one way only is taken so;
everything else ends in one sentence. Contents are looked at once, on the host, where a wrong value would go through silently.
"""

import numpy as np
import paddle

from paddlemix.arrays import host_array
from paddlemix.errors import PromptError

# Normalised pixels are within 3 of 0, whichever the mean and deviation; raw ones reach 255.
_LARGEST_PIXEL = 32


def as_tiles(pixels, name="pixel_values"):
    """A tensor or an array as ``[T, 3, height, width]`` of floating point numbers; an array comes as float32.

    Raises:
        PromptError: another dtype or shape.
    """
    tensor = not isinstance(pixels, np.ndarray)  # of a program that is being built, too, which isinstance() does not tell
    dtype = str(pixels.dtype).removeprefix("paddle.")
    if not (dtype in ("float64", "float32", "float16", "bfloat16") if tensor else pixels.dtype.kind == "f"):
        bits = "the bits of bfloat16? convert the tensor to float32 first; or " if dtype == "uint16" else ""
        raise PromptError(
            f"{name} is {dtype}, but models take normalised floating point pixels: {bits}load the picture with load_image"
        )
    shape = list(pixels.shape)
    if len(shape) == 3 and shape[0] == 3:
        pixels, shape = pixels.reshape([1, *shape]), [1, *shape]
    if len(shape) != 4 or shape[1] != 3 or 0 in shape[2:]:
        last = len(shape) in (3, 4) and shape[-1] == 3
        advice = "put the colour channels before height and width" if last else "load the picture with load_image"
        raise PromptError(f"{name} must be [tiles, 3, height, width], not {shape}: {advice}")
    return pixels if tensor else np.asarray(pixels, dtype=np.float32)


def pixel_tiles(pixel_values, name="pixel_values"):
    """Pixels as they are given, to ``[T, 3, height, width]`` float32 on the host; their contents are not looked at.

    Args:
        pixel_values: a tensor or an array ``[T, 3, height, width]`` of floating point numbers, or of one tile
            ``[3, height, width]``; or a list of such, whose tiles follow each other.

    Raises:
        PromptError: another dtype or shape, or tiles of different sizes.
    """
    if isinstance(pixel_values, (list, tuple)) and any(hasattr(item, "shape") for item in pixel_values):
        parts = [pixel_tiles(item, f"{name}[{i}]") for i, item in enumerate(pixel_values)]
        sizes = {part.shape[2:] for part in parts}
        if len(sizes) > 1:
            (height, width), (other_height, other_width) = sorted(sizes)[:2]
            raise PromptError(
                f"{name} has tiles of {width}x{height} and of {other_width}x{other_height} pixels: load all pictures with the "
                "same input_size"
            )
        return np.concatenate(parts)
    return as_tiles(host_array(pixel_values, name), name)


def checked_pixels(pixel_values, name="pixel_values"):
    """The same as :func:`pixel_tiles`, with contents that can be normalised pixels.

    Raises:
        PromptError: as there, or a value is NaN, infinite or far from what normalising gives.
    """
    pixels = pixel_tiles(pixel_values, name)
    largest = max(float(pixels.max()), -float(pixels.min())) if pixels.size else 0.0  # NaN and infinity carry through
    if not np.isfinite(largest):
        tile = int(np.flatnonzero(~np.isfinite(pixels).all(axis=(1, 2, 3)))[0])
        raise PromptError(f"{name} has NaN or infinite values in tile {tile + 1} of {len(pixels)}: load the picture again")
    if largest > _LARGEST_PIXEL:
        raise PromptError(
            f"{name} reaches {largest:g}, but normalised pixels stay within 3: these look like raw pixels of 0 to 255, so "
            "load the picture with load_image"
        )
    return pixels


def pixel_tensor(pixel_values, name="pixel_values"):
    """Pixels as a tensor ``[T, 3, height, width]``, their contents checked as by :func:`checked_pixels` without gradients.

    In training a tensor stays on its device, in its dtype and in its graph, and is not looked at.

    Raises:
        PromptError: as :func:`checked_pixels`.
    """
    if isinstance(pixel_values, paddle.Tensor) and paddle.is_grad_enabled():
        return as_tiles(pixel_values, name)
    return paddle.to_tensor(checked_pixels(pixel_values, name))


def split_pictures(pixel_values, num_patches_list=None):
    """Pixels of several pictures, and how many tiles each has.

    Args:
        pixel_values: anything :func:`pixel_tiles` takes, or None.
        num_patches_list: tiles of each picture; None for one picture of all tiles or, of a list, one for each item.

    Returns:
        ``([T, 3, height, width] float32 or None, tiles of each picture, a list)``.

    Raises:
        PromptError: counts and tiles do not go together, or as :func:`pixel_tiles`.
    """
    if isinstance(pixel_values, (list, tuple)):
        if not len(pixel_values):
            pixel_values = None
        elif num_patches_list is None and all(hasattr(item, "shape") for item in pixel_values):
            num_patches_list = [len(pixel_tiles(item, f"pixel_values[{i}]")) for i, item in enumerate(pixel_values)]
    pixels = None if pixel_values is None else pixel_tiles(pixel_values)
    total = 0 if pixels is None else len(pixels)
    if num_patches_list is None:
        return pixels, [total] if total else []
    counts = [_count(n) for n in host_list(num_patches_list)]
    if sum(counts) != total:
        raise PromptError(f"num_patches_list counts {sum(counts)} tiles but pixel_values has {total}")
    return pixels, [n for n in counts if n]  # what has no tiles is no picture


def host_list(values):
    """A list, a tuple, an array or a tensor of one dimension as a list of Python's or NumPy's numbers."""
    return list(values) if isinstance(values, (list, tuple)) else host_array(values, "num_patches_list").reshape(-1).tolist()


def token_ids(input_ids, vocab_size, name="input_ids"):
    """Token ids as ``[B, N]`` int64 on the host; ids of one dimension are one row.

    Raises:
        PromptError: rows of different lengths, no ids, numbers that are not whole, or ids that the model does not have.
    """
    array = host_array(input_ids, name)
    if array.ndim == 1:
        array = array[None]
    if array.ndim != 2 or array.dtype.kind not in "iu":
        raise PromptError(f"{name} must be whole numbers [rows, tokens], not {array.dtype} {list(array.shape)}")
    if not array.size:
        raise PromptError(f"{name} is empty ({list(array.shape)}): a prompt needs at least one token")
    if array.min() < 0 or array.max() >= vocab_size:
        wrong = array.min() if array.min() < 0 else array.max()
        raise PromptError(
            f"{name} has the id {wrong}, but the model's ids are 0 to {vocab_size - 1}: use the tokenizer of this checkpoint"
        )
    return array.astype(np.int64)


def padding_mask(attention_mask, shape, name="attention_mask"):
    """A mask of ids of ``shape [B, N]`` as an array of 0 and 1, int64, on the host; None stays None.

    Raises:
        PromptError: another shape, or a row without a 1.
    """
    if attention_mask is None:
        return None
    array = host_array(attention_mask, name)
    if array.ndim == 1:
        array = array[None]
    if array.shape != tuple(shape):
        raise PromptError(f"{name} is {list(array.shape)}, but input_ids are {list(shape)}: give each token its own number")
    mask = (array != 0).astype(np.int64)
    if not mask.any(1).all():
        raise PromptError(f"{name} hides all of row {int(np.flatnonzero(~mask.any(1))[0]) + 1}: leave the row out")
    return mask


def _count(value):
    if isinstance(value, (bool, np.bool_)) or value != int(value) or value < 0:
        raise PromptError(f"num_patches_list has {value!r}: it must be a number of tiles for each picture")
    return int(value)
