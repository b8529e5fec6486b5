"""A judge, a language model behind an OpenAI-compatible address, for benchmarks that are scored by one.

Each verdict is on the disk as it comes, in ``reviews.jsonl``, and is not asked for again.
"""

import os

from paddlemix.completions import complete
from paddlemix.errors import DataError
from paddlemix.files import drop_cut_line

from .answers import lines_of, read_answers
from .judge_prompts import JudgePrompt
from .scorers.open_answers import needs_extraction


def review(task, rows, directory, url, model, prompt=None, pause=1.0):
    """Let a judge review the answers of a run; of MathVista, let it find the answer in those that no rule reads.

    Args:
        prompt: a :class:`~.judge_prompts.JudgePrompt`; None for our own.

    Returns:
        (rows with ``review``, problems of those that it did not).
    """
    path = directory / "reviews.jsonl"
    prompt = prompt or JudgePrompt(task.judge)
    known, problems = {str(row["id"]): row for row in read_answers(path)}, []
    drop_cut_line(path)

    def is_known(row):  # a verdict belongs to an answer, a judge and a prompt
        before = known.get(str(row["id"]), {})
        return (before.get("answer"), before.get("judge"), before.get("prompt")) == (row["answer"], model, prompt.told)

    wanted = [row for row in rows if "error" not in row and (task.judge != "mathvista" or needs_extraction(row))]
    with open(path, "ab") as file:
        for row in wanted:
            if is_known(row):
                continue
            try:
                text = complete(url, model, prompt.messages(row), pause=pause)
            except DataError as error:
                problems.append({"id": row["id"], "error": str(error)})
                if len(problems) == 3:  # it is not there: the next run goes on where this one stopped
                    break
                continue
            verdict = {"id": row["id"], "answer": row["answer"], "judge": model, "prompt": prompt.told, "review": text}
            known[str(row["id"])] = verdict
            file.write(lines_of([verdict]).encode("utf-8"))
            file.flush()
            os.fsync(file.fileno())
    return [{**row, "review": known[str(row["id"])]["review"]} for row in wanted if is_known(row)], problems


class Server:
    """A server that answers in place of a local model: the same methods as :class:`~.local.LocalModel`.

    Args:
        url, model: of an OpenAI-compatible server; tiling is its own.
        settings: a :class:`~.runner.Settings`.
    """

    def __init__(self, url, model, settings):
        self.url, self.name, self.settings = url, model, settings

    def batch_size(self, task):
        """Questions that are sent at once."""
        return self.settings.batch_size or 8

    def encode(self, task, question):
        """(question, content of the message, prompt), or (question, error)."""
        import base64

        from paddlemix.errors import UserError

        from .media import encoded, frames

        try:
            if question.error:
                return question, question.error
            sources = frames(question) if question.clip else question.pictures
            urls = [f"data:image/png;base64,{base64.b64encode(encoded(source)).decode()}" for source in sources]
        except UserError as error:
            return question, str(error)
        from .tasks import COT

        prompt = question.prompt
        if task.marks in ("several", "tiles") and len(urls) > 1:
            prompt = "".join(f"Image-{i + 1}: <image>\n" for i in range(len(urls))) + prompt
        prompt = COT.format(prompt) if self.settings.cot else prompt
        marked = prompt if "<image>" in prompt else "<image>" * len(urls) + prompt
        texts = marked.split("<image>")
        content = [{"type": "text", "text": texts[0]}] if texts[0] else []
        for url, text in zip(urls, texts[1:]):
            content.append({"type": "image_url", "image_url": {"url": url}})
            content += [{"type": "text", "text": text}] if text else []
        return question, content, prompt

    def answers(self, task, items):
        """As :meth:`~.local.LocalModel.answers`."""
        from .local import in_groups

        return in_groups(self, task, items)

    def answer(self, task, items):
        """As :meth:`~.local.LocalModel.answer`."""
        from concurrent.futures import ThreadPoolExecutor

        from .scorers.open_answers import final_answer
        from .tasks import COT_TOKENS

        most = COT_TOKENS if self.settings.cot else task.max_new_tokens

        def one(item):
            if len(item) == 2:
                return {"question": item[0].prompt, "answer": "", "error": item[1]}
            try:
                text = complete(self.url, self.name, [{"role": "user", "content": item[1]}], most)
            except DataError as error:
                return {"question": item[2], "answer": "", "error": str(error)}
            if self.settings.cot:
                return {"question": item[2], "answer": final_answer(text).strip(), "output": text}
            return {"question": item[2], "answer": text}

        with ThreadPoolExecutor(len(items)) as pool:
            return list(pool.map(one, items))
