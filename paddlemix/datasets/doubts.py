"""What is likely a mistake in training data, though training would take it: boxes, repetitions, pictures that are missing.

Boxes are ``[x1, y1, x2, y2]`` in thousandths of the picture's sides, in ``<box>`` marks or in JSON.
"""

import hashlib
import json
import os
import re
from collections import Counter
from dataclasses import dataclass, field

from paddlemix.boxes import written_boxes
from paddlemix.errors import UserError
from paddlemix.processors.image import picture_traits
from paddlemix.processors.media import Remote

# What each kind of doubt says, with its number in front.
KINDS = {
    "box_outside": "box(es) outside of 0..1000",
    "box_fractions": "box(es) in 0..1, where thousandths of the picture's sides are learned",
    "box_pixels": "box(es) that look like pixels of the picture, where thousandths of its sides are learned",
    "box_order": "box(es) with x1 > x2 or y1 > y2",
    "box_form": "<box> without [[x1, y1, x2, y2]] in it",
    "mark_not_closed": "text(s) in which <ref> or <box> is not closed",
    "missing_again": "picture(s) that are missing in several records",
    "duplicates": "record(s) that an earlier one equals",
    "equal_answers": "answers, all of them equal",
}
EXAMPLES = 3
_MARKED = re.compile(r"<box>(.*?)</box>", re.DOTALL)
_SMALL, _MANY = 800, 20  # see _in_pixels


@dataclass
class Doubts:
    """Of one record.

    Attributes:
        told: ``[(kind, what), ...]`` with kinds of :data:`KINDS`.
        missing: pictures that are not there.
        record, answers: digests of all that the record says, and of its answers.
        turned, transparent: pictures that EXIF data turn, and that have pixels which are not opaque.
        fitting: for each box of a small picture, whether it would fit into it in pixels.
        boxes: how many there are.
    """

    told: list = field(default_factory=list)
    missing: list = field(default_factory=list)
    record: bytes = b""
    answers: bytes = b""
    turned: int = 0
    transparent: int = 0
    fitting: list = field(default_factory=list)
    boxes: int = 0


def look_at(record, sizes=(), bare=False):
    """The :class:`Doubts` about a record; ``sizes`` are (width, height) of its pictures where these are known.

    ``bare`` is that of :func:`~paddlemix.boxes.written_boxes`.
    """
    doubts = Doubts()
    texts = [turn["value"] for turn in record.conversations]
    pictures = [path for path in record.images if isinstance(path, str)]
    doubts.missing = [path for path in dict.fromkeys(pictures) if not os.path.exists(path)]
    doubts.record = _digest([record.conversations, [str(path) for path in record.images], str(record.video), record.clip])
    doubts.answers = _digest([turn["value"] for turn in record.conversations if turn["from"] == "gpt"])
    for text in texts:
        for mark in ("ref", "box"):
            if not _closed(text, mark):
                doubts.told.append(("mark_not_closed", _short(text)))
                break
        doubts.told += [("box_form", _short(body)) for body in _MARKED.findall(text) if not written_boxes(f"<box>{body}</box>")]
        for box in written_boxes(text, bare):
            doubts.boxes += 1
            doubts.told += [(kind, _numbers(box)) for kind in _of_box(box, sizes)]
            if len(sizes) == 1 and max(sizes[0]) < _SMALL:
                doubts.fitting.append(_fits(box, sizes[0]))
    if sizes:
        for path in record.images:
            if isinstance(path, Remote):
                continue  # it is not fetched once more for this
            try:
                turned, transparent = picture_traits(path)
            except UserError:
                continue  # told as a problem
            doubts.turned, doubts.transparent = doubts.turned + turned, doubts.transparent + transparent
    return doubts


def _of_box(box, sizes):
    """Kinds of doubt about four numbers; ``sizes`` of the record's pictures."""
    if max(map(abs, box)) <= 1 and any(box):
        yield "box_fractions"
    elif min(box) < 0 or max(box) > 1000:
        yield "box_pixels" if min(box) >= 0 and any(_fits(box, size) for size in sizes) else "box_outside"
    if box[0] > box[2] or box[1] > box[3]:
        yield "box_order"


def _fits(box, size):
    return max(box[0], box[2]) <= size[0] and max(box[1], box[3]) <= size[1]


def _closed(text, mark):
    """Whether each opening mark in a text has its closing one before the next."""
    depth = 0
    for found in re.findall(rf"</?{mark}>", text):
        depth += -1 if found[1] == "/" else 1
        if depth not in (0, 1):
            return False
    return depth == 0


def summarize(found, line, fractions=False):
    """What there is to say of a data set.

    Args:
        found: the :class:`Doubts` of each record, or None where it cannot be read.
        line: called with the number of a record, gives its line in the file.
        fractions: whether a data set may have all its boxes in 0..1.

    Returns:
        ``{kind: {"count": ..., "examples": [{"line": ..., "what": ...}, ...]}}``, at most three examples each.
    """
    told = {}

    def add(kind, number, what, count=1):
        entry = told.setdefault(kind, {"count": 0, "examples": []})
        entry["count"] += count
        if len(entry["examples"]) < EXAMPLES:
            entry["examples"].append({"line": line(number), "what": what})

    seen, lost, first = {}, Counter(), {}
    for number, doubts in enumerate(found):
        if doubts is None:
            continue
        for kind, what in doubts.told:
            add(kind, number, what)
        for path in doubts.missing:
            lost[path] += 1
            first.setdefault(path, number)
        if doubts.record in seen:
            add("duplicates", number, f"equals line {line(seen[doubts.record])}")
        seen.setdefault(doubts.record, number)
    for path, times in lost.most_common():
        if times > 1:
            add("missing_again", first[path], f"{path} in {times} records")
    if fractions and told.get("box_fractions", {}).get("count") == sum(doubts.boxes for doubts in found if doubts is not None):
        del told["box_fractions"]
    known = [(number, doubts) for number, doubts in enumerate(found) if doubts is not None]
    if len(known) > 1 and len({doubts.answers for _, doubts in known}) == 1:
        for number, _ in known:
            add("equal_answers", number, "the same answer")
    fitting = [(number, fits) for number, doubts in known for fits in doubts.fitting]
    if len(fitting) >= _MANY and all(fits for _, fits in fitting) and "box_fractions" not in told:
        # Boxes in thousandths reach beyond the sides of small pictures sooner or later; these never do.
        for number, _ in fitting:
            add("box_pixels", number, "within the picture's width and height in pixels, as all boxes of small pictures here")
    return told


def sentences(name, told, annotation):
    """One line for each kind that :func:`summarize` found in the data set ``name``."""
    for kind, entry in told.items():
        examples = "; ".join(f"line {example['line']}: {example['what']}" for example in entry["examples"])
        yield f"warning: data set '{name}': {entry['count']} {KINDS[kind]} ({annotation}: {examples})"


def _digest(value):
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=8).digest()


def _numbers(box):
    return "[" + ", ".join(f"{number:g}" for number in box) + "]"


def _short(text):
    text = " ".join(text.split())
    return text if len(text) <= 60 else text[:57] + "..."
