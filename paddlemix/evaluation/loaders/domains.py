"""Satellite pictures, driving, and scenes in high resolution."""

from pathlib import Path

from ..rows import Question, find, picture, questions, read_json, read_lines


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
