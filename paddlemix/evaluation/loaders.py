"""Data sets to questions: one function for each layout, ``(task, data_root) -> [Question]``."""

import ast
import base64
import re
from pathlib import Path

from .rows import Question, find, picture, questions, read_json, read_lines, read_parquet, read_table, read_text
from .scorers.vqa import tables

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def load(task, data_root):
    """The questions of a task.

    Raises:
        DataError: a file is missing or cannot be read at all.
    """
    loader = task.loader if callable(task.loader) else globals()[task.loader]
    return loader(task, data_root)


def _asked(question, instruction):
    return f"{question} {instruction}" if instruction else question


def _listed(options):
    return "\n".join(f"{letter}. {text}" for letter, text in options.items())


def _texts(values):
    return [values] if isinstance(values, str) else [str(value) for value in values]


def vqa(task, root):
    """Lines {image, question, question_id, answer}; true answers of annotators are in a file of their own."""
    truths = _truths(task, root)
    rows, splits = [], []
    for place, name in enumerate(task.files):
        part = read_lines(find(root, name))
        rows += part
        splits += [task.options["splits"][place] if "splits" in task.options else None] * len(part)

    def make(row, number):
        identity = row.get("question_id", number)
        reference = {}
        if task.scorer is not None:
            answers = truths[str(identity)] if str(identity) in truths else row["answer"]
            reference = {"answers": _texts(answers)}
        if splits[number]:
            reference["split"] = splits[number]
        name = row["image"]
        return Question(
            identity, _asked(row["question"], task.prompt), (picture(root, name),), reference, record={"image": name}
        )

    found = questions(rows, make)
    if len(task.files) > 1:  # each half numbers its own, so that ids may meet
        for question, split in zip(found, splits):
            question.id = f"{split}/{question.id}"
    return found


def _truths(task, root):
    name = task.options.get("truth")
    if name is None or task.scorer is None or not find(root, name).exists():
        return {}
    values = read_json(find(root, name))
    rows = values.get("annotations", values.get("data", [])) if isinstance(values, dict) else values
    found = {}
    for row in rows:
        answers = [answer["answer"] if isinstance(answer, dict) else answer for answer in row.get("answers", [])]
        found[str(row.get("question_id", row.get("questionId")))] = answers
    return found


def mpdocvqa(task, root):
    """{data: [{questionId, question, page_ids, answers}]}."""

    def make(row, number):
        pages = tuple(picture(root, f"{page}.jpg", "mpdocvqa/images") for page in row["page_ids"])
        reference = {"answers": _texts(row["answers"])} if task.scorer else {}
        return Question(row["questionId"], _asked(row["question"], task.prompt), pages, reference)

    return questions(read_json(find(root, task.files[0]))["data"], make)


def captions(task, root):
    """Karpathy's lists and COCO's format."""
    values = read_json(find(root, task.files[0]))
    folder = task.options.get("folder", task.files[0].split("/")[0])
    truths = {}
    known = [values] if isinstance(values, dict) else []
    if len(task.files) > 1 and find(root, task.files[1]).exists():
        known.append(read_json(find(root, task.files[1])))
    for table in known:
        for row in table.get("annotations", []):
            truths.setdefault(str(row["image_id"]), []).append(row["caption"])

    def make(row, number):
        name = row.get("file_name") or row["image"]
        identity = row["id"] if "id" in row else int(re.findall(r"\d+", Path(name).stem)[-1])
        texts = truths[str(identity)] if str(identity) in truths else _texts(row["caption"])
        return Question(identity, task.prompt, (picture(root, name, folder),), {"captions": texts}, record={"image": name})

    return questions(values["images"] if isinstance(values, dict) else values, make)


def refcoco(task, root):
    """Lines {image, sent, bbox, width, height}."""

    def make(row, number):
        reference = {name: row[name] for name in ("bbox", "width", "height")}
        return Question(
            number, task.prompt.format(row["sent"]), (picture(root, row["image"]),), reference, record={"image": row["image"]}
        )

    return questions(read_lines(find(root, task.files[0])), make)


def mme(task, root):
    """Text files of (picture, question, answer) by tabs, one for each category."""
    rows = []
    for group in tables()["mme"].values():
        for category in group:
            places = ("mme/Your_Results", "mme", "mme/MME_Benchmark_release_version/eval_tool/Your_Results")
            release = "mme/MME_Benchmark_release_version"
            path = find(root, *(f"{place}/{category}.txt" for place in (*places, release, f"{release}/{category}")))
            if path.exists():
                rows += [(category, line) for line in read_text(path).splitlines() if line.strip()]
    if not rows:
        read_text(find(root, "mme/Your_Results/existence.txt"))  # says that it is missing

    def make(row, number):
        category, line = row
        name, question, answer = line.split("\t")[:3]
        place = picture(root, name, f"mme/MME_Benchmark_release_version/{category}")
        reference = {"category": category, "image": name, "answer": answer.strip()}
        return Question(number, _asked(question, task.prompt), (place,), reference, record={"image": name})

    return questions(rows, make)


