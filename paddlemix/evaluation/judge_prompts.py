"""What a judge is asked.

The benchmarks' own prompts are other people's texts and not here: they are read from the data set's folder. Where a file is
missing, a short prompt of ours takes its place, and the score says so.
"""

from paddlemix.errors import DataError

from .rows import find, read_json, read_text

_OURS = {
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
    "mathvista": (
        "Question: {question}\n\nResponse: {answer}\n\nWhich answer does the response give? Reply with it alone: the letter of "
        "an option, a number, or a list, as the question asks for."
    ),
}
# Where each benchmark's own prompt is looked for, and where it is published.
_THEIRS = {
    "llava_bench": ("llava-bench-in-the-wild/rule.json", "https://github.com/haotian-liu/LLaVA (llava/eval/table/rule.json)"),
    "mmhal": ("mm-halbench/template.txt", "https://huggingface.co/datasets/Shengcao1006/MMHal-Bench (eval_gpt4.py)"),
    "mmvet": ("mm-vet/prompt.txt", "https://github.com/yuweihao/MM-Vet (mm-vet_evaluator.ipynb)"),
    "mathvista": ("MathVista/prompt.txt", "https://github.com/lupantech/MathVista (evaluation/prompts/ext_ans.py)"),
}


class JudgePrompt:
    """The messages for a judge about one answer.

    Args:
        kind: ``llava_bench``, ``mmhal``, ``mmvet`` or ``mathvista``.
        data_root: folder of the data sets; None: only our own prompt.

    Attributes:
        told: which prompt it is, for the score.

    Raises:
        DataError: the benchmark's file cannot be used.
    """

    def __init__(self, kind, data_root=None):
        self.kind, self._own = kind, None
        name, published = _THEIRS[kind]
        path = None if data_root is None else find(data_root, name)
        if path is not None and path.exists():
            self._own = read_json(path) if path.suffix == ".json" else read_text(path)
            self.told = f"the benchmark's own, of {name}"
            if kind == "mmhal" and self._own.count("{}") != 4:
                raise DataError(f"{path} must have four places {{}}: picture, question, right answer, answer: get it again")
        else:
            self.told = f"the package's own short one; the benchmark's is published at {published}: save it as {name}"

    def messages(self, row):
        """Messages of a chat about the answer of ``row``, a line of ``answers.jsonl``."""
        reference = row["reference"]
        filled = {name: reference.get(name) or "" for name in ("context", "question", "image_content", "gt_answer")}
        filled |= {"theirs": reference.get("answer") or "", "truth": reference.get("answer") or "", "answer": row["answer"]}
        filled["question"] = filled["question"] or row.get("question", "")
        if self._own is None:
            return [{"role": "user", "content": _OURS[self.kind].format(**filled)}]
        return getattr(self, f"_{self.kind}")(filled, reference)

    def _llava_bench(self, filled, reference):
        category = f"llava_bench_{reference.get('category')}"
        rule = self._own.get(category) or self._own.get(str(reference.get("category"))) or self._own.get("default")
        if not isinstance(rule, dict) or not {"role", "prompt"} <= set(rule):
            raise DataError(f"the rules of LLaVA-Bench have none for '{category}': get rule.json again")
        role = rule["role"]
        content = (
            f"[Context]\n{filled['context']}\n\n[Question]\n{filled['question']}\n\n[{role} 1]\n{filled['theirs']}\n\n"
            f"[End of {role} 1]\n\n[{role} 2]\n{filled['answer']}\n\n[End of {role} 2]\n\n[System]\n{rule['prompt']}\n\n"
        )
        system = "You are a helpful and precise assistant for checking the quality of the answer."
        return [{"role": "system", "content": system}, {"role": "user", "content": content}]

    def _mmhal(self, filled, reference):
        shown = reference.get("image_content")
        shown = ", ".join(map(str, shown)) if isinstance(shown, list) else str(shown or "")
        parts = self._own.split("{}")
        values = [shown, filled["question"], filled["gt_answer"], filled["answer"], ""]
        return [{"role": "user", "content": "".join(part + value for part, value in zip(parts, values))}]

    def _mmvet(self, filled, reference):
        truth = filled["truth"].replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
        line = " | ".join([filled["question"], truth, filled["answer"], ""])
        return [{"role": "user", "content": f"{self._own}\n{line}"}]

    def _mathvista(self, filled, reference):
        asked = "{question}\n\nModel response: '{answer}'\nExtracted Answer: ".format_map(filled)
        return [{"role": "user", "content": f"{self._own.strip()}\n\n{asked}"}]
