"""Pictures to pixel arrays: dynamic tiling, resizing and normalisation (InternVL 1.5, arXiv 2404.16821, section 3.3).

A picture is resized to a grid of square tiles whose shape is closest to its own, cut up row by row, and followed by a
thumbnail of the whole. Numpy and Pillow only.
"""

import io
import os
from contextlib import contextmanager
from functools import lru_cache

import numpy as np
from PIL import Image, ImageFile, ImageOps

from paddlemix.errors import ImageError
from paddlemix.files import read_regular
from paddlemix.validation import SIDE, TILES, shown

from .media import is_address, is_transparent, lay_on, read_picture_bytes

# Mean and standard deviation per channel, for pixels in 0..1. Every released chat model uses "imagenet".
NORMALIZATION = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.4814546, 0.4578275, 0.40821073), (0.2686295, 0.2613025, 0.2757711)),
    "siglip": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}

# The raster formats that Pillow decodes by itself; others (EPS, WMF) would start outside programs on untrusted files.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "MPO", "PPM", "ICO", "JPEG2000", "AVIF")
FORMAT_NAMES = "JPEG, PNG, WebP, GIF, BMP, TIFF, PPM, ICO, JPEG 2000 or AVIF"

# Pillow's own limit, kept even where another library has switched Pillow's off.
MAX_PIXELS = 178_956_970
_ORIENTATION = 0x0112  # the tag of EXIF data
MAX_BYTES = 1 << 30  # of a picture file: more than MAX_PIXELS take in any format


def load_image(
    image,
    input_size=448,
    min_num=1,
    max_num=12,
    use_thumbnail=True,
    pad2square=False,
    normalize_type="imagenet",
    dynamic=True,
    exif_orientation=False,
    background=None,
):
    """Read a picture and return its normalised tiles.

    Args:
        image: anything :func:`open_image` takes, or an address (``https://``, ``data:``), which is fetched.
        input_size: side of a tile in pixels (config key ``force_image_size``).
        min_num, max_num: bounds on the number of tiles, thumbnail not counted (``min_dynamic_patch``, ``max_dynamic_patch``).
        use_thumbnail: add the whole picture as last tile when there is more than one tile.
        pad2square: with ``dynamic=False``, pad to a square with the mean colour instead of stretching.
        normalize_type: a key of ``NORMALIZATION``.
        dynamic: ``False`` makes one tile of the whole picture (``dynamic_image_size``).
        exif_orientation, background: see :func:`open_image`.

    Returns:
        float32 array [tiles, 3, input_size, input_size], tiles row by row, then the thumbnail.

    Raises:
        ImageError: the picture cannot be read or an argument makes no sense.
    """
    _check_size(input_size)
    mean, _ = _normalization(normalize_type)
    image = open_image(read_picture_bytes(image) if is_address(image) else image, exif_orientation, background)
    if dynamic:
        tiles = dynamic_preprocess(image, min_num, max_num, input_size, use_thumbnail)
    else:
        if pad2square:
            image = pad_to_square(image, tuple(int(x * 255) for x in mean))
        tiles = [image.resize((input_size, input_size), Image.Resampling.BICUBIC)]
    return to_pixels(tiles, normalize_type)


def open_image(source, exif_orientation=False, background=None):
    """Read a picture completely and convert it to RGB.

    Transparency is dropped, as the original implementation does: hidden colours become visible. The orientation noted in
    EXIF data is ignored by default for the same reason. Greys deeper than 8 bits are scaled to 0..255 instead of being
    clipped to white. Of an animation the first frame is read.

    Args:
        source: a path, a PIL image, encoded bytes, a binary file object, or a uint8 array [height, width, 3 or 4].
        exif_orientation: turn the picture as its EXIF data say.
        background: colour that transparent pictures are laid on; None drops their transparency.

    Returns:
        PIL image of mode RGB.

    Raises:
        ImageError: missing, empty, damaged, cut off, too large, or not a picture.
    """
    name, opened = _open(source)
    if background is None and not isinstance(source, Image.Image):
        # Bytes here only make convert("RGB") warn about the transparency that it drops.
        opened.info.pop("transparency", None)
    try:
        with _complete_pictures_only():
            opened.load()
        if 0 in opened.size:
            raise ImageError(f"{name} has no pixels ({opened.width}x{opened.height}); give a larger picture")
        if exif_orientation:
            opened = ImageOps.exif_transpose(opened)
        return _to_rgb(opened if background is None else lay_on(opened, background))
    except ImageError:
        raise
    # Pillow's decoders meet arbitrary bytes and answer with almost any exception: OSError, SyntaxError, struct.error, ...
    except Exception as error:
        raise ImageError(f"{name} is damaged or cut off and cannot be decoded ({error}); replace it") from error


