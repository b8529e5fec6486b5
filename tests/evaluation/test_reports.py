"""The page of a run, tables of many tasks with published figures, intervals of every score, and what is told before a run."""

import base64
import io
import json
import random
import re

import numpy as np
import pytest
from PIL import Image

from paddlemix.errors import DataError
from paddlemix.evaluation.checking import check
from paddlemix.evaluation.intervals import intervals
from paddlemix.evaluation.reading import is_unreadable, labels
from paddlemix.evaluation.runner import Settings, run_task
from paddlemix.evaluation.scorers import scorer
from paddlemix.evaluation.sources import SOURCES
from paddlemix.evaluation.suite import read_published, table
from paddlemix.evaluation.tasks import TASKS
from paddlemix.examples.internvl2 import cli, evaluate
from paddlemix.examples.internvl2.demo_model import questions

from .test_layouts import LAYOUTS, Stub, png, put

EVIL = "<script>alert(1)</script><img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def scenes():
    rng = random.Random(7)
    return [questions.shapes(rng)[0][0] for _ in range(12)]


def ask(task, root, out, reply, **more):
    settings = Settings(model="stub", data_root=str(root))
    return run_task(task, settings, out, model=Stub(reply), progress=False, **more)


def pictures_of(page):
    return [
        Image.open(io.BytesIO(base64.b64decode(data))) for data in re.findall(r'src="data:image/jpeg;base64,([^"]+)"', page)
    ]


def test_boxes_are_drawn_and_texts_are_escaped(tmp_path):
    rows = []
    for i in range(5):
        put(tmp_path / f"r/{i}.png", png(Image.new("RGB", (200, 100), (255, 255, 255))))
        rows.append({"image": f"data/r/{i}.png", "sent": EVIL, "bbox": [20, 10, 120, 60], "width": 200, "height": 100})
    put(tmp_path / "refcoco/refcoco_val.jsonl", rows)

    def reply(question):
        return {0: "[[500, 500, 900, 900]]", 1: EVIL, 2: "[[nan, 1, inf, 3]]"}.get(question.id, "[[100, 100, 600, 600]]")

    result = ask(TASKS["refcoco-val"], tmp_path, tmp_path / "out", reply)
    assert result["score"] == {"precision@1": 0.4} and result["unreadable"] == 1
    page = (tmp_path / "out/refcoco-val/report.html").read_text(encoding="utf-8")
    assert "<script" not in page and "<img src=x" not in page and "&lt;script&gt;" in page
    assert "default-src &#x27;none&#x27;" in page or "default-src 'none'" in page
    found = [np.asarray(picture).astype(int) for picture in pictures_of(page)]
    assert len(found) == 10, "five as the worst and five at random"
    for picture in found:  # JPEG's colours differ a little from what was drawn
        sides = picture[15:55, 20], picture[15:55, 120]  # left and right side of the true box
        assert all((255 * 3 - side.sum(-1) > 150).mean() > 0.9 for side in sides)


def test_what_was_taken_for_what_and_bars_by_category(tmp_path, scenes):
    choices = []
    for i in range(8):
        put(tmp_path / f"s/{i}.png", png(scenes[i]))
        choices.append({"image": f"data/s/{i}.png", "question": "q", "choices": ["red", "blue"], "answer": i % 2})
    put(tmp_path / "scienceqa/scienceqa_test_img.jsonl", choices)
    said = ["A", "A", "B", "B", "no idea", "B", "A", "B"]
    result = ask(TASKS["scienceqa"], tmp_path, tmp_path / "out", lambda q: said[q.id])
    assert result["score"]["accuracy"] == 5 / 8 and result["unreadable"] == 1
    page = (tmp_path / "out/scienceqa/report.html").read_text(encoding="utf-8")
    lines = re.findall(r"<tr>(.*?)</tr>", page)
    cells = [re.findall(r"<t[dh]>(.*?)</t[dh]>", line) for line in lines]
    assert ["", "A", "B", "unreadable", "all"] in cells
    assert ["A", "2", "1", "1", "4"] in cells and ["B", "1", "3", "0", "4"] in cells
    prompt, _, _, _ = LAYOUTS["mme"](tmp_path, scenes)
    ask(
        TASKS["mme"], tmp_path, tmp_path / "out", lambda q: "Yes" if q.reference["category"] == "OCR" else q.reference["answer"]
    )
    page = (tmp_path / "out/mme/report.html").read_text(encoding="utf-8")
    widths = dict(re.findall(r'<td>(\w+)</td><td><div class="bar"><div style="width:([\d.]+)%', page))
    assert widths == {"existence": "100.0", "code_reasoning": "100.0", "OCR": "50.0"}


