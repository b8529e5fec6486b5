"""Boxes in answers: RefCOCO and DIOR-RSVG. The coordinates are thousandths of the picture's sides."""

import json
import re

import numpy as np

from . import field, mean

# What the original's lazy pattern of four fields between brackets finds first, without its backtracking.
_FIRST_BOX = re.compile(r"(?<!\[)\[+([^,\n]*),([^,\n]*),([^,\n]*),([^\]\n]*)\]+")


def refcoco_box(answer, width, height):
    """The first box of an answer in pixels, float32 [4]; a box of nothing where it has none.

    Corners are neither put in order nor cut to the picture. Fields that sum to less than 4 are taken for fractions of the
    sides. All in float32, as in the original.
    """
    found = _FIRST_BOX.search(answer)
    try:
        box = np.array([float(number) for number in found.groups()], np.float32) if found else np.zeros(4, np.float32)
    except (ValueError, OverflowError):
        box = np.zeros(4, np.float32)
    if box.sum() >= 4:
        box = box / np.float32(1000)
    return box * np.array([width, height, width, height], np.float32)


def _overlap(a, b):
    """Intersection over union of two boxes, float32 [4] each."""
    sides = np.maximum(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), np.float32(0))
    both = sides[0] * sides[1]
    areas = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    with np.errstate(all="ignore"):
        return float(both / (areas - both))


def refcoco(references, answers):
    """Share of boxes that overlap the true one with an IoU of one half or more."""

    def one(reference, answer):
        if answer is None:
            return 0.0
        with np.errstate(all="ignore"):
            box = refcoco_box(answer, field(reference, "width"), field(reference, "height"))
            return float(_overlap(box, np.array(field(reference, "bbox"), np.float32)) >= 0.5)

    each = [one(reference, answer) for reference, answer in zip(references, answers)]
    return {"precision@1": mean(each)}, each


def dior_box(answer, width, height):
    """The first box of an answer in pixels, cut to the picture, [x1, y1, x2, y2]; None where it has none.

    It must be JSON of a list of lists: a bare ``[1, 2, 3, 4]`` is none.
    """
    found = _FIRST_BOX.search(answer)
    try:
        values = json.loads(found[0])[0] if found else None
        if not isinstance(values, list) or len(values) != 4:
            return None
        return [min(max(value / 1000 * side, 0), side) for value, side in zip(values, (width, height) * 2)]
    except (ValueError, TypeError, LookupError, OverflowError, RecursionError):
        return None


def _overlap_of_pixels(a, b):
    """Intersection over union where a box holds its last pixels too: one more on every side."""
    across, down = (max(0, min(a[i + 2], b[i + 2]) - max(a[i], b[i]) + 1) for i in (0, 1))
    areas = sum((box[2] - box[0] + 1) * (box[3] - box[1] + 1) for box in (a, b))
    union = areas - across * down
    return across * down / union if union else 0.0


def dior(references, answers):
    """Share of boxes that overlap the true one with an IoU above one half."""

    def one(reference, answer):
        box = None if answer is None else dior_box(answer, field(reference, "width"), field(reference, "height"))
        return int(box is not None and _overlap_of_pixels(box, field(reference, "bbox")) > 0.5)

    each = [one(reference, answer) for reference, answer in zip(references, answers)]
    return {"precision@1": mean(each)}, each
