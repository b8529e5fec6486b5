"""Pictures as LLaVA wants them: the way of CLIP's processor, with ImageNet's mean and deviation."""

import numpy as np

from .image import NORMALIZATION, open_image, pad_to_square, to_pixels
from .transforms import shorter_side

ASPECT_RATIOS = ("pad", "square")
MEAN_COLOUR = tuple(int(x * 255) for x in NORMALIZATION["imagenet"][0])


def process_images(pictures, image_size, aspect_ratio="pad"):
    """Pictures as normalised pixels.

    Args:
        pictures: list of anything :func:`~.image.open_image` takes, or one of them.
        image_size: side of the result in pixels.
        aspect_ratio: ``pad`` puts a picture on a square of the mean colour first; anything else cuts the longer side off.

    Returns:
        float32 array ``[n, 3, image_size, image_size]``.

    Raises:
        ImageError: a picture cannot be read.
    """
    if not isinstance(pictures, (list, tuple)):
        pictures = [pictures]
    if not pictures:
        return np.zeros([0, 3, image_size, image_size], np.float32)
    return to_pixels([_square(open_image(picture), int(image_size), aspect_ratio == "pad") for picture in pictures])


def _square(image, size, pad):
    if pad and image.width != image.height:
        image = pad_to_square(image, MEAN_COLOUR)
    image = shorter_side(image, size)
    left, top = ((side - size) // 2 for side in image.size)  # rounded down, where torchvision rounds to even
    return image.crop((left, top, left + size, top + size))
