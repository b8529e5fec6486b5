"""Asking a model all questions of a task: batches by its batched decoding, pictures prepared ahead, one process or several.

Processes pull work: each gets the next batch when it has answered one, so that none waits for another, and every question is
answered exactly once. Only the first process writes.
"""

import contextlib
import hashlib
import os
import random
from collections import defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from paddlemix.errors import ConfigError, UserError

from .answers import RunFolder, write_json
from .intervals import interval
from .loaders import load
from .local import LocalModel
from .tasks import score


@dataclass(frozen=True)
class Settings:
    """How a run asks. ``batch_size`` 0 is chosen by memory; the others are the command's."""

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
        model: a :class:`LocalModel`, or what has its methods.
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


def _worker(connection, task, settings, device):
    """A process that asks for questions through ``connection`` and sends rows of answers back."""
    os.environ.setdefault("GLOG_minloglevel", "2")
    from paddlemix.kernels import cpu as kernels

    try:
        kernels.set_num_threads(max(1, kernels.num_threads() // settings.processes))
        model = LocalModel.load(settings, device)
        found = prepare(task, settings)

        def work():
            connection.send(("more", None))
            while (indices := connection.recv()) is not None:
                yield [(i, found[i]) for i in indices]
                connection.send(("more", None))

        ask(model, task, work(), lambda rows: connection.send(("rows", rows)))
        connection.send(("done", None))
    except (UserError, OSError) as error:
        connection.send(("error", str(error)))
    except EOFError:
        pass


def _ask_with_processes(task, settings, work, write):
    """Hand out ``work`` to processes that ask for it."""
    import multiprocessing
    from multiprocessing.connection import wait

    context = multiprocessing.get_context("spawn")
    work, busy, problem = deque(work), defaultdict(dict), None  # what each process has not answered yet, by index
    workers = {}
    for _ in range(settings.processes):
        ours, theirs = context.Pipe()
        process = context.Process(target=_worker, args=(theirs, task, settings, None), daemon=True)
        process.start()
        theirs.close()
        workers[ours] = process
    try:
        while workers:
            for connection in wait(list(workers)):
                try:
                    kind, value = connection.recv()
                except EOFError:
                    kind, value = "error", "a process ended on its own: see its messages"
                if kind == "error":  # its work is done by the others
                    problem = value
                    left = busy.pop(connection, None)
                    work.extendleft([list(left.items())] if left else [])
                    workers.pop(connection)
                elif kind == "rows":
                    for answered in value:
                        busy[connection].pop(answered["index"], None)
                    write(value)
                elif kind == "done":
                    workers.pop(connection).join()
                else:
                    batch = work.popleft() if work else []
                    busy[connection].update(batch)
                    with contextlib.suppress(OSError):  # it has just died, and says so in the next turn
                        connection.send([index for index, _ in batch] or None)
    finally:
        for process in workers.values():
            process.terminate()
    if work:
        raise ConfigError(f"no process could go on: {problem}; what was answered is kept, the same command goes on")


def run_task(task, settings, out_dir, resume=True, model=None, digest=None, progress=True, judge=None):
    """Ask all questions of a task, and score the answers.

    Args:
        model: what answers, with the methods of :class:`LocalModel`; None loads ``settings.model``.
        digest: of the model, for ``run.json``.
        judge: (url, model) of the judge, for tasks that need one.

    Returns:
        What ``score.json`` holds.

    Raises:
        UserError: data or model cannot be used at all.
    """
    from tqdm import tqdm

    found = prepare(task, settings)
    texts = hashlib.blake2b(repr([(str(q.id), q.prompt) for q in found]).encode(), digest_size=16).hexdigest()
    known = {
        "task": task.name,
        "model_digest": digest,
        "dtype": settings.dtype,
        "dynamic": settings.dynamic,
        "max_num": settings.max_num or task.max_num,
        "cot": settings.cot,
        "temperature": settings.temperature,
        "seed": settings.seed,
        "questions_digest": texts,
        "rows": len(found),
    }
    folder = RunFolder(Path(out_dir) / task.name, known, resume)
    left = len(found) - len(folder.done)
    with tqdm(
        total=len(found), initial=len(found) - left, desc=task.name, unit="question", disable=None if progress else True
    ) as bar:

        def write(rows):
            folder.add(rows)
            bar.update(len(rows))

        if left:
            if settings.processes > 1 and model is None:
                size = settings.batch_size or max(1, min(32, -(-left // (4 * settings.processes))))
                _ask_with_processes(task, settings, batches(found, folder.done, size), write)
            else:
                model = model or LocalModel.load(settings)
                ask(model, task, batches(found, folder.done, model.batch_size(task)), write)
    rows, problems = folder.finish(), []
    if judge and task.prediction_key == "review":
        from .judge import review

        reviewed, problems = review(task, rows, folder.directory, *judge)
        reviews = {row["index"]: row for row in reviewed}
        rows = [reviews.get(row["index"], row) for row in rows]
    return conclude(task, rows, folder.directory, problems, judge)


def conclude(task, rows, directory, problems=(), judge=None):
    """Score the rows of a run and write ``score.json`` and the server's file."""
    from .submissions import write_submission

    # With "mean_interval", where 95 per cent of resamplings of the questions have the mean over them.
    answered = [row for row in rows if "error" not in row]
    failed = [row for row in rows if "error" in row]
    result = {"task": task.name, "score": {}, "questions": len(rows), "failed": len(failed), "scored": len(answered)}
    result["empty"] = sum(not row["answer"].strip() for row in answered)
    result["cut"] = sum(bool(row.get("cut")) for row in answered)
    result["failures"] = [{"id": row["id"], "error": row["error"]} for row in failed[:100]]
    if judge and task.prediction_key == "review":
        result |= {"judge": judge[1], "judge_prompt": "the package's own short one", "not_judged": list(problems)}
    if task.prediction_key == "review":
        answered = [row for row in answered if "review" in row]
    if task.scorer is not None and answered:
        references = [{"id": row["id"], **row["reference"]} for row in answered]
        result["score"], each = score(task, answered, references, each=True)
        result |= {"metric": task.metric, "mean_interval": interval(each)}
    if task.submission:
        result["submission"] = write_submission(task, rows, directory).name
    write_json(directory / "score.json", result)
    return result
