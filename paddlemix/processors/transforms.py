"""Pictures as the contrastive models, probes and segmentation want them: one square of pixels each."""

import math

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


def augmented(picture, image_size, rng, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), flip=0.5):
    """A random part of a picture as normalised pixels ``[3, S, S]``, as torchvision's RandomResizedCrop and flip make it.

    Args:
        picture: anything :func:`~.image.open_image` takes.
        image_size: side of the square.
        rng: NumPy generator; the same gives the same part.
        scale: least and largest share of the picture's area.
        ratio: least and largest width divided by height.
        flip: probability of turning left and right round.
    """
    image = open_image(picture)
    width, height = image.size
    box = (0, 0, width, height)
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        shape = math.exp(rng.uniform(*np.log(ratio)))
        across, down = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < across <= width and 0 < down <= height:
            left, top = rng.integers(0, width - across + 1), rng.integers(0, height - down + 1)
            box = (left, top, left + across, top + down)
            break
    else:  # the middle, with a shape that is allowed
        across, down = min(width, round(height * ratio[1])), min(height, round(width / ratio[0]))
        left, top = (width - across) // 2, (height - down) // 2
        box = (left, top, left + across, top + down)
    image = image.crop(box).resize((image_size, image_size), Image.Resampling.BICUBIC)
    if rng.random() < flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return to_pixels([image])[0]
