"""Asking a model all questions of a task: batches by its batched decoding, pictures prepared ahead, one process or several.

Several processes pull work (:mod:`.workers`): each gets the next batch when it has answered one, so that none waits for
another, and every question is answered exactly once. Only the process that hands it out writes.
"""

import contextlib
import hashlib
import platform
import random
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from itertools import chain
from pathlib import Path

import paddlemix

from .answers import RunFolder, write_json
from .intervals import intervals
from .loaders import load
from .reading import is_unreadable
from .tasks import score


@dataclass(frozen=True)
class Settings:
    """How a run asks. ``batch_size`` 0 is chosen by memory; ``scales`` is None, or Mini-Monkey's ``plain`` or ``scm``; ``ray``
    the address of a cluster; the others are the command's."""

    model: str
    data_root: str = "data"
    dynamic: bool = False
    max_num: int | None = None
    batch_size: int = 0
    limit: int | None = None
    shuffle_seed: int | None = None
    cot: bool = False
    temperature: float = 0.0
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    processes: int = 1
    num_beams: int = 1
    adapters: tuple = ()
    weight_dtype: str | None = None
    quantize_parts: str | None = None
    kv_cache_dtype: str | None = None
    activation_dtype: str | None = None
    scales: str | None = None
    ray: str | None = None
    tensor_parallel: int | str = 1


def prepare(task, settings):
    """The questions that a run asks, in data order."""
    found = load(task, settings.data_root)
    if settings.shuffle_seed is not None:
        order = list(range(len(found)))
        random.Random(settings.shuffle_seed).shuffle(order)
        found = [found[i] for i in sorted(order[: settings.limit])]
    return found[: settings.limit]


def batches(questions, done, size):
    """Lists of (index, question) not yet answered: those with most to read first, those of the same pictures together."""
    left, longest = [(i, question) for i, question in enumerate(questions) if i not in done], {}
    for _, question in left:
        longest[question.pictures] = max(longest.get(question.pictures, 0), len(question.prompt))
    firsts = {pictures: number for number, pictures in enumerate(longest)}

    def order(item):
        index, question = item
        pictures = question.pictures
        return -len(pictures), *((-longest[pictures], firsts[pictures]) if pictures else ()), -len(question.prompt), index

    left.sort(key=order)
    return [left[at : at + size] for at in range(0, len(left), size)]


def ask(model, task, work, write):
    """Answer all batches of ``work`` in this process; ``write`` is called with the rows of answers as they come.

    Args:
        model: a :class:`~.local.LocalModel`, or what has its methods.
        task: the benchmark.
        work: an iterable of lists of (index, question); the next is asked for while earlier ones are being answered.
        write: takes a list of rows.
    """
    asked = {}

    def items():
        waiting, ahead = deque(), 2 * model.batch_size(task)
        for index, question in chain.from_iterable(work):
            asked[index] = question
            waiting.append((index, pool.submit(model.encode, task, question)))
            if len(waiting) > ahead:
                index, item = waiting.popleft()
                yield index, item.result()
        for index, item in waiting:
            yield index, item.result()

    with ThreadPoolExecutor(2) as pool:
        for results in model.answers(task, items()):
            write([row(index, asked.pop(index), result) for index, result in results])


def row(index, question, result):
    """The line of an answer."""
    return {"id": question.id, **result, **question.record, "reference": question.reference, "index": index}


