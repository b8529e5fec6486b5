"""LLaVA's own evaluation: its question files, its prompts, and answers in its JSON lines.

A set is one of four kinds, as the original has four loops: ``loader`` (short answers), ``vqa`` (long ones, pictures never
padded), ``science`` (choices, with or without a picture) and ``mmbench`` (choices, pictures inside the table).
"""

import base64
import csv
import io
import json
import math
import os
import uuid
from typing import NamedTuple

from paddlemix.errors import DataError

LETTER = "Answer with the option's letter from the given choices directly."
LETTER_CN = "请直接回答选项字母。"
_LETTERS = "ABCD"


class LlavaSet(NamedTuple):
    """A set of questions: its kind, its file and its folder of pictures below the data folder."""

    kind: str
    questions: str
    images: str = ""


SETS = {
    "llava-gqa": LlavaSet("loader", "gqa/llava_gqa_testdev_balanced.jsonl", "gqa/data/images"),
    "llava-vqav2": LlavaSet("loader", "vqav2/llava_vqav2_mscoco_test-dev2015.jsonl", "vqav2/test2015"),
    "llava-vizwiz": LlavaSet("loader", "vizwiz/llava_test.jsonl", "vizwiz/test"),
    "llava-pope": LlavaSet("loader", "pope/llava_pope_test.jsonl", "pope/val2014"),
    "llava-mme": LlavaSet("loader", "MME/llava_mme.jsonl", "MME/MME_Benchmark_release_version"),
    "llava-textvqa": LlavaSet("loader", "textvqa/llava_textvqa_val_v051_ocr.jsonl", "textvqa/train_images"),
    "llava-mmvet": LlavaSet("vqa", "mm-vet/llava-mm-vet.jsonl", "mm-vet/images"),
    "llava-llavabench": LlavaSet("vqa", "llava-bench-in-the-wild/questions.jsonl", "llava-bench-in-the-wild/images"),
    "llava-sqa": LlavaSet("science", "scienceqa/llava_test_CQM-A.json", "scienceqa/images/test"),
    "llava-mmbench": LlavaSet("mmbench", "mmbench/mmbench_dev_20230712.tsv"),
}


class Question(NamedTuple):
    """One thing to ask.

    Attributes:
        values: fields of the answer's line that are known before it: ``question_id``, ``prompt`` and what its kind has.
        text: what the user says, with the picture's mark.
        picture: what ``open_image`` takes, or None.
        pad: whether the picture is padded; None for what the model's configuration says.
        max_new_tokens: longest answer.
    """

    values: dict
    text: str
    picture: object
    pad: bool | None
    max_new_tokens: int


def chunk(rows, count, index):
    """Part ``index`` of ``rows`` cut into ``count`` parts of consecutive rows, as many to each as the first takes."""
    size = math.ceil(len(rows) / count)
    return rows[size * index : size * (index + 1)]


def read_jsonl(path):
    """The objects of a JSON-lines file.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with open(path, encoding="utf-8") as file:
            return [json.loads(line) for line in file if line.strip()]
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): see docs/llava.md for where it is from") from None
    except ValueError as error:
        raise DataError(f"{path} is no file of JSON lines ({error}): download it again") from None


def plain_questions(rows, images, kind="loader"):
    """Questions of ``{"question_id", "image", "text"}`` rows; ``images`` is the folder of the pictures."""
    short = kind == "loader"
    for row in rows:
        values = {"question_id": row["question_id"], "prompt": row["text"]}
        picture = os.path.join(images, row["image"])
        yield Question(values, f"<image>\n{row['text']}", picture, None if short else False, 128 if short else 1024)


def science_questions(rows, images, single_pred_prompt=True, lang="en"):
    """Questions of ScienceQA's records; the written prompt is the whole one, mark and instruction included."""
    for row in rows:
        text = row["conversations"][0]["value"].replace("<image>", "").strip()
        picture = os.path.join(images, row["image"]) if row.get("image") else None
        text = f"<image>\n{text}" if picture else text
        if single_pred_prompt:
            text += "\n" + (LETTER_CN if lang == "cn" else LETTER)
        yield Question({"question_id": row["id"], "prompt": text}, text, picture, False, 1024)


def _absent(value):
    return value is None or str(value).strip().lower() in ("", "nan", "none")


def mmbench_questions(rows, all_rounds=False, single_pred_prompt=True, lang="en"):
    """Questions of MMBench's table; with ``all_rounds`` once for each rotation of the choices."""
    for row in rows:
        options = []
        for letter in _LETTERS:
            if _absent(row.get(letter)):
                break
            options.append(row[letter])
        letters = list(_LETTERS[: len(options)])
        hint = "" if _absent(row.get("hint")) else f"{row['hint']}\n"
        picture = row["image"]
        if isinstance(picture, str) and not os.path.exists(picture):
            try:
                picture = base64.b64decode(picture)
            except ValueError:
                raise DataError(f"row {row.get('index')} of the table has no picture in base64: download it again") from None
        for number in range(len(options) if all_rounds else 1):
            prompt = hint + row["question"] + "".join(f"\n{a}. {b}" for a, b in zip(_LETTERS, options))
            text = f"<image>\n{prompt}"
            if single_pred_prompt:
                text += "\n" + (LETTER_CN if lang == "cn" else LETTER)
            values = {"question_id": row["index"], "round_id": number, "prompt": prompt}
            # A copy: the original's own lists are rotated behind the answer.
            values |= {"options": list(options), "option_char": list(letters)}
            yield Question(values, text, picture, None, 1024)
            options, letters = options[1:] + options[:1], letters[1:] + letters[:1]


