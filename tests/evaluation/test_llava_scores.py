"""The ten results of LLaVA's evaluation, on small data in each set's own layout, through the runner; answers are known."""

import base64
import csv
import io
import json

import pytest
from PIL import Image

from paddlemix.evaluation.llava import SETS
from paddlemix.evaluation.llava_scores import science
from paddlemix.evaluation.local import in_groups
from paddlemix.evaluation.runner import Settings, run_task
from paddlemix.evaluation.tasks import TASKS

SHORT = "\nAnswer the question using a single word or phrase."


class Said:
    """In place of a model: it says what is listed for each question's text."""

    def __init__(self, answers):
        self.said = answers

    def batch_size(self, task):
        return 2

    def encode(self, task, question):
        if question.pictures and not isinstance(question.pictures[0], bytes):
            Image.open(question.pictures[0]).load()  # the loader found it
        return question

    def answers(self, task, items):
        return in_groups(self, task, items)

    def answer(self, task, items):
        return [{"question": q.prompt, "answer": self.said[q.prompt.split("\n")[0]]} for q in items]


def png():
    out = io.BytesIO()
    Image.new("RGB", (8, 6), (200, 30, 30)).save(out, "PNG")
    return out.getvalue()


def write(root, name, content):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, str):
        path.write_text(content, encoding="utf-8")
    else:
        lines = name.endswith(".jsonl") or "coco_pope" in name
        path.write_text("\n".join(map(json.dumps, content)) if lines else json.dumps(content), encoding="utf-8")