def pope(task, root):
    """Lines {question_id, image, text, category}; labels in files of each category, joined by picture and question."""

    def _bare(text):
        return text.replace(task.prompt, "").strip()

    labels = {}
    for category in ("adversarial", "popular", "random"):
        names = [f"{place}/coco_pope_{category}.json" for place in ("coco", "pope/coco", "pope")]
        for row in read_lines(find(root, *names)):
            if isinstance(row, dict):
                labels[category, row["image"], _bare(row["text"])] = row["label"]

    def make(row, number):
        text = row["text"] if task.prompt in row["text"] else _asked(row["text"], task.prompt)
        key = row["category"], row["image"], _bare(row["text"])
        if key not in labels:
            raise ValueError(f"its label is not in coco_pope_{row['category']}.json")
        reference = {"category": row["category"], "label": labels[key]}
        place = picture(root, row["image"], task.options["folder"])
        return Question(row["question_id"], text.strip(), (place,), reference, record={"image": row["image"]})

    return questions(read_lines(find(root, task.files[0])), make)


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
        prompt = f"{text}\n{_listed(options)}\n{task.prompt}"
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
        prompt = f"{text}\n{_listed(options)}\n{task.prompt}"
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
        return Question(int(identity), f"{row['Question']}\n{_listed(options)}\n{task.prompt}", (place,), reference)

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
        parts = [row["question"].strip(), *([_listed(options)] if options else []), instruction]
        return Question(row["id"], "\n".join(parts), _stored(row), reference)

    return questions(rows, make)


LETTER_OR_SHORT = (
    "Answer with the option's letter from the given choices directly.",
    "Answer the question using a single word or phrase.",
)


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
        text = f"{row['question']}\n{_listed(options)}\n{LETTER_OR_SHORT[0]}"
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


def mvbench(task, root):
    """Twenty files of clips, or folders of frames."""
    rows = []
    for name, values in tables()["mvbench"].items():
        path = find(root, f"MVBench/json/{values['file']}")
        if path.exists():
            rows += [(name, values, row) for row in read_json(path)]
    if not rows:
        read_text(find(root, "MVBench/json/action_sequence.json"))
    lead = (
        "Carefully watch the video and pay attention to the cause and sequence of events, the detail and movement of objects, "
        "and the action and pose of persons. Based on your observations, select the best option that accurately addresses the "
        "question.\n"
    )

    def make(item, number):
        name, values, row = item
        options = "".join(f"({chr(65 + i)}) {text}\n" for i, text in enumerate(row["candidates"]))
        marks = "".join(f"Frame{i}: <image>\n" for i in range(1, 17))
        prompt = f"{marks}{lead}\nQuestion: {row['question']}\nOptions:\n{options}Only give the best option."
        bound = (row["start"], row["end"]) if values["has_bounds"] else None
        reference = {"task_type": name, "candidates": row["candidates"], "answer": row["answer"]}
        place = picture(root, row["video"], values["folder"].rstrip("/"))
        clip = {"bound": bound, "folder": values["kind"] == "frame"}
        return Question(number, prompt, (place,), reference, clip=clip, record={"video": row["video"]})

    return questions(rows, make)


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
        return Question(identity, _asked(text, task.prompt), pictures, reference)

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
        return Question(identity, _asked(row["text"], task.prompt), (place,), reference)

    return questions(read_lines(find(root, task.files[0])), make)


def mmhal(task, root):
    """Lines with the picture in base64; their order matters."""

    def make(row, number):
        source = base64.b64decode(row["image"]) if "image" in row else picture(root, row["image_path"])
        reference = {name: row.get(name) for name in ("question", "question_type", "gt_answer", "image_content")}
        return Question(row.get("question_id", number), row["question"], (source,), reference)

    return questions(read_lines(find(root, task.files[0])), make)


def tiny_lvlm(task, root):
    """A folder for each group, with dataset.json."""
    folder = find(root, task.files[0])
    rows = [(path.parent, row) for path in sorted(folder.glob("*/dataset.json")) for row in read_json(path)]
    if not rows:
        read_text(folder / "Visual_Perception" / "dataset.json")

    def make(item, number):
        place, row = item
        path = place / row["image_path"]
        path = path if path.exists() else find(root, row["image_path"])
        reference = {"group": place.name, "answers": _texts(row["gt_answers"])}
        return Question(number, _asked(row["question"], task.prompt), (str(path),), reference)

    return questions(rows, make)


