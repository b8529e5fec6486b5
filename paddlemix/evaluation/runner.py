"""Asking a model all questions of a task: batches by its batched decoding, pictures prepared ahead, one process or several.

Processes pull work: each gets the next batch when it has answered one, so that none waits for another, and every question is
answered exactly once. Only the first process writes.
"""

import hashlib
import os
import random
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from paddlemix.errors import ConfigError, UserError
from paddlemix.files import read_json

from .answers import RunFolder, write_json
from .intervals import interval
from .loaders import load
from .media import tiles
from .scorers.open_answers import final_answer
from .tasks import COT, COT_TOKENS, score


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


def model_digest(directory):
    """A digest of a checkpoint: its configuration, and of its weight files names, sizes and the first and last MiB."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(Path(directory).iterdir()):
        if path.suffix in (".json", ".safetensors", ".bin", ".pdparams", ".model") and path.is_file():
            size = path.stat().st_size
            digest.update(f"{path.name} {size}".encode())
            with open(path, "rb") as file:
                digest.update(file.read(1 << 20))
                file.seek(max(0, size - (1 << 20)))
                digest.update(file.read(1 << 20))
    return digest.hexdigest()


class LocalModel:
    """A checkpoint that answers batches.

    Args:
        model, tokenizer: loaded.
        settings: a :class:`Settings`.
    """

    def __init__(self, model, tokenizer, settings):
        self.model, self.tokenizer, self.settings = model, tokenizer, settings

    @classmethod
    def load(cls, settings, device=None):
        """Load what ``settings`` name."""
        from paddlemix import device as devices
        from paddlemix.checkpoints.hub import resolve
        from paddlemix.models.internvl2 import InternVLChatModel, load_tokenizer

        devices.set_device(device or settings.device)
        directory = resolve(settings.model)
        if str(read_json(Path(directory) / "config.json").get("model_type")).startswith("llava"):
            from paddlemix.models import internvl_llava

            model = internvl_llava.LlavaForCausalLM.from_pretrained(directory, dtype=settings.dtype)
            return LlavaModel(model, internvl_llava.load_tokenizer(directory), settings)
        return cls(InternVLChatModel.from_pretrained(directory, dtype=settings.dtype), load_tokenizer(directory), settings)

    def batch_size(self, task):
        """Questions at once: what a quarter of the free memory holds, 32 at most."""
        if self.settings.batch_size:
            return self.settings.batch_size
        config = self.model.config.llm_config
        tokens = (self.settings.max_num or task.max_num) if self.settings.dynamic else 1
        positions = (tokens + 1) * self.model.config.num_image_token + 256 + task.max_new_tokens
        bytes_each = positions * config.num_hidden_layers * config.hidden_size * 4 * 2
        return max(1, min(32, _free_memory() // 4 // max(bytes_each, 1)))

    def encode(self, task, question):
        """(question, pixels, counts, prompt), or (question, error)."""
        try:
            if question.error:
                return question, question.error
            pixels, counts, prompt = tiles(
                question, task, self.model.config, self.settings.dynamic, self.settings.max_num or task.max_num
            )
            return question, pixels, counts, COT.format(prompt) if self.settings.cot else prompt
        except UserError as error:
            return question, str(error)

    def answer(self, task, items):
        """Answers to encoded questions: a dictionary for each, with ``answer`` or ``error``."""
        results = [{"question": item[0].prompt, "answer": "", "error": item[1]} if len(item) == 2 else None for item in items]
        good = [i for i, result in enumerate(results) if result is None]
        for i, result in zip(good, self._answer(task, [items[i][1:] for i in good]) if good else []):
            results[i] = result
        return results

    def _answer(self, task, items):
        import numpy as np

        pixels = [pixels for pixels, _, _ in items if pixels is not None]
        prompts = [prompt for _, _, prompt in items]
        most = COT_TOKENS if self.settings.cot else task.max_new_tokens
        config = {"max_new_tokens": most, "min_new_tokens": task.min_new_tokens, "num_beams": self.settings.num_beams}
        if self.settings.temperature > 0:
            config |= {"do_sample": True, "temperature": self.settings.temperature, "seed": self.settings.seed}
        try:
            answers = self.model.batch_chat(
                self.tokenizer, np.concatenate(pixels) if pixels else None, prompts, config, [counts for _, counts, _ in items]
            )
        except UserError as error:
            if len(items) == 1:
                return [{"question": prompts[0], "answer": "", "error": str(error)}]
            return [result for item in items for result in self._answer(task, [item])]
        results = []
        for prompt, answer in zip(prompts, answers):
            result = {"question": prompt, "answer": answer}
            if self.settings.cot:
                result |= {"answer": final_answer(answer).strip(), "output": answer}
            if len(self.tokenizer.encode(answer)) >= most:
                result["cut"] = True
            results.append(result)
        return results


class LlavaModel(LocalModel):
    """An InternVL-Chat-LLaVA checkpoint, whose pictures are one square each."""

    def encode(self, task, question):
        """(question, pixels, counts, prompt), or (question, error)."""
        from paddlemix.processors.clip import process_images

        config = self.model.config
        pad = question.record.get("pad")
        aspect = config.image_aspect_ratio if pad is None else "pad" if pad else "square"
        try:
            if question.error:
                return question, question.error
            pixels = process_images(list(question.pictures), config.image_size, aspect) if question.pictures else None
            return question, pixels, [1] * len(question.pictures), question.prompt
        except UserError as error:
            return question, str(error)


def _free_memory():
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return 4 << 30


def batches(questions, done, size):
    """Lists of (index, question) not yet answered: those with most to read first."""
    left = [(i, question) for i, question in enumerate(questions) if i not in done]
    left.sort(key=lambda item: (-len(item[1].pictures), -len(item[1].prompt), item[0]))
    return [left[at : at + size] for at in range(0, len(left), size)]


def ask(model, task, work, write):
    """Answer all batches of ``work`` in this process; ``write`` is called with the rows of each."""
    with ThreadPoolExecutor(2) as pool:
        waiting = deque()
        pending = iter(work)
        while True:
            while len(waiting) < 2 and (batch := next(pending, None)) is not None:
                waiting.append((batch, [pool.submit(model.encode, task, question) for _, question in batch]))
            if not waiting:
                return
            batch, items = waiting.popleft()
            results = model.answer(task, [item.result() for item in items])
            write([row(index, question, result) for (index, question), result in zip(batch, results)])


def row(index, question, result):
    """The line of an answer."""
    return {"id": question.id, **result, **question.record, "reference": question.reference, "index": index}


def _worker(connection, task, settings, device):
    os.environ.setdefault("GLOG_minloglevel", "2")
    try:
        model = LocalModel.load(settings, device)
        found = prepare(task, settings)
        connection.send(("ready", None))
        while (indices := connection.recv()) is not None:
            rows = []
            ask(model, task, [[(i, found[i]) for i in indices]], rows.extend)
            connection.send(("rows", rows))
    except (UserError, OSError) as error:
        connection.send(("error", str(error)))
    except EOFError:
        pass


def _ask_with_processes(task, settings, work, write):
    """Hand out ``work`` to processes that ask for it."""
    import multiprocessing
    from multiprocessing.connection import wait

    context = multiprocessing.get_context("spawn")
    work, busy, problem = deque(work), {}, None
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
                    work.extendleft([busy.pop(connection)] if connection in busy else [])
                    workers.pop(connection)
                    continue
                busy.pop(connection, None)
                if kind == "rows":
                    write(value)
                if work:
                    busy[connection] = work.popleft()
                    connection.send([index for index, _ in busy[connection]])
                else:
                    connection.send(None)
                    workers.pop(connection).join()
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