def run(root, name, answers):
    settings = Settings("none", str(root))
    result = run_task(TASKS[name], settings, root / "results", model=Said(answers), progress=False)
    assert result["failed"] == 0
    lines = (root / "results" / name / "llava.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["text"] for line in lines] == list(answers.values())
    return result, root / "results" / name


def questions(root, name, rows):
    """Write a set's question file and a picture for each row."""
    _, path, images = SETS[name]
    write(root, path, rows)
    for row in rows:
        write(root, f"{images}/{row['image']}", png())


def test_gqa_loses_final_dots_and_case(tmp_path):
    rows = [{"question_id": str(i), "image": f"{i}.jpg", "text": f"Q{i}?{SHORT}"} for i in range(4)]
    questions(tmp_path, "llava-gqa", rows)
    write(tmp_path, "gqa/data/testdev_balanced_questions.json", {str(i): {"answer": "red"} for i in range(4)})
    result, _ = run(tmp_path, "llava-gqa", {"Q0?": "Red.", "Q1?": "red", "Q2?": "dark red", "Q3?": "blue"})
    assert result["score"]["accuracy"] == 0.5 and result["metric"] == "accuracy"


def test_answers_are_there_without_the_truth(tmp_path):
    questions(tmp_path, "llava-gqa", [{"question_id": "0", "image": "0.jpg", "text": "Q0?"}])
    result, _ = run(tmp_path, "llava-gqa", {"Q0?": "red"})
    assert result["score"] == {"not_scored": 1.0}


def test_pope_is_joined_by_picture_and_question(tmp_path):
    rows = [
        {"question_id": i, "image": f"{i % 2}.jpg", "text": f"Is there {i}?{SHORT}", "category": category}
        for i, category in enumerate(["random", "random", "popular", "adversarial"])
    ]
    questions(tmp_path, "llava-pope", rows)
    labels = {"random": [(0, "yes"), (1, "no")], "popular": [(2, "yes")], "adversarial": [(3, "yes")]}
    for category, known in labels.items():
        lines = [{"image": f"{i % 2}.jpg", "text": f"Is there {i}?", "label": label} for i, label in reversed(known)]
        write(tmp_path, f"pope/coco/coco_pope_{category}.json", lines)
    answers = {"Is there 0?": "Yes", "Is there 1?": "Yes, it is", "Is there 2?": "Yes", "Is there 3?": "No."}
    result, _ = run(tmp_path, "llava-pope", answers)
    assert result["score"]["f1"] == pytest.approx((2 / 3 + 1 + 0) / 3)  # random: precision 1/2, recall 1


def test_mme_counts_pictures_with_both_questions_right(tmp_path):
    rows = []
    for picture in ("a", "b"):
        for question in ("Is it red?", "Is it blue?"):
            text = f"{picture}: {question} Please answer yes or no.{SHORT}"
            rows.append({"question_id": f"color/{picture}.png", "image": f"color/{picture}.png", "text": text})
    questions(tmp_path, "llava-mme", rows)
    release = "MME/MME_Benchmark_release_version/color"
    for picture in ("a", "b"):
        said = zip(("red", "blue"), ("Yes", "No"))
        text = "".join(f"{picture}: Is it {color}? Please answer yes or no.\t{answer}\n" for color, answer in said)
        write(tmp_path, f"{release}/{picture}.txt", text)
    said = {row["text"].split("\n")[0]: answer for row, answer in zip(rows, ("Yes", "No", "Yes", "Yes"))}
    result, _ = run(tmp_path, "llava-mme", said)
    assert result["score"]["total"] == 100 * 3 / 4 + 100 / 2


def test_textvqa_is_joined_by_picture_and_question(tmp_path):
    text = "what does it say?\nReference OCR token: OPEN"
    questions(tmp_path, "llava-textvqa", [{"question_id": "ab", "image": "ab.jpg", "text": text + SHORT}])
    truth = {"question_id": 7, "image_id": "ab", "question": "What does it say?", "answers": ["open"] * 4 + ["stop"] * 6}
    write(tmp_path, "textvqa/TextVQA_0.5.1_val.json", {"data": [truth]})
    result, _ = run(tmp_path, "llava-textvqa", {"what does it say?": "Open"})
    assert result["score"]["accuracy"] == pytest.approx((4 * 1 + 6 * 1) / 10)


def test_science_reads_letters_as_the_original(tmp_path):
    rows = [
        {
            "id": "7",
            "image": "7.png",
            "conversations": [{"from": "human", "value": "<image>\nWhich is red?\nA. circle\nB. star"}],
        },
        {"id": "9", "conversations": [{"from": "human", "value": "Which is larger?\nA. two\nB. three"}]},
    ]
    write(tmp_path, SETS["llava-sqa"].questions, rows)
    write(tmp_path, "scienceqa/images/test/7.png", png())
    write(
        tmp_path,
        "scienceqa/problems.json",
        {"7": {"choices": ["circle", "star"], "answer": 1}, "9": {"choices": ["two", "three"], "answer": 1}},
    )
    result, _ = run(tmp_path, "llava-sqa", {"Which is red?": "B. star", "Which is larger?": "A"})
    assert result["score"] == {"accuracy": 0.5, "image_accuracy": 1.0}
    reference = {"id": 0, "options": ["A", "B"], "answer": "B", "picture": False}
    said = {"B": 1.0, "B. star": 1.0, "So. The answer is B.": 1.0, "The answer is B": 0.0, "star": 0.0, "": 0.0}
    assert science([reference] * len(said), list(said))[1] == list(said.values())


def test_mmbench_is_scored_and_has_its_table(tmp_path):
    path = tmp_path / SETS["llava-mmbench"].questions
    path.parent.mkdir()
    names = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "source", "image", "comment", "l2-category"]
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(names)
        for i, answer in enumerate("AB"):
            values = [i, f"Q{i}?", "", "one", "two", "", "", answer, "c", "s", base64.b64encode(png()).decode(), "", "l"]
            writer.writerow(values)
    result, folder = run(tmp_path, "llava-mmbench", {"Q0?": "A", "Q1?": "A"})
    assert result["score"]["accuracy"] == 0.5 and result["submission"] == "submission.xlsx"
    import openpyxl

    head, *rows = openpyxl.load_workbook(folder / "submission.xlsx").active.values
    assert "image" not in head and "category" not in head and head[6] == "prediction"
    assert [row[head.index("prediction")] for row in rows] == ["A", "A"]


def test_sets_that_servers_score_have_their_files(tmp_path):
    questions(tmp_path, "llava-vqav2", [{"question_id": 3, "image": "a.jpg", "text": f"Q?{SHORT}"}])
    _, folder = run(tmp_path, "llava-vqav2", {"Q?": "The two dogs."})
    assert json.loads((folder / "submission.json").read_text()) == [{"question_id": 3, "answer": "2 dogs"}]
    questions(tmp_path, "llava-vizwiz", [{"question_id": 0, "image": "VizWiz_1.jpg", "text": f"Q?{SHORT}"}])
    _, folder = run(tmp_path, "llava-vizwiz", {"Q?": "Unanswerable"})
    assert json.loads((folder / "submission.json").read_text()) == [{"image": "VizWiz_1.jpg", "answer": "unanswerable"}]


@pytest.mark.parametrize("name", ["llava-mmvet", "llava-llavabench"])
def test_sets_of_judges_wait_for_one(name, tmp_path):
    questions(tmp_path, name, [{"question_id": 0, "image": "a.png", "text": "What is it?", "category": "conv"}])
    result, folder = run(tmp_path, name, {"What is it?": "A cat."})
    assert result["score"] == {}
    if name == "llava-mmvet":
        assert json.loads((folder / "submission.json").read_text()) == {"v1_0": "A cat."}