def _paddle_version():
    """Of the installed Paddle, which need not be loaded where a server or other processes answer."""
    for name in ("paddlepaddle", "paddlepaddle-gpu"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(name)
    return None


class _RunningScore:
    """What the progress bar tells of the score so far; computed seldom enough to cost nothing.

    Args:
        task: the benchmark.
        done: ``{index: row}``, which grows.
    """

    def __init__(self, task, done):
        self.task, self.done, self._next = task, done, 0.0
        self.known = task.scorer not in (None, "captions") and task.prediction_key == "answer"

    def __call__(self):
        """The score with its name, or None where it is not due."""
        if not self.known or time.monotonic() < self._next:
            return None
        began = time.monotonic()
        rows = [row for row in self.done.values() if "error" not in row]
        found = {}
        if rows:
            found = score(self.task, rows, [{"id": row["id"], **row["reference"]} for row in rows])
        ended = time.monotonic()
        self._next = ended + max(2.0, 50 * (ended - began))
        name = self.task.metric if self.task.metric in found else next(iter(found), None)
        return None if name is None else f"{name} {found[name]:.4g}"


def _known(task, settings, found, digest):
    """What ``run.json`` holds: what must be alike for answers to belong together, and what only tells of the run."""
    texts = hashlib.blake2b(repr([(str(q.id), q.prompt) for q in found]).encode(), digest_size=16).hexdigest()
    from paddlemix.checkpoints.files import model_digest

    alike = {
        "task": task.name,
        "model_digest": digest,
        "adapters": [model_digest(folder) for folder in settings.adapters],
        "dtype": settings.dtype,
        "weight_dtype": settings.weight_dtype,
        **({"quantize_parts": settings.quantize_parts} if settings.quantize_parts else {}),
        **{name: getattr(settings, name) for name in ("kv_cache_dtype", "activation_dtype") if getattr(settings, name)},
        "dynamic": settings.dynamic,
        "max_num": settings.max_num or task.max_num,
        "scales": settings.scales,
        "num_beams": settings.num_beams,
        "prompt": task.prompt,
        "cot": settings.cot,
        "temperature": settings.temperature,
        "seed": settings.seed,
        "questions_digest": texts,
        "rows": len(found),
    }
    versions = {"paddlemix": paddlemix.__version__, "paddle": _paddle_version(), "python": platform.python_version()}
    told = {"model": settings.model, "limit": settings.limit, "shuffle_seed": settings.shuffle_seed, "versions": versions}
    return alike, told


def run_task(
    task, settings, out_dir, resume=True, model=None, digest=None, progress=True, judge=None, published=(), report=True
):
    """Ask all questions of a task, and score the answers.

    Args:
        model: what answers, with the methods of :class:`~.local.LocalModel`; None loads ``settings.model``.
        digest: of the model, for ``run.json``.
        judge: (url, model) of the judge, for tasks that need one or can use one.
        published: rows of :func:`~.suite.read_published`.
        report: whether to write ``report.html``.

    Returns:
        What ``score.json`` holds.

    Raises:
        UserError: data or model cannot be used at all.
    """
    from tqdm import tqdm

    found = prepare(task, settings)
    alike, told = _known(task, settings, found, digest)
    folder = RunFolder(Path(out_dir) / task.name, alike, resume, told, [str(question.id) for question in found])
    left = len(found) - len(folder.done)
    running = _RunningScore(task, folder.done)
    with tqdm(
        total=len(found), initial=len(found) - left, desc=task.name, unit="question", disable=None if progress else True
    ) as bar:

        def write(rows):
            folder.add(rows)
            bar.update(len(rows))
            if not bar.disable and (shown := running()):
                bar.set_postfix_str(shown)

        if left:
            if model is None and (settings.processes > 1 or settings.ray):
                from .workers import ask_with_workers

                size = settings.batch_size or max(1, min(64, -(-left // (4 * settings.processes))))
                ask_with_workers(task, settings, batches(found, folder.done, size), write)
            else:
                if model is None:
                    from .local import load_model

                    model = load_model(settings)
                ask(model, task, batches(found, folder.done, model.batch_size(task)), write)
    rows, problems = folder.finish(), []
    if judge and task.judge and task.scorer:
        from .judge import review
        from .judge_prompts import JudgePrompt

        prompt = JudgePrompt(task.judge, settings.data_root)
        reviewed, problems = review(task, rows, folder.directory, *judge, prompt)
        judge = (*judge, prompt.told)
        reviews = {row["index"]: row for row in reviewed}
        rows = [reviews.get(row["index"], row) for row in rows]
    return conclude(
        task,
        rows,
        folder.directory,
        problems,
        judge,
        published,
        found if report else None,
        known={**alike, **told},
        strangers=folder.strangers,
    )


def conclude(task, rows, directory, problems=(), judge=None, published=(), questions=None, known=None, strangers=0):
    """Score the rows of a run and write ``score.json``, the server's file and, where ``questions`` are given, the report."""
    from .submissions import write_submission

    answered = [row for row in rows if "error" not in row]
    failed = [row for row in rows if "error" in row]
    result = {"task": task.name, "score": {}, "questions": len(rows), "failed": len(failed), "scored": len(answered)}
    result["empty"] = sum(not row["answer"].strip() for row in answered)
    result["cut"] = sum(bool(row.get("cut")) for row in answered)
    result["unreadable"] = sum(is_unreadable(task.scorer, row["reference"], row["answer"]) for row in answered)
    result["without_question"] = strangers
    result["failures"] = [{"id": row["id"], "error": row["error"]} for row in failed[:100]]
    each, key = None, task.prediction_key
    if judge and task.judge and task.scorer:
        result |= {"judge": judge[1], "judge_prompt": judge[2], "not_judged": list(problems)}
        if key == "answer":  # the judge found the answers in texts
            answered = [{**row, "answer": row.get("review", row["answer"])} for row in answered]
    if key == "review":
        answered = [row for row in answered if "review" in row]
    if task.scorer is not None and answered:
        references = [{"id": row["id"], **row["reference"]} for row in answered]
        result["score"], each = score(task, answered, references, each=True)
        each = each if len(each) == len(answered) else None  # some have no truth
        texts = [str(row[key]) for row in answered]
        result |= {"metric": task.metric, "intervals": intervals(task.scorer, references, texts)}
    if found := [row for row in published if row["task"] == task.name]:
        result["published"] = found
    if task.submission:
        result["submission"] = write_submission(task, rows, directory).name
    write_json(directory / "score.json", result)
    if questions is not None:
        from .report import write_report

        shown = answered if each is not None else [row for row in rows if "error" not in row]
        write_report(directory / "report.html", task, shown, each, result, known or {}, questions)
    return result