def mmiu(task, root):
    """Lines {task, input: {input_image_path, question, context}, options, output: {output_text}}."""

    def make(row, number):
        given = row["input"]
        options = {}
        for letter, text in zip(LETTERS, row["options"].split("\n")):
            options[letter] = text.strip().removeprefix(f"{letter}:").strip()
        reference = {"task": row["task"], "options": options, "answer": row["output"]["output_text"]}
        pictures = tuple(picture(root, name, "mmiu") for name in given["input_image_path"])
        return Question(number, f"{given['question']}\n{given['context']}\n{task.prompt}", pictures, reference)

    return questions(read_lines(find(root, task.files[0])), make)


_MIRB = {
    **dict.fromkeys(("analogy", "attribute", "plot_code", "sightseeing", "visual_chain"), "Answer with a single word."),
    **dict.fromkeys(("codeu", "food", "image_jigsaw"), "Answer with the option symbol."),
    "arxiv": "Answer with the paper title.",
    "count": "Answer with a single number.",
    "3d_scene": "The following images are different views of the same 3D scene. Answer with a single number.",
}


def mirb(task, root):
    """A file for each of eleven tasks."""
    folder = find(root, "MIRB")
    rows = [(path.stem, row) for path in sorted(folder.glob("*.json")) if path.stem in _MIRB for row in read_json(path)]
    if not rows:
        read_text(folder / "analogy.json")

    def make(item, number):
        name, row = item
        pictures = tuple(picture(root, image, "MIRB") for image in row["images"])
        return Question(number, f"{row['questions']}\n{_MIRB[name]}", pictures, {"task": name, "answer": str(row["answers"])})

    return questions(rows, make)


def mantis(task, root):
    """Parquet files with lists of pictures."""
    folder = find(root, "Mantis-Eval", "mantis_eval").name
    rows = [row for _, row in read_parquet(root, folder, "test-*.parquet")]

    def make(row, number):
        pictures = tuple(image["bytes"] for image in row["images"])
        text = row["question"].replace(" ".join(["<image>"] * len(pictures)), "").strip()
        for i in range(len(pictures)):
            text = text.replace("<image>", f"Image-{i + 1}", 1)
        options = [str(option).strip() for option in row["options"] or []]
        multiple = row["question_type"] == "multi-choice"
        parts = [text, *(options if multiple else []), LETTER_OR_SHORT[not multiple]]
        reference = {"question_type": row["question_type"], "options": options, "answer": row["answer"]}
        return Question(row.get("id", number), "\n".join(parts), pictures, reference)

    return questions(rows, make)


def rsvqa(task, root):
    """A list of {id, image, question, gt_answer, type}."""

    def make(row, number):
        reference = {"answer": str(row["gt_answer"]), "type": row["type"]}
        place = picture(root, row["image"], task.options["folder"])
        return Question(row.get("id", number), f"{row['question']}\n{task.prompt}", (place,), reference)

    return questions(read_json(find(root, task.files[0])), make)


def dior(task, root):
    """A list of {image, prompt, bbox, size}."""

    def make(row, number):
        width, height = row["size"]
        reference = {"bbox": row["bbox"], "width": width, "height": height}
        place = picture(root, row["image"], task.options["folder"])
        return Question(row.get("id", number), task.prompt.format(row["prompt"]), (place,), reference)

    return questions(read_json(find(root, task.files[0])), make)


def mme_realworld(task, root):
    """One list of all subtasks; the words of the two languages are swapped in the original, whose figures were made so."""
    path = find(root, task.files[0])
    rows = [row for row in read_json(path) if row.get("Subtask") == task.options["subtask"]]
    instruction = (
        "Select the best answer to the above multiple-choice question based on the image. "
        "            Respond with only the letter (A, B, C, D, or E) of the correct option. \nThe best answer is:"
    )

    def make(row, number):
        choices = row["Answer choices"]
        reference = {
            "options": choices,
            "answer": row["Ground truth"],
            "category": row["Category"],
            "task": row["Task"],
        }
        place = picture(root, row["Image"], task.options["folder"])
        if not Path(place).exists():
            place = str(find(root, f"{path.parent.relative_to(root)}/{row['Image']}"))
        text = f"{row['Text']}选项如下所示:\n" + "\n".join(choices) + f"\n{instruction}"
        return Question(row["Question_id"], text, (place,), reference)

    return questions(rows, make)


def drivelm(task, root):
    """Lines {id, image, question_old, conversations}."""

    def make(row, number):
        turns = row["conversations"]
        truth = turns[1]["value"].strip() if len(turns) > 1 else None
        place = picture(root, row["image"], task.options["folder"])
        record = {"question_old": row.get("question_old", turns[0]["value"]), "gt_answers": truth}
        return Question(row["id"], turns[0]["value"].strip(), (place,), {}, record=record)

    return questions(read_lines(find(root, task.files[0])), make)
