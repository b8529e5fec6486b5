"""Questions whose answers a judge reads."""

import base64
import re

from ..rows import Question, find, picture, questions, read_json, read_lines
from .texts import asked


def mmvet(task, root):
    """Lines {image, text, question_id}; the file for the judge has ids v1_0, v1_1, ..."""
    path = find(root, task.options["truth"])
    truths = read_json(path) if path.exists() else {}

    def make(row, number):
        identity = f"v1_{row['question_id']}"
        reference = {"question": row["text"], "answer": truths.get(identity, {}).get("answer")}
        return Question(identity, f"{row['text']} ", (picture(root, row["image"], task.options["folder"]),), reference)

    return questions(read_lines(find(root, task.files[0])), make)


def mmvet_v2(task, root):
    """Questions in which texts and pictures alternate, parted by ``<IMG>``."""

    def make(item, number):
        identity, row = item
        parts = row["question"].split("<IMG>")
        names = [part for part in parts if re.search(r"\.(jpe?g|png|webp|bmp|gif)$", part.strip(), re.IGNORECASE)]
        marks = len(names) > 1
        text = "".join(("<image>" if marks else "") if part in names else part for part in parts)
        pictures = tuple(picture(root, name.strip(), task.options["folder"]) for name in names)
        reference = {"question": row["question"], "answer": row.get("answer")}
        return Question(identity, asked(text, task.prompt), pictures, reference)

    return questions(list(read_json(find(root, task.files[0])).items()), make)


def llava_bench(task, root):
    """questions.jsonl, context.jsonl and the answers of GPT-4."""
    contexts = {row["image"]: row["caption"] for row in read_lines(find(root, task.files[1])) if isinstance(row, dict)}
    path = find(root, "llava-bench-in-the-wild/answers_gpt4.jsonl")
    theirs = {str(row["question_id"]): row["text"] for row in read_lines(path)} if path.exists() else {}

    def make(row, number):
        identity = row["question_id"]
        reference = {
            "category": row["category"],
            "question": row["text"],
            "context": contexts.get(row["image"]),
            "answer": theirs.get(str(identity)),
        }
        place = picture(root, row["image"], task.options["folder"])
        return Question(identity, asked(row["text"], task.prompt), (place,), reference)

    return questions(read_lines(find(root, task.files[0])), make)


def mmhal(task, root):
    """Lines with the picture in base64; their order matters."""

    def make(row, number):
        source = base64.b64decode(row["image"]) if "image" in row else picture(root, row["image_path"])
        reference = {name: row.get(name) for name in ("question", "question_type", "gt_answer", "image_content")}
        return Question(row.get("question_id", number), row["question"], (source,), reference)

    return questions(read_lines(find(root, task.files[0])), make)
