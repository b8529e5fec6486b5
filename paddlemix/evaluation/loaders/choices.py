"""Questions with options, and collections of science and mathematics."""

import ast
import base64
import re

from ..rows import Question, find, picture, questions, read_json, read_lines, read_parquet, read_table
from .texts import LETTER_OR_SHORT, LETTERS, listed


def mmbench(task, root):
    """A table of questions with options and pictures in base64; a short text in place of one is the index of another row."""
    rows = read_table(find(root, task.files[0]))
    images = {str(row.get("index")): row.get("image") for row in rows}
    columns = list(dict.fromkeys(name for row in rows for name in row))

    def make(row, number):
        options = {letter: row[letter] for letter in "ABCDE" if letter in row}
        text = f"{row['hint']}\n{row['question']}" if "hint" in row else str(row["question"])
        image = str(row["image"])
        image = images.get(image, image)
        reference = {"options": {k: str(v) for k, v in options.items()}, "answer": row.get("answer")}
        if "category" in row:
            reference["category"] = row["category"]
        prompt = f"{text}\n{listed(options)}\n{task.prompt}"
        table = {name: row.get(name) for name in columns if name != "image"}
        return Question(row["index"], prompt, (base64.b64decode(image),), reference, record={"table": table})

    return questions(rows, make)


def numbered_choices(task, root):
    """Lines {image, question, hint, choices, answer (a number)}."""
    folder = task.files[0].split("/")[0]

    def make(row, number):
        options = {letter: str(text) for letter, text in zip(LETTERS, row["choices"])}
        text = f"{row['hint']}\n{row['question']}" if row.get("hint") else row["question"]
        reference = {"options": options, "answer": LETTERS[int(row["answer"])]}
        prompt = f"{text}\n{listed(options)}\n{task.prompt}"
        return Question(row.get("id", number), prompt, (picture(root, row["image"], folder),), reference)

    return questions(read_lines(find(root, task.files[0])), make)


def mmvp(task, root):
    """Questions.csv and pictures 1.jpg, 2.jpg, ..."""

    def make(row, number):
        identity = row["Index"] if "Index" in row else row["lndex"]
        first, _, second = row["Options"].partition("(b)")
        options = {"A": first.replace("(a)", "").strip(), "B": second.strip()}
        answer = row["Correct Answer"].strip().strip("()").upper()
        reference = {"options": options, "answer": answer, "pair": (int(identity) - 1) // 2}
        place = picture(root, f"{identity}.jpg", "MMVP/MMVP Images")
        return Question(int(identity), f"{row['Question']}\n{listed(options)}\n{task.prompt}", (place,), reference)

    return questions(read_table(find(root, task.files[0]), ","), make)


def seed(task, root):
    """Lines {image, text, question_id, answer}; the types of questions in SEED-Bench.json."""
    kinds = {str(row["question_id"]): row["question_type_id"] for row in read_json(find(root, task.files[1]))["questions"]}

    def make(row, number):
        reference = {"question_type_id": kinds[str(row["question_id"])], "answer": row["answer"]}
        return Question(row["question_id"], row["text"], (picture(root, row["image"], "SEED"),), reference)

    return questions(read_lines(find(root, task.files[0])), make)


def _parsed(text):
    """A list that may be written as Python's text of one."""
    return list(ast.literal_eval(text)) if isinstance(text, str) else list(text or [])


def _stored(values, count=7):
    """The pictures ``image_1`` to ``image_7`` of a row."""
    return tuple(values[f"image_{i}"]["bytes"] for i in range(1, count + 1) if values.get(f"image_{i}"))


def mmmu(task, root):
    """Parquet files of each subject."""
    rows = [row for _, row in read_parquet(root, "MMMU", f"{task.options['split']}-*.parquet")]

    def make(row, number):
        options = {letter: str(text).strip() for letter, text in zip(LETTERS, _parsed(row["options"]))}
        answer = row.get("answer")
        if row["question_type"] == "open" and isinstance(answer, str) and answer.startswith("["):
            answer = [str(value) for value in ast.literal_eval(answer)]
        reference = {"question_type": row["question_type"], "options": options, "answer": answer} if task.scorer else {}
        instruction = LETTER_OR_SHORT[row["question_type"] == "open"]
        parts = [row["question"].strip(), *([listed(options)] if options else []), instruction]
        return Question(row["id"], "\n".join(parts), _stored(row), reference)

    return questions(rows, make)


def mmmu_pro(task, root):
    """Parquet files of the standard (10 options) and the vision setting."""
    rows = []
    for setting in task.options["settings"]:
        folder = "standard (10 options)" if setting == "standard" else setting
        rows += [(setting, row) for _, row in read_parquet(root, f"MMMU_Pro/{folder}", "*.parquet")]

    def make(item, number):
        setting, row = item
        options = {letter: str(text) for letter, text in zip(LETTERS, _parsed(row["options"]))}
        reference = {"options": options, "answer": row["answer"], "setting": setting}
        identity = row["id"] if len(task.options["settings"]) == 1 else f"{setting}/{row['id']}"
        if setting == "vision":
            return Question(identity, LETTER_OR_SHORT[0], (row["image"]["bytes"],), reference)
        text = f"{row['question']}\n{listed(options)}\n{LETTER_OR_SHORT[0]}"
        stored = _stored(row)
        named = [int(n) for n in re.findall(r"<image (\d)>", text)]
        text = re.sub(r"<image \d>", "<image>", text)
        pictures = tuple(stored[n - 1] for n in named) if named else stored
        return Question(identity, text, pictures, reference)

    return questions(rows, make)


def mathvista(task, root):
    """Parquet files with ``query`` and ``decoded_image``."""
    rows = [row for _, row in read_parquet(root, "MathVista", f"{task.options['split']}-*.parquet")]

    def make(row, number):
        names = ("question_type", "answer_type", "choices", "answer", "precision")
        reference = {name: row.get(name) for name in names} if task.scorer else {}
        return Question(row["pid"], row["query"], (row["decoded_image"]["bytes"],), reference)

    return questions(rows, make)
