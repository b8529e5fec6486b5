"""Small data sets in their real layouts, asked by the command's own code: answers do not depend on how they are asked."""

import base64
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from paddlemix.errors import ConfigError, DataError
from paddlemix.evaluation.answers import RunFolder, read_answers
from paddlemix.evaluation.local import LocalModel, load_model
from paddlemix.evaluation.runner import Settings, run_task
from paddlemix.evaluation.submissions import camera_marks
from paddlemix.evaluation.tasks import COT, LETTER, SHORT, TASKS, select
from paddlemix.examples.internvl2 import cli, evaluate
from paddlemix.examples.internvl2.demo_model import questions

SCENES = 12
pytestmark = pytest.mark.medium


def lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A data folder with drawn scenes."""
    root = tmp_path_factory.mktemp("data")
    rng = random.Random(3)
    (root / "s").mkdir()
    rows, boxes = [], []
    while len(rows) < SCENES:
        (picture,), _, turns = questions.shapes(rng)
        name = f"data/s/{len(rows)}.png"
        picture.save(root / "s" / f"{len(rows)}.png")
        rows.append({"image": name, "question": turns[0].question, "answer": turns[0].answer, "question_id": len(rows) + 100})
        boxes.append({"image": name, "sent": "shape", "bbox": [1, 2, 30, 40], "width": picture.width, "height": picture.height})
    lines(root / "chartqa" / "test_human.jsonl", rows[:6])
    lines(root / "chartqa" / "test_augmented.jsonl", [{**row, "question_id": row["question_id"] - 6} for row in rows[6:]])
    lines(root / "refcoco" / "refcoco_val.jsonl", boxes)
    lines(root / "docvqa" / "test.jsonl", rows)
    choices = [
        {"image": row["image"], "hint": "", "question": row["question"], "choices": [row["answer"], "none"], "answer": 0}
        for row in rows
    ]
    lines(root / "scienceqa" / "scienceqa_test_img.jsonl", choices)
    pope = [
        {"question_id": i, "image": f"{i}.png", "text": f"Is there a star?\n{SHORT}", "category": category}
        for category in ("random", "popular", "adversarial")
        for i in range(4)
    ]
    lines(root / "pope" / "llava_pope_test.jsonl", pope)
    (root / "pope" / "val2014").mkdir()
    for i in range(4):
        Image.open(root / "s" / f"{i}.png").save(root / "pope" / "val2014" / f"{i}.png")
    for category in ("random", "popular", "adversarial"):
        labels = [{**row, "label": "yes"} for row in reversed(pope) if row["category"] == category]
        lines(root / "coco" / f"coco_pope_{category}.json", labels)
    table = ["index\tquestion\thint\tA\tB\tanswer\tcategory\timage"]
    for i in range(4):
        image = base64.b64encode((root / "s" / f"{i}.png").read_bytes()).decode()
        table.append(f"{i}\tWhat is it?\t{'Look.' if i == 0 else ''}\tred\tblue\tA\tcolor\t{image}")
    (root / "mmbench").mkdir()
    (root / "mmbench" / "mmbench_dev_20230712.tsv").write_text("\n".join(table) + "\n")
    pages = [{"questionId": 5, "question": "What?", "page_ids": ["0", "1"], "answers": ["red"]}]
    (root / "mpdocvqa" / "images").mkdir(parents=True)
    for i in range(2):
        Image.open(root / "s" / f"{i}.png").save(root / "mpdocvqa" / "images" / f"{i}.jpg")
    (root / "mpdocvqa" / "val.json").write_text(json.dumps({"data": pages}))
    return root


@pytest.fixture(scope="module")
def settings(data):
    return Settings(model=str(cli.DEMO_MODEL), data_root=str(data), device="cpu")


@pytest.fixture(scope="module")
def model(settings):
    return load_model(settings)


def run(name, out, settings, model=None, **changes):
    import dataclasses

    settings = dataclasses.replace(settings, **changes)
    model = model and LocalModel(model.model, model.tokenizer, settings)
    return run_task(TASKS[name], settings, out, model=model, progress=False)


def answers(out, name):
    return read_answers(Path(out) / name / "answers.jsonl")


def test_answers_do_not_depend_on_batches_or_on_where_a_run_stopped(tmp_path, settings, model):
    whole = run("vqa-chartqa-test", tmp_path / "a", settings, model)
    expected = answers(tmp_path / "a", "vqa-chartqa-test")
    assert [row["index"] for row in expected] == list(range(SCENES)) and whole["questions"] == SCENES
    assert whole["failed"] == 0 and set(whole["score"]) == {"human", "augmented", "average"}
    assert all(row["question"].endswith(f" {SHORT}") and "<image>" not in row["question"] for row in expected)
    run("vqa-chartqa-test", tmp_path / "b", settings, model, batch_size=1)
    assert answers(tmp_path / "b", "vqa-chartqa-test") == expected
    # As after kill -9: some answers out of order, the last line cut.
    path = tmp_path / "b" / "vqa-chartqa-test" / "answers.jsonl"
    kept = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept[3] = kept[3].replace('"answer": "', '"answer": "kept ')
    path.write_text(kept[7] + kept[3] + kept[5][:20], encoding="utf-8")
    run("vqa-chartqa-test", tmp_path / "b", settings, model, batch_size=8)
    resumed = answers(tmp_path / "b", "vqa-chartqa-test")
    assert resumed[3]["answer"] == "kept " + expected[3]["answer"], "what was answered is not asked again"
    assert [row for i, row in enumerate(resumed) if i != 3] == [row for i, row in enumerate(expected) if i != 3]


@pytest.mark.slow
def test_killed_and_resumed_with_two_processes_equals_one(tmp_path, data, settings, model):
    run("refcoco-val", tmp_path / "one", settings, model)
    command = [sys.executable, evaluate.__file__, "--task", "refcoco-val", "--data_root", str(data), "--device", "cpu"]
    command += ["--out_dir", str(tmp_path / "two"), "--batch_size", "1", "--processes", "2"]
    started = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
    path = tmp_path / "two" / "refcoco-val" / "answers.jsonl"
    until = time.time() + 120
    while started.poll() is None and time.time() < until and not (path.exists() and path.stat().st_size):
        time.sleep(0.05)
    os.killpg(started.pid, signal.SIGKILL)
    started.wait()
    assert subprocess.run(command, timeout=200).returncode == 0
    assert answers(tmp_path / "two", "refcoco-val") == answers(tmp_path / "one", "refcoco-val")


def test_other_settings_do_not_go_on_with_a_run(tmp_path, settings, model):
    run("vqa-docvqa-test", tmp_path, settings, model, limit=2)
    with pytest.raises(ConfigError, match="cot False instead of True"):
        run("vqa-docvqa-test", tmp_path, settings, model, limit=2, cot=True)
    RunFolder(tmp_path / "vqa-docvqa-test", {}, resume=False)
    assert (tmp_path / "vqa-docvqa-test.1" / "answers.jsonl").exists()
    sent = json.loads((tmp_path / "vqa-docvqa-test.1" / "submission.json").read_text())
    assert [set(row) for row in sent] == [{"questionId", "answer"}] * 2 and sent[0]["questionId"] == 100


def test_what_is_damaged_is_named_and_the_rest_goes_on(tmp_path, settings, model, data):
    path = data / "infographicsvqa" / "test.jsonl"
    rows = (data / "docvqa" / "test.jsonl").read_text().splitlines()[:2]
    gone = json.dumps({**json.loads(rows[0]), "image": "data/s/gone.png", "question_id": 7})
    path.parent.mkdir()
    path.write_text("\n".join([rows[0], gone, '{"broken', json.dumps({"image": "data/s/0.png"}), rows[1]]) + "\n")
    result = run("vqa-infovqa-test", tmp_path, settings, model)
    assert (result["questions"], result["failed"], result["scored"]) == (5, 3, 2)
    told = {failure["id"]: failure["error"] for failure in result["failures"]}
    assert "gone.png" in told[7] and "line 3" in told["row 3"] and "'question'" in told["row 4"]
    with pytest.raises(SystemExit, match="1"):
        evaluate.main(
            ["--task", "vqa-infovqa-test", "--data_root", str(data), "--out_dir", str(tmp_path / "c"), "--device", "cpu"]
        )
    with pytest.raises(DataError, match=r"ocrvqa_val\.jsonl is missing"):
        run("vqa-ocrvqa-val", tmp_path, settings, model)


def test_a_full_disk_loses_nothing_that_was_written(tmp_path, settings, model):
    import resource

    run("vqa-chartqa-test", tmp_path / "whole", settings, model)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, before[1]))  # of any file: as if the disk had no more
    try:
        with pytest.raises(OSError, match=r"answers\.jsonl"):
            run("vqa-chartqa-test", tmp_path / "full", settings, model, batch_size=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    written = answers(tmp_path / "full", "vqa-chartqa-test")
    assert 0 < len(written) < SCENES and (tmp_path / "full" / "vqa-chartqa-test" / "answers.jsonl").stat().st_size == 1500
    run("vqa-chartqa-test", tmp_path / "full", settings, model)
    assert answers(tmp_path / "full", "vqa-chartqa-test") == answers(tmp_path / "whole", "vqa-chartqa-test")


def test_answers_without_a_question_are_counted_and_kept(tmp_path, settings, model):
    run("vqa-docvqa-test", tmp_path, settings, model)
    folder = tmp_path / "vqa-docvqa-test"
    rows = answers(tmp_path, "vqa-docvqa-test")
    strangers = [{**rows[0], "index": 99}, {**rows[1], "id": "other"}, {"id": 1}]
    kept = rows[:3] + strangers[:1] + rows[4:] + strangers[1:]
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    result = run("vqa-docvqa-test", tmp_path, settings, model)
    assert (result["without_question"], result["failed"], result["scored"]) == (3, 0, SCENES)
    assert answers(tmp_path, "vqa-docvqa-test") == rows
    assert read_answers(folder / "without_question.jsonl") == strangers
    lines = (folder / "answers.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "answers.jsonl").write_text("".join([lines[0], "not JSON\n", *lines[1:]]), encoding="utf-8")
    with pytest.raises(DataError, match=r"answers\.jsonl: line 2 is no JSON object"):
        run("vqa-docvqa-test", tmp_path, settings, model)


def test_layouts_become_prompts(tmp_path, settings, model):
    assert run("pope", tmp_path, settings, model)["failed"] == 0
    rows = answers(tmp_path, "pope")
    assert len({row["id"] for row in rows}) == 12 and rows[0]["question"] == f"Is there a star?\n{SHORT}"
    run("scienceqa", tmp_path, settings, model, limit=1, cot=True)
    (row,) = answers(tmp_path, "scienceqa")
    plain = f"{row['question'].split('Question:')[1].strip()}"
    assert row["question"] == COT.format(plain) and plain.endswith(f"B. none\n{LETTER}") and "output" in row
    run("mmbench-dev-en", tmp_path, settings, model)
    rows = answers(tmp_path, "mmbench-dev-en")
    assert rows[0]["question"] == f"Look.\nWhat is it?\nA. red\nB. blue\n{LETTER}"
    import openpyxl

    sheet = openpyxl.load_workbook(tmp_path / "mmbench-dev-en" / "submission.xlsx").active
    assert [cell.value for cell in sheet[1]] == ["index", "question", "A", "B", "answer", "prediction"]
    run("vqa-mpdocvqa-val", tmp_path, settings, model)
    assert answers(tmp_path, "vqa-mpdocvqa-val")[0]["question"] == f"Image-1: <image>\nImage-2: <image>\nWhat? {SHORT}"


def test_marks_of_cameras_become_pixels():
    text = "go <c1,CAM_BACK,[500.0,750.0]> and <c2,CAM_NOWHERE,[1,2]>"
    assert camera_marks(text) == "go <c1,CAM_BACK,800.0,450.0> and <c2,CAM_NOWHERE,[1,2]>"


def test_names_and_groups():
    assert len(select("refcoco")) == 8 and [task.name for task in select("pope,mme,pope")] == ["pope", "mme"]
    with pytest.raises(ConfigError, match="'vqa-chartqa' is not known"):
        select("vqa-chartqa")
