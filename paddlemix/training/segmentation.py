"""Training and testing segmentation in ADE20K's layout: pictures and maps of labels, 0 for what does not count."""

import os
import re

import numpy as np
import paddle
from paddle.nn import functional as F
from PIL import Image, ImageEnhance

from paddlemix.datasets.annotations import find_files
from paddlemix.errors import DataError, ImageError
from paddlemix.processors.image import open_image, to_pixels


def layer_rates(depth, decay):
    """A function from a parameter's name to the factor on its learning rate: ``decay`` once more a block towards the first.

    The last of ``depth`` blocks has one factor, embeddings one more than the first block; the head has none.
    """

    def rate(name):
        if not name.startswith("tower."):
            return 1.0
        match = re.search(r"\.layers\.(\d+)\.", name)
        return decay ** (depth - int(match[1]) if match else depth + 1)

    return rate


def read_pairs(root, part):
    """``[(picture, map of labels)]`` of ``root/images/part`` and ``root/annotations/part``.

    Raises:
        DataError: there are none, or a map is missing.
    """
    folder = os.path.join(root, "images", part)
    pairs = []
    for path in find_files(folder):
        name = os.path.splitext(os.path.relpath(path, folder))[0] + ".png"
        label = os.path.join(root, "annotations", part, name)
        if not os.path.isfile(label):
            raise DataError(f"{label} is missing: every picture needs its map of labels")
        pairs.append((path, label))
    return pairs


def read_labels(path, classes):
    """A map ``[height, width]`` int64: 0 to ``classes - 1``, and -1 for what does not count (0 in the file)."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            values = np.asarray(image if image.mode in ("L", "P", "I;16", "I") else image.convert("L")).astype("int64") - 1
    except (OSError, SyntaxError, ValueError) as error:
        raise ImageError(f"{path} is no map of labels ({error}): it must be a PNG of numbers") from None
    if values.max() >= classes:
        raise DataError(f"{path} has label {values.max() + 1}, but there are {classes} classes")
    return values


def training_crop(picture, labels, size, rng, scale=(0.5, 2.0), distort=True):
    """A random part at a random scale, flipped or not, colours changed a little: (pixels ``[3, S, S]``, labels ``[S, S]``)."""
    image = open_image(picture)
    # Scales are of the published (2016, 504): the shorter side becomes S times a random factor.
    factor = rng.uniform(*scale) * size / min(image.size)
    shape = tuple(max(1, round(side * factor)) for side in image.size)
    image = image.resize(shape, Image.Resampling.BILINEAR)
    labels = np.asarray(Image.fromarray(labels.astype("int32")).resize(shape, Image.Resampling.NEAREST)).astype("int64")
    left, top = (int(rng.integers(0, max(side - size, 0) + 1)) for side in shape)
    image, labels = image.crop((left, top, min(left + size, shape[0]), min(top + size, shape[1]))), labels[top:, left:]
    labels = labels[:size, :size]
    if rng.random() < 0.5:
        image, labels = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), labels[:, ::-1]
    if distort:
        for kind in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
            image = kind(image).enhance(rng.uniform(0.75, 1.25))
    pixels = np.zeros([3, size, size], "float32")
    padded = np.full([size, size], -1, "int64")
    pixels[:, : image.height, : image.width] = to_pixels([image])[0]
    padded[: image.height, : image.width] = labels
    return pixels, padded


def pixel_loss(scores, labels):
    """Mean cross entropy over the pixels that count; 0 where none does."""
    classes = scores.shape[1]
    kept = (labels >= 0).reshape(-1)
    share = paddle.to_tensor((kept / max(int(kept.sum()), 1)).astype("float32"))
    targets = paddle.to_tensor(np.maximum(labels, 0).reshape([-1, 1]))
    rows = scores.astype("float32").transpose([0, 2, 3, 1]).reshape([-1, classes])
    return (F.cross_entropy(rows, targets, reduction="none").squeeze(-1) * share).sum()


def segmentation_loss(model, pixel_values, labels):
    """The head's loss, and 0.4 of the auxiliary one's."""
    scores, extra = model(paddle.to_tensor(pixel_values))
    loss = pixel_loss(scores, labels)
    return loss if extra is None else loss + 0.4 * pixel_loss(extra, labels)


@paddle.no_grad()
def slide(model, picture, size, stride, classes):
    """Scores ``[classes, height, width]`` of a whole picture, averaged over windows of ``size`` pixels."""
    image = open_image(picture)
    factor = size / min(image.size)
    scaled = image.resize(tuple(max(size, round(side * factor)) for side in image.size), Image.Resampling.BILINEAR)
    pixels = to_pixels([scaled])
    height, width = pixels.shape[2:]
    total, seen = np.zeros([classes, height, width], "float32"), np.zeros([height, width], "float32")
    for top in _starts(height, size, stride):
        for left in _starts(width, size, stride):
            window = pixels[:, :, top : top + size, left : left + size]
            total[:, top : top + size, left : left + size] += model(paddle.to_tensor(window))[0].numpy()[0]
            seen[top : top + size, left : left + size] += 1
    scores = paddle.to_tensor((total / seen)[None])
    return F.interpolate(scores, size=[image.height, image.width], mode="bilinear", align_corners=False).numpy()[0]


def _starts(length, size, stride):
    return sorted({min(at, length - size) for at in range(0, max(length - size, 0) + stride, stride)})


def mean_iou(confusion):
    """Mean over classes that occur, in labels or answers, of intersection by union of ``confusion [classes, classes]``."""
    both = np.diag(confusion)
    union = confusion.sum(0) + confusion.sum(1) - both
    return float((both[union > 0] / union[union > 0]).mean())


def evaluate(model, pairs, size, stride, classes):
    """``{"mIoU", "accuracy"}`` of a model over pictures and maps."""
    model.eval()
    confusion = np.zeros([classes, classes], "int64")
    for picture, label in pairs:
        labels = read_labels(label, classes)
        found = slide(model, picture, size, stride, classes).argmax(0)
        kept = labels >= 0
        confusion += np.bincount(labels[kept] * classes + found[kept], minlength=classes**2).reshape([classes, classes])
    return {"mIoU": mean_iou(confusion), "accuracy": float(np.diag(confusion).sum() / max(confusion.sum(), 1))}
