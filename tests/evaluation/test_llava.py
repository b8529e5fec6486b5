"""LLaVA's evaluation loops: prompts, pictures and answers are the original's."""

import base64
import csv
import json

import pytest

from paddlemix.errors import DataError
from paddlemix.evaluation.llava import (
    SETS,
    answer,
    chunk,
    mmbench_questions,
    plain_questions,
    read_questions,
    science_questions,
)
from paddlemix.examples.internvl_llava.answer import main
from tests.models.internvl_llava.helpers import CHAT, EXPECTED, IMAGES, TOWER, model, tokenizer

SUITE = EXPECTED["evaluation"]


def answers(questions):
    lines = list(answer(model(), tokenizer(), questions, model_id=EXPECTED["chat"]))
    assert len({line.pop("answer_id") for line in lines}) == len(lines)
    return lines


def test_short_answers_equal_the_original():
    assert answers(plain_questions(SUITE["questions"], IMAGES)) == SUITE["model_vqa_loader"]


@pytest.mark.slow
def test_long_answers_equal_the_original():
    assert answers(plain_questions(SUITE["questions"], IMAGES, "vqa")) == SUITE["model_vqa"]


def test_science_equals_the_original():
    assert answers(science_questions(SUITE["science_questions"], IMAGES)) == SUITE["model_vqa_science"]


def rows():
    return [{**row, "image": str(IMAGES / row["image"])} for row in SUITE["mmbench_rows"]]


def test_mmbench_equals_the_original():
    expected = SUITE["model_vqa_mmbench"]
    questions = list(mmbench_questions(rows(), all_rounds=True))
    assert [question.values for question in questions] == [
        {k: line[k] for k in question.values} for question, line in zip(questions, expected)
    ]
    shortest = min(range(len(expected)), key=lambda i: len(expected[i]["text"]))
    assert answers([questions[shortest]]) == [expected[shortest]]


@pytest.mark.slow
def test_all_of_mmbench_equals_the_original():
    assert answers(mmbench_questions(rows(), all_rounds=True)) == SUITE["model_vqa_mmbench"]


def test_instructions_are_in_the_asked_language():
    one = next(mmbench_questions(rows(), lang="cn"))
    assert one.text.endswith("\n请直接回答选项字母。") and "请" not in one.values["prompt"]
    (one, _) = science_questions(SUITE["science_questions"], IMAGES, lang="cn")
    assert one.values["prompt"].endswith("\n请直接回答选项字母。")


def test_chunks_are_rows_after_each_other():
    assert [chunk(list(range(10)), 4, i) for i in range(4)] == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]


def test_the_command_writes_lines_of_the_published_layout(tmp_path):
    _, questions, images = SETS["llava-pope"]
    (tmp_path / questions).parent.mkdir(parents=True)
    (tmp_path / questions).write_text("".join(json.dumps(row) + "\n" for row in SUITE["questions"]), encoding="utf-8")
    (tmp_path / images).symlink_to(IMAGES)
    out = tmp_path / "answers" / "a.jsonl"
    flags = ["--model-path", str(CHAT), "--vision-tower", str(TOWER), "--task", "llava-pope", "--data-root", str(tmp_path)]
    main([*flags, "--answers-file", str(out), "--device", "cpu", "--dtype", "float32", "--num-chunks", "3", "--chunk-idx", "2"])
    (line,) = map(json.loads, out.read_text(encoding="utf-8").splitlines())
    del line["answer_id"]
    assert line == SUITE["model_vqa_loader"][2]


def test_pictures_inside_the_table_are_read(tmp_path):
    path = tmp_path / SETS["llava-mmbench"].questions
    path.parent.mkdir()
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(SUITE["mmbench_rows"][0]), delimiter="\t")
        writer.writeheader()
        for row in SUITE["mmbench_rows"]:
            writer.writerow({**row, "image": base64.b64encode((IMAGES / row["image"]).read_bytes()).decode()})
    first, second = read_questions("llava-mmbench", tmp_path)
    assert first.picture == (IMAGES / "img0.png").read_bytes()
    assert second.values == {
        **second.values,
        "question_id": 1,
        "options": ["one", "two"],
        "prompt": "How many?\nA. one\nB. two",
    }


def test_what_is_missing_is_told(tmp_path):
    for name in ("llava-gqa", "llava-sqa", "llava-mmbench"):
        with pytest.raises(DataError, match=SETS[name].questions):
            read_questions(name, tmp_path)
    with pytest.raises(DataError, match="llava-vqav2"):
        read_questions("llava-other", tmp_path)


def test_the_evaluation_command_answers_alike(tmp_path):
    from paddlemix.evaluation.local import LlavaModel, load_model
    from paddlemix.evaluation.runner import Settings, run_task
    from paddlemix.evaluation.tasks import TASKS

    _, questions, images = SETS["llava-pope"]
    (tmp_path / questions).parent.mkdir(parents=True)
    (tmp_path / questions).write_text("".join(json.dumps(row) + "\n" for row in SUITE["questions"]), encoding="utf-8")
    (tmp_path / images).symlink_to(IMAGES)
    settings = Settings(str(CHAT), str(tmp_path), dtype="float32", device="cpu")
    loaded = load_model(settings)
    assert isinstance(loaded, LlavaModel)
    result = run_task(TASKS["llava-pope"], settings, tmp_path / "results", model=loaded, progress=False)
    assert (result["questions"], result["failed"], result["submission"]) == (3, 0, "llava.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "results" / "llava-pope" / "llava.jsonl").read_text("utf-8").splitlines()]
    expected = SUITE["model_vqa_loader"]
    assert [{k: line[k] for k in ("question_id", "prompt", "text")} for line in lines] == [
        {k: line[k] for k in ("question_id", "prompt", "text")} for line in expected
    ]


@pytest.mark.parametrize("name", [name.removeprefix("llava-") for name in SETS])
def test_scripts_call_the_evaluation_command(name, tmp_path):
    import subprocess

    from paddlemix.examples.internvl2.cli import ROOT

    script = ROOT / "examples" / "internvl_llava" / "scripts_internvl" / "eval" / f"{name}.sh"
    (tmp_path / "python").write_text('#!/bin/sh\nprintf "%s\\n" "$@" > argv\n')
    (tmp_path / "python").chmod(0o755)
    subprocess.run(
        ["sh", str(script), "my model", "--limit", "2"],
        cwd=tmp_path,
        env={"PYTHON": "./python", "PATH": "/usr/bin:/bin"},
        check=True,
    )
    argv = (tmp_path / "argv").read_text().splitlines()
    assert argv[0].endswith("evaluate.py") and argv[-2:] == ["--limit", "2"]
    flags = dict(zip(argv[1::2], argv[2::2]))
    assert flags["--model_name_or_path"] == "my model" and flags["--task"] == f"llava-{name}"