@lru_cache(maxsize=256)
def picture_traits(source):
    """(whether EXIF data turn a picture, whether some pixel of it is not opaque); the pixels are read only where one may be.

    Args:
        source: anything :func:`open_image` takes.

    Raises:
        ImageError: see :func:`open_image`.
    """
    name, opened = _open(source)
    try:
        turned = opened.getexif().get(_ORIENTATION, 1) not in (0, 1)
        if not is_transparent(opened):
            return turned, False
        return turned, opened.convert("RGBA").getchannel("A").getextrema()[0] < 255
    except Exception as error:  # as in open_image
        raise ImageError(f"{name} is damaged or cut off and cannot be decoded ({error}); replace it") from error


def target_grids(min_num, max_num):
    """All grids (tiles across, tiles down) of min_num to max_num tiles, by number of tiles.

    Grids of equal area stay in the order in which a set yields them. That is the original's rule; it decides ties when
    min_num and max_num are so close that no better grid exists, and CPython's hash of two integers keeps it stable.
    """
    _check_tiles(min_num, max_num)
    grids = {
        (across, down)
        for limit in range(min_num, max_num + 1)
        for across in range(1, limit + 1)
        for down in range(1, min(limit, max_num // across) + 1)
        if across * down >= min_num
    }
    return tuple(sorted(grids, key=lambda grid: grid[0] * grid[1]))


def find_closest_aspect_ratio(aspect_ratio, target_ratios, width, height, image_size):
    """The grid whose shape is closest to ``aspect_ratio`` (width / height).

    Of equally close grids a later one wins if the picture has more than half of its pixels.
    """
    best, best_distance = (1, 1), float("inf")
    for grid in target_ratios:
        distance = abs(aspect_ratio - grid[0] / grid[1])
        large_enough = width * height > 0.5 * image_size**2 * grid[0] * grid[1]
        if distance < best_distance or (distance == best_distance and large_enough):
            best, best_distance = grid, distance
    return best


def dynamic_preprocess(image, min_num=1, max_num=12, image_size=448, use_thumbnail=False):
    """Cut an RGB picture into tiles: a list of PIL images of image_size x image_size, row by row, then the thumbnail."""
    _check_size(image_size)
    _check_tiles(min_num, max_num)
    grids = target_grids(min_num, max_num)
    width, height = image.size
    if not width or not height:
        raise ImageError(f"the picture has no pixels ({width}x{height}); give a larger one")
    grid = find_closest_aspect_ratio(width / height, grids, width, height, image_size)
    return cut_into_tiles(image, grid, image_size, use_thumbnail)


def cut_into_tiles(image, grid, image_size, use_thumbnail):
    """Cut an RGB picture into a ``grid`` (tiles across, tiles down); more than one tile may be followed by a thumbnail."""
    across, down = grid
    if across * down * image_size**2 > MAX_PIXELS:
        raise ImageError(f"{across * down} tiles of {image_size} pixels a side are more than {MAX_PIXELS} pixels; use fewer")
    resized = image.resize((across * image_size, down * image_size), Image.Resampling.BICUBIC)
    tiles = [
        resized.crop((left, top, left + image_size, top + image_size))
        for top in range(0, resized.height, image_size)
        for left in range(0, resized.width, image_size)
    ]
    if use_thumbnail and len(tiles) > 1:
        tiles.append(image.resize((image_size, image_size), Image.Resampling.BICUBIC))
    return tiles


def to_pixels(images, normalize_type="imagenet"):
    """Normalise RGB pictures of one size: list of PIL images -> float32 array [N, 3, H, W]."""
    mean, std = np.asarray(_normalization(normalize_type), dtype=np.float32)
    width, height = images[0].size
    pixels = np.empty((len(images), 3, height, width), dtype=np.float32)
    for image, planes in zip(images, pixels, strict=True):
        # One contiguous plane at a time, in place: twice as fast as working on the interleaved array.
        for channel, plane, channel_mean, channel_std in zip(image.split(), planes, mean, std, strict=True):
            np.divide(np.asarray(channel), np.float32(255), out=plane, dtype=np.float32)
            plane -= channel_mean
            plane /= channel_std
    return pixels


def _open(source):
    """Return (name for messages, PIL image whose header has been read)."""
    if isinstance(source, Image.Image):
        return "the given picture", source
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim not in (2, 3) or (source.ndim == 3 and source.shape[2] not in (3, 4)):
            raise ImageError(
                f"a picture as an array must be uint8 [height, width, 3 or 4], not {source.dtype} {list(source.shape)}"
            )
        return "the given picture", Image.fromarray(np.ascontiguousarray(source))
    if isinstance(source, (bytes, bytearray, memoryview)):
        name, data = "the given picture data", bytes(source)
    elif isinstance(source, (str, os.PathLike)):
        name = f"picture file {os.fspath(source)!r}"
        try:
            data = read_regular(source, MAX_BYTES)
        except FileNotFoundError:
            raise ImageError(f"{name} does not exist; check the path") from None
        except IsADirectoryError:
            raise ImageError(f"{name} is a folder; name one file in it") from None
        except (OSError, ValueError) as error:
            raise ImageError(f"{name} cannot be read ({getattr(error, 'strerror', None) or error})") from None
    elif hasattr(source, "read"):
        name = f"picture file {source.name!r}" if hasattr(source, "name") else "the given picture file"
        data = source.read()
        if not isinstance(data, bytes):
            raise ImageError(f"{name} is open in text mode; open it with mode 'rb'")
    else:
        raise ImageError(f"a picture must be a path, a PIL image, bytes or a binary file, not {type(source).__name__}")

    if not data:
        raise ImageError(f"{name} is empty; replace it")
    try:
        opened = Image.open(io.BytesIO(data), formats=picture_formats())
    except Image.UnidentifiedImageError:
        if data[4:8] == b"ftyp" and data[8:12] in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1"):
            return name, _open_heif(name, data)
        raise ImageError(f"{name} is not a picture of a supported format ({FORMAT_NAMES})") from None
    except Image.DecompressionBombError:
        raise ImageError(f"{name} has more than {MAX_PIXELS} pixels; make it smaller") from None
    except Exception as error:  # as in open_image: a damaged header may raise anything
        raise ImageError(f"{name} has a damaged header ({error}); replace it") from error
    if opened.width * opened.height > MAX_PIXELS:
        raise ImageError(f"{name} has {opened.width}x{opened.height} pixels, more than {MAX_PIXELS}; make it smaller")
    return name, opened


def _open_heif(name, data):
    try:
        from pillow_heif import HeifImageFile
    except ImportError:
        raise ImageError(f"{name} is HEIC or HEIF, which needs pillow-heif: pip install 'paddlemix[heif]'") from None
    try:
        opened = HeifImageFile(io.BytesIO(data))
    except Exception as error:  # as in open_image: a damaged header may raise anything
        raise ImageError(f"{name} has a damaged header ({error}); replace it") from error
    if opened.width * opened.height > MAX_PIXELS:
        raise ImageError(f"{name} has {opened.width}x{opened.height} pixels, more than {MAX_PIXELS}; make it smaller")
    return opened


@lru_cache(maxsize=1)
def picture_formats():
    """The entries of ``FORMATS`` that this build of Pillow reads."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@contextmanager
def _complete_pictures_only():
    """Other libraries set this switch of Pillow's for the whole process; half a picture must still be an error here."""
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def _to_rgb(image):
    if image.mode.startswith("I;16"):
        return _grey((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        values = np.nan_to_num(np.asarray(image, dtype=np.float32))
        top = values.max()
        if image.mode == "F" and 0 < top <= 1:
            values = values * 255
        elif top > 65535:
            values = values * (255 / top)
        elif top > 255:
            values = values / 256
        return _grey(values.clip(0, 255).astype(np.uint8))
    if image.mode in ("La", "RGBa"):  # colours multiplied by alpha, which Pillow only undoes towards these two
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    return image.convert("RGB")


def _grey(array):
    return Image.fromarray(array).convert("RGB")


def pad_to_square(image, colour):
    """``image`` in the middle of a square of ``colour``, as wide as its longer side."""
    side = max(image.size)
    if side * side > MAX_PIXELS:
        raise ImageError(f"a picture of {image.width}x{image.height} pixels is too long to pad to a square; crop it")
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _normalization(normalize_type):
    if normalize_type not in NORMALIZATION:
        raise ImageError(f"normalize_type {normalize_type!r} is unknown; choose one of {', '.join(NORMALIZATION)}")
    return NORMALIZATION[normalize_type]


def _check_size(size):
    if not SIDE.accepts(size):
        raise ImageError(f"the tile size is {shown(size)}: it must be a positive number of pixels, at most {SIDE.high}")


def _check_tiles(min_num, max_num):
    if not (TILES.accepts(min_num) and TILES.accepts(max_num) and min_num <= max_num):
        raise ImageError(
            f"min_num ({shown(min_num)}) and max_num ({shown(max_num)}) must satisfy 1 <= min_num <= max_num <= {TILES.high}"
        )
