"""What a task's data lacks, told before a model is loaded: ``paddlemix evaluate --check``."""

import importlib.util
import os
from collections import Counter

from paddlemix.errors import UserError

from .loaders import load
from .rows import find
from .sources import SOURCES

_NAMED = 5  # of what is missing of a kind
_PACKAGES = {"mmmu": "pyarrow", "mmmu_pro": "pyarrow", "mathvista": "pyarrow", "mantis": "pyarrow", "mmbench": "pandas"}
_WRITTEN = {"mmbench": "openpyxl", "ccbench": "openpyxl"}
_SCORED = {"captions": "pycocoevalcap", "anls": "rapidfuzz", "mathvista": "rapidfuzz"}


def check(task, data_root):
    """What is there and what is not.

    Args:
        task: a :class:`~.tasks.Task`.
        data_root: folder of the data sets.

    Returns:
        ``(lines, whole)``: lines of text about the task, and whether all of it can be asked and scored.
    """
    lines, missing = [], []
    for package in filter(
        None, (_PACKAGES.get(str(task.loader)), _WRITTEN.get(task.submission), _SCORED.get(str(task.scorer)))
    ):
        if importlib.util.find_spec(package) is None:
            missing.append(f"the package {package} is not installed: pip install 'paddlemix[eval]'")
    files = [*task.files, *(task.options[name] for name in ("truth",) if name in task.options and task.scorer)]
    for name in files if isinstance(task.loader, str) else ():  # others know themselves where theirs are
        if not find(data_root, name).exists():
            missing.append(f"{find(data_root, name)} is missing")
    questions = []
    if not missing:
        try:
            questions = load(task, data_root)
        except UserError as error:
            missing.append(str(error))
    broken = [question for question in questions if question.error]
    if broken:
        shown = "; ".join(question.error for question in broken[:_NAMED])
        missing.append(f"{len(broken)} rows cannot be used: {shown}{_more(broken)}")
    pictures = Counter(name for question in questions for name in question.pictures if isinstance(name, str))
    gone = [name for name in pictures if not os.path.exists(name)]
    if gone:
        names = set(gone)
        concerned = sum(not names.isdisjoint(question.pictures) for question in questions)
        missing.append(f"{len(gone)} pictures are missing, of {concerned} questions: {', '.join(gone[:_NAMED])}{_more(gone)}")
    kinds = f"{len(pictures)} files of pictures" if pictures else "pictures inside the tables"
    lines.append(f"{task.name}: {len(questions)} questions, {kinds}" if questions else f"{task.name}: nothing to ask")
    lines += [f"  {problem}" for problem in missing]
    if missing and task.source in SOURCES:
        where = SOURCES[task.source]
        lines.append(f"  from: {where.url} ({where.licence})")
    if task.judge and task.prediction_key == "review":
        lines.append("  is scored by a judge: --judge_url and --judge_model")
    elif task.scorer is None:
        lines.append("  is scored by its server: the run writes the file to send")
    return lines, not missing


def _more(found):
    return f", and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
