"""Boxes in answers: reading them from text and drawing them on the picture.

The models write ``<ref>name</ref><box>[[x1, y1, x2, y2], ...]</box>`` with coordinates in thousandths of the original
picture's width and height, whatever its tiling was. Asked for JSON, they write objects with ``bbox_2d`` (or ``bbox``) and
``label`` instead.
"""

import functools
import json
import re
from dataclasses import dataclass
from pathlib import Path

from PIL import ImageDraw, ImageFont

_NUMBER = r"\s*-?\d+(?:\.\d+)?\s*"
_BOX = rf"\[{_NUMBER}(?:,{_NUMBER}){{3}}\]"
_BOXES = re.compile(
    rf"(?:<ref>(?P<name>(?:(?!</?ref>).)*)</ref>)?\s*(?P<open><box>)?\s*(?P<boxes>\[\s*{_BOX}(?:\s*,\s*{_BOX})*\s*\]|{_BOX})\s*(?:</box>)?",
    re.DOTALL,
)
_MARKED = re.compile(r"<box>(.*?)</box>", re.DOTALL)
_NUMBERS = re.compile(r"-?\d+(?:\.\d+)?")
_BOX_KEYS, _NAME_KEYS = ("bbox_2d", "bbox", "box_2d", "box"), ("label", "name", "text", "object")
_ONLY_NUMBERS = re.compile(r"[^\s\d\[\].,;-]")  # what a text of nothing but boxes has not
_FENCE = re.compile(r"```(?:json)?")
_COLORS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#808000")
# Where systems keep fonts, and those among them that have Chinese characters.
_FONT_FOLDERS = (
    "/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts", "/System/Library/Fonts", "C:/Windows/Fonts",
)  # fmt: skip
_WIDE_FONTS = (
    "NotoSans*CJK*", "NotoSerif*CJK*", "SourceHanSans*", "wqy-*", "DroidSansFallback*", "PingFang*", "msyh*", "simsun*",
)  # fmt: skip


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
        Four numbers in single brackets, without a mark around them or a name before them, are a box only where the text is
        nothing else.
    """
    boxes = []
    for found in _json_groups(text):
        boxes += _scaled(found, width, height)
    if boxes or any(f'"{key}"' in text for key in _BOX_KEYS):
        return boxes
    end = 0
    for match in _BOXES.finditer(text):
        name = match["name"]
        single = name is None and not match["boxes"].startswith("[[") and "[" not in text[: match.start()].rstrip()[-1:]
        if single and "<box>" not in text and _ONLY_NUMBERS.search(text):
            continue
        if name is None:
            name = re.sub(r"<[^<>]*>", "", text[end : match.start()]).strip(" \n[],;:.，；：。")
        end = match.end()
        numbers = [float(number) for number in _NUMBERS.findall(match["boxes"])]
        found = [numbers[at : at + 4] for at in range(0, len(numbers), 4)]
        boxes += _scaled([(name.strip(), values) for values in found], width, height)
    return boxes


def written_boxes(text, bare=False):
    """The boxes of a text as they are written, four numbers each: in ``<box>`` marks, and in JSON under a key for boxes.

    With ``bare`` also those of a text that is nothing else, as LLaVA's data have them.
    """
    boxes = []
    if bare and not _ONLY_NUMBERS.search(text):
        boxes += [[float(number) for number in _NUMBERS.findall(group)] for group in re.findall(_BOX, text)]
    for body in _MARKED.findall(text):
        for group in re.findall(_BOX, body):
            boxes.append([float(number) for number in _NUMBERS.findall(group)])
    if any(f'"{key}"' in text for key in _BOX_KEYS):
        boxes += [values for found in _json_groups(text) for _, values in found]
    return boxes


def _scaled(found, width, height):
    """Boxes of ``(name, [x1, y1, x2, y2])`` that go together."""
    unit = 1.0 if all(sum(values) < 4 for _, values in found) else 1000.0
    boxes = []
    for name, values in found:
        x1, x2 = sorted(min(max(v / unit, 0.0), 1.0) * width for v in values[0::2])
        y1, y2 = sorted(min(max(v / unit, 0.0), 1.0) * height for v in values[1::2])
        boxes.append(Box(name, x1, y1, x2, y2))
    return boxes


def _json_groups(text):
    """Lists of (name, four numbers): of each JSON value of the text that has boxes, those in it."""
    text, decoder, at = _FENCE.sub(" ", text), json.JSONDecoder(), 0
    while (start := min((i for i in (text.find("[", at), text.find("{", at)) if i >= 0), default=-1)) >= 0:
        try:
            value, at = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            at = start + 1  # an answer that was cut off: the objects in it are whole
            continue
        found = list(_json_boxes(value))
        if found:
            yield found


def _json_boxes(value):
    """(name, four numbers) of an object with a box, or of a list of such, whichever way they lie in each other."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, list):
            waiting += reversed(value)
        elif isinstance(value, dict):
            key = next((key for key in _BOX_KEYS if key in value), None)
            if key is None:
                waiting += reversed([v for v in value.values() if isinstance(v, (list, dict))])
                continue
            name = next((value[k] for k in _NAME_KEYS if isinstance(value.get(k), str)), "")
            several = (
                value[key] if isinstance(value[key], list) and value[key] and isinstance(value[key][0], list) else [value[key]]
            )
            for numbers in several:
                if isinstance(numbers, list) and len(numbers) == 4 and all(type(n) in (int, float) for n in numbers):
                    yield name.strip(), [float(n) for n in numbers]


def draw_boxes(image, boxes):
    """A copy of a PIL ``image`` in RGB with ``boxes`` and their names drawn on it; equal names share a colour."""
    image = image.convert("RGB")
    draw = ImageDraw.Draw(image)
    line = max(2, round(max(image.size) / 300))
    names = list(dict.fromkeys(box.name for box in boxes))
    font = _font("".join(map(str, names)), max(11, round(max(image.size) / 45)))
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


def _font(text, size):
    """Pillow's own font, or one of the system's where ``text`` has characters that this lacks, such as Chinese ones."""
    file = None if text.isascii() else _wide_font()
    try:
        return ImageFont.load_default(size=size) if file is None else ImageFont.truetype(file, size)
    except OSError:  # a font that Pillow cannot read
        return ImageFont.load_default(size=size)


@functools.cache
def _wide_font():
    """The file of a font with Chinese characters, or None."""
    for place in _FONT_FOLDERS:
        for name in _WIDE_FONTS:
            for file in sorted(Path(place).expanduser().rglob(name)):
                return str(file)
    return None