def test_tasks_of_servers_and_tables_with_pictures_inside_have_a_page_too(tmp_path, scenes):
    for name in ("drivelm", "mmmu-val", "mvbench", "mathvista-testmini"):
        _, right, _, _ = LAYOUTS[name](tmp_path / "data", scenes)
        ask(TASKS[name], tmp_path / "data", tmp_path / "out", right)
        page = (tmp_path / "out" / name / "report.html").read_text(encoding="utf-8")
        assert len(pictures_of(page)) >= 8 and (name == "drivelm") == ("Worst" not in page)


def test_labels_are_what_scorers_read():
    options = {"A": "red", "B": "blue"}
    for name in ("letter", "scienceqa", "mmvp", "mmmu", "mmmu_pro", "mmiu", "vlmeval"):
        reference = {"id": "val_Art_1", "options": options, "answer": "B", "kind": "letter", "question_type": "multiple-choice"}
        reference["task"] = "forensic_detection"
        for answer, read in (("B", "B"), ("B. blue", "B"), ("it is blue", "B"), ("A", "A"), ("who knows", None)):
            assert labels(name, reference, answer) == (read, "B")
            _, (value,) = scorer(name)([reference], [answer])
            assert value == (read == "B"), name
    assert is_unreadable("refcoco", {}, "no box") and not is_unreadable("refcoco", {}, "[[1, 2, 3, 4]]")
    assert not is_unreadable("vqa", {}, "anything") and not is_unreadable("letter", {"options": options}, " ")


