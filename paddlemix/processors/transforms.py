"""Pictures as the contrastive models, probes and segmentation want them: one square of pixels each."""

import numpy as np
from PIL import Image

from paddlemix.errors import ImageError

from .image import open_image, to_pixels

TASKS = ("retrieval", "classification")


def transform(picture, task="retrieval", image_size=224):
    """A picture as normalised pixels.

    Args:
        picture: anything :func:`~.image.open_image` takes; transparency is dropped, as in the original.
        task: ``retrieval`` squeezes the whole picture into the square, also for captions; ``classification`` brings its
            shorter side to ``image_size`` and cuts out the centre.
        image_size: side of the square.

    Returns:
        float32 array ``[3, image_size, image_size]``.

    Raises:
        ImageError: the picture cannot be read, or an argument makes no sense.
    """
    if task not in TASKS:
        raise ImageError(f"the task of a transform is '{task}': it must be one of {', '.join(TASKS)}")
    if not isinstance(image_size, (int, np.integer)) or not 1 <= image_size <= 1 << 14:
        raise ImageError(f"the size of a picture must be a number of pixels from 1 to {1 << 14}, not {image_size!r}")
    image = open_image(picture)
    size = int(image_size)
    if task == "retrieval":
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    else:
        image = centre_crop(shorter_side(image, size), size)
    return to_pixels([image])[0]


def shorter_side(image, size):
    """``image`` resized so that its shorter side is ``size``; the longer one is rounded down."""
    width, height = image.size
    short, long = min(width, height), max(width, height)
    if long > 1000 * short:
        raise ImageError(f"a picture of {width}x{height} pixels is too long and narrow to resize: crop it")
    longer = int(size * long / short)
    return image.resize((size, longer) if width <= height else (longer, size), Image.Resampling.BICUBIC)


def centre_crop(image, size):
    """The square in the middle of ``image``; offsets are rounded to even, as torchvision's."""
    left, top = (int(round((side - size) / 2.0)) for side in image.size)
    return image.crop((left, top, left + size, top + size))
