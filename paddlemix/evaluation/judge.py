"""A judge, a language model behind an OpenAI-compatible address, for benchmarks that are scored by one.

Each verdict is on the disk as it comes, in ``reviews.jsonl``, and is not asked for again. The benchmarks' own prompts are other
people's texts and not here: short ones of ours are used, and the score says so.
"""

import json
import os

from paddlemix.completions import complete
from paddlemix.errors import DataError

from .answers import read_answers

PROMPTS = {
    "llava_bench": (
        "[Context]\n{context}\n\n[Question]\n{question}\n\n[Assistant 1]\n{theirs}\n\n[Assistant 2]\n{answer}\n\nRate how "
        "helpful, relevant, accurate and detailed each assistant's answer is, from 1 to 10. The first line must hold the two "
        "scores alone, for Assistant 1 and 2, with one blank between them; then explain."
    ),
    "mmhal": (
        "Question about a picture: {question}\nThe picture shows: {image_content}\nA right answer: {gt_answer}\nThe answer to "
        "judge: {answer}\n\nRate from 0 to 6 how informative it is and whether it invents anything; below 3 "
        "means that it does. End with a line such as 'Rating: 4'."
    ),
    "mmvet": (
        "Question: {question}\nGround truth: {truth}\nPrediction: {answer}\n\nHow right is the prediction, from 0.0 to 1.0? In "
        "the ground truth, <AND> means that all parts are needed and <OR> that one is enough. Reply with the number alone."
    ),
}


def review(task, rows, directory, url, model, pause=1.0):
    """Let a judge review the answers of a run.

    Returns:
        (rows with ``review``, problems of those that it did not).
    """
    path = directory / "reviews.jsonl"
    known = {str(row["id"]): row for row in read_answers(path) if "error" not in row}
    prompt, problems = PROMPTS[task.judge], []
    with open(path, "a", encoding="utf-8") as file:
        for row in rows:
            reference = row["reference"]
            before = known.get(str(row["id"]))
            # A verdict belongs to an answer and a judge.
            if "error" in row or (before and before["answer"] == row["answer"] and before["judge"] == model):
                continue
            names = ("context", "question", "image_content", "gt_answer")
            filled = {name: reference.get(name) or "" for name in names}
            filled |= {"theirs": reference.get("answer") or "", "truth": reference.get("answer") or "", "answer": row["answer"]}
            try:
                text = complete(url, model, [{"role": "user", "content": prompt.format(**filled)}], pause=pause)
            except DataError as error:
                problems.append({"id": row["id"], "error": str(error)})
                if len(problems) == 3:  # it is not there: the next run goes on where this one stopped
                    break
                continue
            verdict = {"id": row["id"], "answer": row["answer"], "judge": model, "review": text}
            known[str(row["id"])] = verdict
            file.write(json.dumps(verdict, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
    reviewed = [{**row, "review": known[str(row["id"])]["review"]} for row in rows if str(row["id"]) in known]
    return reviewed, problems


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
