"""Free answers, captions and boxes: a picture and a question a line."""

import re
from pathlib import Path

from ..rows import Question, find, picture, questions, read_json, read_lines, read_text
from ..scorers.vqa import tables
from .texts import asked, texts


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
            reference = {"answers": texts(answers)}
        if splits[number]:
            reference["split"] = splits[number]
        name = row["image"]
        return Question(
            identity, asked(row["question"], task.prompt), (picture(root, name),), reference, record={"image": name}
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
        reference = {"answers": texts(row["answers"])} if task.scorer else {}
        return Question(row["questionId"], asked(row["question"], task.prompt), pages, reference)

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
        captions = truths[str(identity)] if str(identity) in truths else texts(row["caption"])
        return Question(identity, task.prompt, (picture(root, name, folder),), {"captions": captions}, record={"image": name})

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
        return Question(number, asked(question, task.prompt), (place,), reference, record={"image": name})

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
        text = row["text"] if task.prompt in row["text"] else asked(row["text"], task.prompt)
        key = row["category"], row["image"], _bare(row["text"])
        if key not in labels:
            raise ValueError(f"its label is not in coco_pope_{row['category']}.json")
        reference = {"category": row["category"], "label": labels[key]}
        place = picture(root, row["image"], task.options["folder"])
        return Question(row["question_id"], text.strip(), (place,), reference, record={"image": row["image"]})

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
        reference = {"group": place.name, "answers": texts(row["gt_answers"])}
        return Question(number, asked(row["question"], task.prompt), (str(path),), reference)

    return questions(rows, make)
