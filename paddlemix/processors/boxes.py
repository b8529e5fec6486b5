"""Boxes in answers: reading them from text and drawing them on the picture.

The models write ``<ref>name</ref><box>[[x1, y1, x2, y2], ...]</box>`` with coordinates in thousandths of the original
picture's width and height, whatever its tiling was.
"""

import re
from dataclasses import dataclass

from PIL import ImageDraw, ImageFont

_NUMBER = r"\s*-?\d+(?:\.\d+)?\s*"
_BOX = rf"\[{_NUMBER}(?:,{_NUMBER}){{3}}\]"
_BOXES = re.compile(
    rf"(?:<ref>(?P<name>(?:(?!</?ref>).)*)</ref>)?\s*(?P<open><box>)?\s*(?P<boxes>\[\s*{_BOX}(?:\s*,\s*{_BOX})*\s*\]|{_BOX})\s*(?:</box>)?",
    re.DOTALL,
)
_COLORS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#808000")


@dataclass(frozen=True)
class Box:
    """A named box in pixels of the original picture; ``x1 <= x2`` and ``y1 <= y2``."""

    name: str
    x1: float
    y1: float
    x2: float
    y2: float


def parse_boxes(text, width, height):
    """The boxes that an answer names.

    Args:
        text: an answer, with its ``<ref>`` and ``<box>`` marks or, as plain decoding leaves it, without; then the words
            before a box are its name.
        width, height: of the original picture, in pixels.

    Returns:
        A list of :class:`Box`, clipped to the picture; empty where the text has none. Coordinates whose sum is below 4, in
        each of the boxes that go together, are taken as fractions of the sides, as the evaluation of RefCOCO in InternVL does.
    """
    boxes, end = [], 0
    for match in _BOXES.finditer(text):
        name = match["name"]
        if name is None:
            name = re.sub(r"<[^<>]*>", "", text[end : match.start()]).strip(" \n[],;:.，；：。")
        end = match.end()
        numbers = [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", match["boxes"])]
        found = [numbers[at : at + 4] for at in range(0, len(numbers), 4)]
        unit = 1.0 if all(sum(values) < 4 for values in found) else 1000.0
        for values in found:
            x1, x2 = sorted(min(max(v / unit, 0.0), 1.0) * width for v in values[0::2])
            y1, y2 = sorted(min(max(v / unit, 0.0), 1.0) * height for v in values[1::2])
            boxes.append(Box(name.strip(), x1, y1, x2, y2))
    return boxes


def draw_boxes(image, boxes):
    """A copy of a PIL ``image`` in RGB with ``boxes`` and their names drawn on it; equal names share a colour."""
    image = image.convert("RGB")
    draw = ImageDraw.Draw(image)
    line = max(2, round(max(image.size) / 300))
    font = ImageFont.load_default(size=max(11, round(max(image.size) / 45)))
    names = list(dict.fromkeys(box.name for box in boxes))
    for box in boxes:
        color = _COLORS[names.index(box.name) % len(_COLORS)]
        draw.rectangle((box.x1, box.y1, box.x2, box.y2), outline=color, width=line)
        if box.name:
            left, top, right, bottom = draw.textbbox((0, 0), box.name, font=font)
            x = min(box.x1, max(0, image.width - (right - left) - 2 * line))
            y = max(0, box.y1 - (bottom - top) - 2 * line)
            draw.rectangle((x, y, x + right - left + 2 * line, y + bottom - top + 2 * line), fill=color)
            draw.text((x + line - left, y + line - top), box.name, fill="white", font=font)
    return image
