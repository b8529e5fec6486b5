"""Questions about several pictures, and about clips."""

from ..rows import Question, find, picture, questions, read_json, read_lines, read_parquet, read_text
from ..scorers.vqa import tables
from .texts import LETTER_OR_SHORT, LETTERS


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
