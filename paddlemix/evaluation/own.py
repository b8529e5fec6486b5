"""Data sets that users bring: a YAML file that describes one, or a table in VLMEvalKit's form as it is."""

import ast
import base64
from pathlib import Path

from paddlemix.errors import ConfigError

from .rows import Question, questions, read_lines, read_table
from .scorers import NAMES
from .tasks import LETTER, SHORT, Task

_KEYS = "name data prompt image_root question image answer metric max_new_tokens max_num".split()
_HEADLINE = {"anls": "anls", "refcoco": "precision@1", "captions": "CIDEr"}
LETTERS = "ABCDEFGHIJ"


def task_of_file(path):
    """The task that a file describes: a ``.tsv`` of VLMEvalKit's, or YAML with ``data``, ``prompt`` and ``metric``.

    Raises:
        ConfigError: it cannot be read, or a key or metric is not known.
    """
    path = Path(path)
    if path.suffix == ".tsv":
        return Task(path.stem, vlmeval, "vlmeval", "accuracy", 128, files=(str(path),), source="VLMEvalKit")
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--task_file {path} cannot be read ({' '.join(str(error).split())}): check it") from None
    if not isinstance(values, dict) or "data" not in values:
        raise ConfigError(f"--task_file {path} must hold keys and values, with 'data' among them: {', '.join(_KEYS)}")
    if unknown := sorted(set(values) - set(_KEYS)):
        raise ConfigError(f"--task_file {path}: '{unknown[0]}' is not known: use {', '.join(_KEYS)}")
    metric = values.get("metric", "exact")
    if metric not in NAMES:
        raise ConfigError(f"--task_file {path}: metric '{metric}' is not known: use {', '.join(NAMES)}")
    options = {**values, "folder": path.parent}
    tokens, most = int(values.get("max_new_tokens", 100)), int(values.get("max_num", 6))
    name = str(values.get("name", path.stem)).replace("/", "_")
    headline = _HEADLINE.get(metric, "accuracy")
    return Task(name, own, metric, headline, tokens, files=(str(values["data"]),), max_num=most, options=options)


def own(task, root):
    """Rows of a jsonl or tsv file; the whole row is the reference, with ``answers`` from its answer."""
    options = task.options
    path = options["folder"] / task.files[0]
    rows = read_table(path) if path.suffix == ".tsv" else read_lines(path)
    pictures = options["folder"] / options.get("image_root", "")
    names = {name: options.get(name, name) for name in ("question", "image", "answer")}

    def make(row, number):
        images = row.get(names["image"], [])
        images = [images] if isinstance(images, str) else images
        text = options.get("prompt", "{question}").replace("{question}", str(row[names["question"]]))
        reference = dict(row)
        if names["answer"] in row:
            answer = row[names["answer"]]
            reference |= {"answers": answer if isinstance(answer, list) else [str(answer)], "answer": answer}
        reference.pop("id", None)
        return Question(row.get("id", number), text, tuple(str(pictures / image) for image in images), reference)

    return questions(rows, make)


def vlmeval(task, root):
    """VLMEvalKit's columns: index, question, image (base64, or the index of another row), answer, and options or none."""
    rows = read_table(Path(task.files[0]))
    images = {str(row.get("index")): row.get("image") for row in rows}

    def make(row, number):
        options = {letter: str(row[letter]) for letter in LETTERS if letter in row}
        answer = str(row["answer"])
        yes_no = not options and answer.strip().lower() in ("yes", "no")
        text = f"{row['hint']}\n{row['question']}" if "hint" in row else str(row["question"])
        if options:
            listed = "\n".join(f"{letter}. {option}" for letter, option in options.items())
            text, reference = f"{text}\n{listed}\n{LETTER}", {"kind": "letter", "options": options, "answer": answer}
        elif yes_no:
            text, reference = f"{text} Please answer yes or no.", {"kind": "yes/no", "answers": [answer]}
        else:
            answers = ast.literal_eval(answer) if answer.startswith("[") else [answer]
            text, reference = f"{text}\n{SHORT}", {"kind": "contains", "answers": [str(value) for value in answers]}
        if "category" in row:
            reference["category"] = row["category"]
        image = str(row["image"]) if "image" in row else None
        image = images.get(image, image)
        return Question(row["index"], text, (base64.b64decode(image),) if image else (), reference)

    return questions(rows, make)