def read_questions(name, data_root, num_chunks=1, chunk_idx=0, **options):
    """The questions of a set, or of one of several parts of it.

    Args:
        name: of :data:`SETS`.
        data_root: folder that the sets are in, such as ``playground/data/eval``.
        num_chunks, chunk_idx: see :func:`chunk`.
        options: of the kind's function.

    Raises:
        DataError: a file is missing or damaged.
    """
    return _questions(name, data_root, chunk(read_rows(name, data_root), num_chunks, chunk_idx), **options)


def _questions(name, data_root, rows, **options):
    kind, _, images = _set(name)
    if kind == "mmbench":
        return list(mmbench_questions(rows, **options))
    images = os.path.join(data_root, images)
    if kind == "science":
        return list(science_questions(rows, images, **options))
    return list(plain_questions(rows, images, kind))


def _set(name):
    if name not in SETS:
        raise DataError(f"task '{name}' is not known: use one of {', '.join(SETS)}")
    return SETS[name]


def read_rows(name, data_root):
    """The rows of a set's question file.

    Raises:
        DataError: the file is missing or damaged.
    """
    kind, questions, _ = _set(name)
    path = os.path.join(data_root, questions)
    if kind == "science":
        try:
            with open(path, encoding="utf-8") as file:
                return json.load(file)
        except (OSError, ValueError) as error:
            raise DataError(f"{path} cannot be read ({error}): see docs/llava.md for where it is from") from None
    if kind == "mmbench":
        csv.field_size_limit(1 << 30)  # pictures are in it
        try:
            with open(path, encoding="utf-8", newline="") as file:
                rows = list(csv.DictReader(file, delimiter="\t"))
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror}): see docs/llava.md for where it is from") from None
        for row in rows:
            row["index"] = int(row["index"]) if str(row["index"]).isdecimal() else row["index"]
        return rows
    return read_jsonl(path)


def answer(model, tokenizer, questions, template="vicuna_v1", model_id="model", **options):
    """Ask the questions one by one, and yield lines as the original writes them.

    Args:
        model: a :class:`~paddlemix.models.internvl_llava.LlavaForCausalLM`.
        tokenizer: its tokenizer.
        questions: :class:`Question` objects.
        template: name of the conversation template.
        model_id: what the lines call the model.
        options: of generation; greedy without any.
    """
    from paddlemix.processors.clip import process_images

    for question in questions:
        pixels = None
        if question.picture is not None:
            pad = model.config.image_aspect_ratio == "pad" if question.pad is None else question.pad
            picture = io.BytesIO(question.picture) if isinstance(question.picture, bytes) else question.picture
            pixels = process_images([picture], model.image_size, "pad" if pad else "square")
        settings = {"max_new_tokens": question.max_new_tokens, **options}
        text = model.chat(tokenizer, pixels, [question.text], settings, template)
        known = dict(question.values)
        more = {name: known.pop(name) for name in ("options", "option_char") if name in known}
        yield {**known, "text": text, **more, "answer_id": uuid.uuid4().hex, "model_id": model_id, "metadata": {}}


def write_answers(path, lines):
    """Write lines as they come, to a file that bears its name only when it is whole; returns how many there were."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    count = 0
    with open(path + ".tmp", "w", encoding="utf-8") as file:
        for line in lines:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            count += 1
    os.replace(path + ".tmp", path)
    return count


# ---------------------------------------------------------------------- as tasks of the evaluation command


def load_llava(task, data_root):
    """The questions of a task of :data:`SETS`, as the runner takes them; also a set's data folder may be ``data_root``."""
    from .llava_scores import truths
    from .rows import Question as Row

    found, rows, seen = read_rows(task.name, data_root), [], {}
    questions = _questions(task.name, data_root, found)
    for question, row, truth in zip(questions, found, truths(task.name, data_root, found)):
        values = dict(question.values)
        identity = values["question_id"]
        seen[identity] = seen.get(identity, 0) + 1
        # MME asks two questions about a picture under one number.
        unique = identity if seen[identity] == 1 else f"{identity}#{seen[identity]}"
        pictures = () if question.picture is None else (question.picture,)
        text = question.text.removeprefix("<image>\n")
        record = {"llava": values, "pad": question.pad}
        if task.name == "llava-mmbench":
            record["table"] = {name: value for name, value in row.items() if name != "image"}
        elif isinstance(row.get("image"), str):
            record["image"] = row["image"]
        rows.append(Row(unique, text, pictures, truth, record=record))
    return rows


def answer_lines(rows, model_id):
    """Rows of ``answers.jsonl`` as lines of LLaVA's."""
    for row in rows:
        known = dict(row["llava"])
        more = {name: known.pop(name) for name in ("options", "option_char") if name in known}
        yield {**known, "text": row["answer"], **more, "answer_id": uuid.uuid4().hex, "model_id": model_id, "metadata": {}}
