"""A table of many tasks, and published figures beside it."""

import csv
import io
from pathlib import Path

from paddlemix.errors import DataError
from paddlemix.files import write_whole

from .answers import write_json
from .rows import read_text
from .tasks import GROUPS, TASKS

_COLUMNS = ("model", "task", "score", "source")
# Scores that are no shares: everything else is printed in per cent, as papers do.
_POINTS = ("Avg", "total", "all", "average_score")


def read_published(path):
    """Rows of a CSV file with the columns model, task, score and source, score as a number.

    Args:
        path: the file; scores are in the unit in which papers print them, such as 83.3.

    Raises:
        DataError: it cannot be read, a column is missing, a task is not known, or a score is no number.
    """
    rows = []
    reader = csv.DictReader(io.StringIO(read_text(path)))
    missing = [name for name in _COLUMNS if name not in (reader.fieldnames or ())]
    if missing:
        raise DataError(f"{path} has no column '{missing[0]}': its first line must be {','.join(_COLUMNS)}")
    for number, row in enumerate(reader, 2):
        row = {name: (row[name] or "").strip() for name in _COLUMNS}
        try:
            row["score"] = float(row["score"])
        except ValueError:
            raise DataError(f"{path}: line {number} has the score '{row['score']}', which is no number: correct it") from None
        if row["task"] in GROUPS:
            raise DataError(f"{path}: line {number} names the group '{row['task']}': name one of its tasks")
        if row["task"] not in TASKS and not row["task"]:
            raise DataError(f"{path}: line {number} names no task: add one")
        rows.append(row)
    return rows


def printed(metric, value):
    """A score in the unit in which papers print it: per cent, or points."""
    return value if metric in _POINTS else 100 * value


def table(results, published=()):
    """Lines of a Markdown table: a task a line, ours with its interval, then a column for each published model.

    Args:
        results: what ``score.json`` holds, of each task.
        published: rows of :func:`read_published`.
    """
    tasks = {result["task"] for result in results}
    models = list(dict.fromkeys(row["model"] for row in published if row["task"] in tasks))
    theirs = {(row["task"], row["model"]): row["score"] for row in published}
    head = ["task", "metric", "score", "95%", "answered", *models]
    lines = ["| " + " | ".join(head) + " |", "|---|---|" + "---:|" * (len(head) - 2)]
    for result in results:
        metric, value, spread = result.get("metric", ""), "", ""
        if metric in result["score"]:
            value = f"{printed(metric, result['score'][metric]):.2f}"
            if metric in result.get("intervals", {}):
                spread = " to ".join(f"{printed(metric, end):.2f}" for end in result["intervals"][metric])
        elif result.get("submission"):
            value = "by its server"
        cells = [f"{theirs[result['task'], model]:g}" if (result["task"], model) in theirs else "" for model in models]
        answered = f"{result['scored']} of {result['questions']}"
        lines.append("| " + " | ".join([result["task"], metric, value, spread, answered, *cells]) + " |")
    return [line.replace("\n", " ") for line in lines]


def write_suite(results, out_dir, published=()):
    """Write ``suite.md`` and ``suite.json`` into ``out_dir``; returns the lines of the table."""
    lines = table(results, published)
    Path(out_dir).mkdir(parents=True, exist_ok=True)
    sources = sorted({(row["model"], row["source"]) for row in published if row["source"]})
    notes = [f"- {model}: {source}" for model, source in sources]
    write_whole(Path(out_dir) / "suite.md", "\n".join([*lines, *([""] if notes else []), *notes]) + "\n")
    keys = ("task", "metric", "score", "intervals", "questions", "scored", "failed", "published")
    write_json(Path(out_dir) / "suite.json", [{key: result[key] for key in keys if key in result} for result in results])
    return lines