@pytest.mark.slow
def test_every_score_has_an_interval_and_pairs_are_drawn_together():
    rng = np.random.default_rng(0)
    right = rng.random(300) < 0.7
    references = [{"id": i, "options": {"A": "x", "B": "y"}, "answer": "A", "category": "ab"[i % 2]} for i in range(300)]
    found = intervals("letter", references, ["A" if value else "B" for value in right])
    assert set(found) == {"accuracy", "category/a", "category/b"}
    for name, values in (("accuracy", right), ("category/a", right[::2]), ("category/b", right[1::2])):
        error = 1.96 * np.sqrt(values.mean() * (1 - values.mean()) / len(values))  # of the normal approximation
        assert abs(found[name][0] - (values.mean() - error)) < 0.03 and abs(found[name][1] - (values.mean() + error)) < 0.03
    # Pairs that are right or wrong together: their accuracy varies as that of half as many questions.
    pairs = [{**reference, "pair": reference["id"] // 2} for reference in references]
    both = np.repeat(rng.random(150) < 0.7, 2)
    low, high = intervals("mmvp", pairs, ["A" if value else "B" for value in both])["pair_accuracy"]
    error = 1.96 * np.sqrt(both.mean() * (1 - both.mean()) / 150)
    assert abs(low - (both.mean() - error)) < 0.03 and abs(high - (both.mean() + error)) < 0.03


def test_published_figures_stand_beside_ours(tmp_path):
    path = tmp_path / "known.csv"
    path.write_text("model,task,score,source\nInternVL2-1B,pope,87.3,card\nOther,mme,1794.4,card\nOther,gone,1,x\n")
    rows = read_published(path)
    results = [
        {"task": "pope", "metric": "f1", "score": {"f1": 0.85}, "intervals": {"f1": (0.8, 0.9)}, "scored": 9, "questions": 10},
        {"task": "mme", "metric": "total", "score": {"total": 1800.0}, "intervals": {}, "scored": 4, "questions": 4},
        {"task": "vqa-docvqa-test", "score": {}, "submission": "submission.json", "scored": 2, "questions": 2},
    ]
    lines = table(results, rows)
    assert lines[0] == "| task | metric | score | 95% | answered | InternVL2-1B | Other |"
    assert lines[2] == "| pope | f1 | 85.00 | 80.00 to 90.00 | 9 of 10 | 87.3 |  |"
    assert lines[3] == "| mme | total | 1800.00 |  | 4 of 4 |  | 1794.4 |" and "by its server" in lines[4]
    for content, problem in (
        ("model,task,score\nx,pope,1\n", "no column 'source'"),
        ("model,task,score,source\nx,pope,good,y\n", "line 2 has the score 'good'"),
        ("model,task,score,source\nx,refcoco,1,y\n", "names the group 'refcoco'"),
    ):
        path.write_text(content)
        with pytest.raises(DataError, match=problem):
            read_published(path)


def test_what_is_missing_is_told_before_a_run(tmp_path, scenes, capsys):
    lines, whole = check(TASKS["pope"], tmp_path)
    assert not whole and "llava_pope_test.jsonl is missing" in lines[1] and SOURCES["pope"].url in lines[-1]
    LAYOUTS["seed"](tmp_path, scenes)
    lines, whole = check(TASKS["seed"], tmp_path)
    assert whole and lines == ["seed: 12 questions, 12 files of pictures"]
    (tmp_path / "SEED/SEED-Bench-image/3").unlink()
    with open(tmp_path / "SEED/seed.jsonl", "a") as file:
        file.write('{"broken\n')
    with pytest.raises(SystemExit, match="1"):
        evaluate.main(["--task", "seed,pope", "--data-root", str(tmp_path), "--check"])
    shown = capsys.readouterr().out
    assert "1 rows cannot be used: line 13 of" in shown and "1 pictures are missing, of 1 questions" in shown
    assert "SEED-Bench-image/3" in shown and "pope: nothing to ask" in shown


def test_sources_are_those_of_the_tasks_and_of_the_docs():
    assert {task.source for task in TASKS.values()} == set(SOURCES)
    docs = (cli.ROOT.parent / "docs" / "evaluation.md").read_text(encoding="utf-8")
    for name, source in SOURCES.items():
        said = [line for line in docs.splitlines() if source.url in line]
        assert any(source.licence in line and source.disk in line and source.questions in line for line in said), name


def test_a_table_of_all_tasks_is_written(tmp_path, scenes, monkeypatch, capsys):
    LAYOUTS["mmvp"](tmp_path, scenes)
    LAYOUTS["tiny_lvlm"](tmp_path, scenes)
    (tmp_path / "known.csv").write_text("model,task,score,source\nInternVL2-1B,mmvp,30,a paper\n")
    command = ["--task", "mmvp,tiny_lvlm", "--data_root", str(tmp_path), "--out-dir", str(tmp_path / "out"), "--limit", "2"]
    evaluate.main([*command, "--device", "cpu", "--published", str(tmp_path / "known.csv"), "--max-num", "1"])
    lines = (tmp_path / "out" / "suite.md").read_text(encoding="utf-8").splitlines()
    assert lines[0].endswith("| InternVL2-1B |") and len(lines) == 6 and lines[-1] == "- InternVL2-1B: a paper"
    assert lines[2].startswith("| mmvp | pair_accuracy |") and lines[2].endswith("| 2 of 2 | 30 |")
    assert "\n".join(lines[:4]) in capsys.readouterr().out
    saved = json.loads((tmp_path / "out" / "suite.json").read_text())
    assert [row["task"] for row in saved] == ["mmvp", "tiny_lvlm"]
    run = json.loads((tmp_path / "out" / "mmvp" / "run.json").read_text())
    assert run["limit"] == 2 and set(run["versions"]) == {"paddlemix", "paddle", "python"} and len(run["model_digest"]) == 32
