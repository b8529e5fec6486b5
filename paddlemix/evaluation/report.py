"""The page of a run: scores with intervals, bars by category, what was taken for what, and answers with their pictures."""

import math
import random
from collections import Counter

from paddlemix.boxes import Box, draw_boxes
from paddlemix.errors import UserError
from paddlemix.processors.image import open_image

from .gallery import Report, thumbnail
from .intervals import interval
from .media import frames
from .reading import group_of, labels
from .scorers.boxes import dior_box, refcoco_box

_SHOWN = 12  # answers of each kind
_PICTURES = 4  # of a question
_SIDE = 360  # of a picture, in pixels
_TEXT = 1200  # characters of a prompt or an answer
_GROUPS = 60  # bars


def write_report(path, task, rows, each, result, known, questions):
    """Write ``report.html``.

    Args:
        path: of the page.
        task: the benchmark.
        rows: lines of ``answers.jsonl`` that were scored, or all where only a server scores.
        each: a number for each of them, higher is better; None where there is none.
        result: what ``score.json`` holds.
        known: what ``run.json`` holds.
        questions: those of the task, by the rows' ``index``; pictures are opened for the answers that are shown.
    """
    report = Report(f"{task.name}: {known.get('model', '')}".rstrip(": "))
    _scores(report, result)
    if each is not None and len(rows):
        _groups(report, rows, each)
        _confusion(report, task, rows)
    generator = random.Random(known.get("seed") or 0)
    if each is not None:
        order = list(range(len(rows)))
        generator.shuffle(order)  # among equals
        report.heading("Worst answers")
        worst = sorted(order, key=lambda i: each[i])[:_SHOWN]
        report.examples([_example(task, rows[i], questions, each[i]) for i in worst])
    report.heading("Answers at random")
    drawn = generator.sample(range(len(rows)), min(_SHOWN, len(rows)))
    report.examples([_example(task, rows[i], questions, each[i] if each is not None else None) for i in drawn])
    failures = result["failures"]
    if failures:
        report.heading("Not answered")
        report.table(("id", "why"), [(failure["id"], failure["error"]) for failure in failures])
    report.heading("Run")
    counts = ("questions", "scored", "failed", "empty", "cut", "unreadable")
    report.write(path, {name: result[name] for name in counts if name in result}, known)


def _scores(report, result):
    published = result.get("published", [])
    intervals = result.get("intervals", {})
    rows = []
    for name, value in result["score"].items():
        low, high = intervals.get(name, ("", ""))
        rows.append((name, float(value), low, high))
    if rows:
        report.heading("Scores")
        report.table(("score", "", "95% from", "to"), rows)
    if published:
        report.heading("Published")
        names = ("model", "score", "source")
        report.table(names, [[row[name] for name in names] for row in published])


def _groups(report, rows, each):
    groups = {}
    for row, value in zip(rows, each):
        name = group_of(row["reference"], row["id"])
        if name is not None:
            groups.setdefault(name, []).append(float(value))
    if not 1 < len(groups) <= _GROUPS:
        return
    report.heading("By category: mean over questions")
    lines = []
    for name, values in sorted(groups.items(), key=lambda item: -sum(item[1]) / len(item[1])):
        mean, (low, high) = sum(values) / len(values), interval(values, draws=500)
        lines.append((name, mean, f"{mean:.3f}  ({low:.3f} to {high:.3f}, {len(values)} questions)"))
    report.bars(lines)


def _confusion(report, task, rows):
    pairs = [labels(task.scorer, row["reference"], row["answer"]) for row in rows]
    counts = Counter((truth, "unreadable" if said is None else said) for said, truth in filter(None, pairs))
    if not counts:
        return
    truths = sorted({truth for truth, _ in counts})
    said = sorted({label for _, label in counts}, key=lambda label: (label == "unreadable", label))
    report.heading("Right answer by line, given answer by column")
    report.table(
        ("", *said, "all"),
        [(truth, *(counts[truth, label] for label in said), sum(counts[truth, s] for s in said)) for truth in truths],
    )


def _example(task, row, questions, value):
    reference = row["reference"]
    lines = [f"#{row['id']}", row["question"][:_TEXT], f"answer: {row['answer'][:_TEXT]}"]
    lines += [f"truth: {text[:_TEXT]}" for text in _truth(reference)]
    if "review" in row:
        lines.append(f"judge: {row['review'][:_TEXT]}")
    if value is not None:
        lines.append(f"{float(value):.3g}")
    found = [thumbnail(picture, _SIDE) for picture in _pictures(task, row, questions)]
    return found, "\n".join(lines), None if value is None else value >= 0.5


def _truth(reference):
    for name in ("answers", "answer", "label", "captions", "bbox", "gt_answer"):
        if reference.get(name) is not None:
            value = reference[name]
            return [" | ".join(str(v) for v in value) if isinstance(value, list) else str(value)]
    return []


def _pictures(task, row, questions):
    question = questions[row["index"]] if row["index"] < len(questions) else None
    if question is None:
        return []
    try:
        found = frames(question, _PICTURES) if question.clip else question.pictures[:_PICTURES]
        found = [open_image(source) for source in found]
    except UserError:
        return []
    reader = {"refcoco": refcoco_box, "dior": dior_box}.get(task.scorer)
    if reader is not None and found:
        found[0] = _with_boxes(found[0], row, reader)
    return found


def _with_boxes(picture, row, reader):
    """``picture`` with the true box and, where the answer has one, that of the answer."""
    reference = row["reference"]
    across, down = picture.width / max(1, reference["width"]), picture.height / max(1, reference["height"])
    shown = []
    for name, box in (("answer", reader(row["answer"], reference["width"], reference["height"])), ("truth", reference["bbox"])):
        if box is None:
            continue
        if not all(math.isfinite(value) for value in box):
            continue
        (x1, x2), (y1, y2) = sorted((box[0] * across, box[2] * across)), sorted((box[1] * down, box[3] * down))
        inside = [min(max(float(v), 0.0), float(side)) for v, side in zip((x1, y1, x2, y2), (*picture.size, *picture.size))]
        shown.append(Box(name, *inside))
    return draw_boxes(picture, shown)
