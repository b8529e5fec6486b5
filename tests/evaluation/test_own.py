"""Data sets that users bring, scoring without a model, and comparing runs."""

import base64
import json

import numpy as np
import pytest

from paddlemix.errors import ConfigError
from paddlemix.evaluation.intervals import compare, interval
from paddlemix.evaluation.loaders import load
from paddlemix.evaluation.own import task_of_file
from paddlemix.evaluation.tasks import LETTER, score
from paddlemix.examples.internvl2 import cli
from paddlemix.examples.internvl2 import compare as compare_command
from paddlemix.examples.internvl2 import score as score_command

PICTURE = base64.b64encode((cli.DEMO_IMAGES / "scene_1.png").read_bytes()).decode()


def test_tables_of_vlmevalkit_are_scored_by_what_they_hold(tmp_path):
    path = tmp_path / "Mixed.tsv"
    rows = [
        ["index", "question", "A", "B", "answer", "category", "image"],
        ["1", "Which?", "red", "blue", "B", "color", PICTURE],
        ["2", "Is it red?", "", "", "No", "yes", "1"],
        ["3", "Read it.", "", "", "['Stop Sign', 'halt']", "text", "1"],
    ]
    path.write_text("\n".join("\t".join(row) for row in rows) + "\n")
    task = task_of_file(path)
    found = load(task, "nowhere")
    assert found[0].prompt == f"Which?\nA. red\nB. blue\n{LETTER}" and len({q.pictures for q in found}) == 1
    references = [{"id": q.id, **q.reference} for q in found]
    good = [{"id": 1, "answer": "B."}, {"id": 2, "answer": "no, it is blue"}, {"id": 3, "answer": "a stop  sign"}]
    assert score(task, good, references)["accuracy"] == 1
    bad = [{"id": 1, "answer": "A"}, {"id": 2, "answer": "Yes"}, {"id": 3, "answer": "go"}]
    assert score(task, bad, references)["accuracy"] == 0


def test_yaml_describes_a_data_set(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"id": "a", "q": "How many?", "image": "x.png", "truth": "3"}) + "\n")
    file = tmp_path / "mine.yaml"
    file.write_text("data: rows.jsonl\nquestion: q\nanswer: truth\nprompt: '{question} Be brief.'\nmetric: relaxed\n")
    task = task_of_file(file)
    (question,) = load(task, "")
    assert question.prompt == "How many? Be brief." and question.pictures == (str(tmp_path / "x.png"),)
    assert score(task, [{"id": "a", "answer": "3.1"}], [{"id": "a", **question.reference}]) == {"accuracy": 1}
    file.write_text("data: rows.jsonl\nmetrik: relaxed\n")
    with pytest.raises(ConfigError, match="'metrik' is not known"):
        task_of_file(file)
    file.write_text("data: rows.jsonl\nmetric: magic\n")
    with pytest.raises(ConfigError, match="'magic' is not known"):
        task_of_file(file)


def test_answers_of_others_are_joined_by_id(tmp_path, capsys):
    (tmp_path / "ai2diagram").mkdir()
    rows = [{"image": "data/a.png", "question": "q", "question_id": i, "answer": "A"} for i in range(3)]
    (tmp_path / "ai2diagram" / "test_vlmevalkit.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "theirs.jsonl"
    path.write_text("".join(json.dumps({"id": str(i), "answer": a}) + "\n" for i, a in ((2, "a"), (0, "B"))))
    command = ["vqa-ai2d-test", str(path), "--data_root", str(tmp_path)]
    score_command.main(command)
    result = json.loads(capsys.readouterr().out)
    assert result["score"] == {"accuracy": pytest.approx(1 / 3)} and result["missing"] == 1
    path.write_text(path.read_text() + json.dumps({"id": "9", "answer": "a"}) + "\n")
    with pytest.raises(SystemExit, match="1"):
        score_command.main(command)
    assert "1 answers have no question, such as '9'" in capsys.readouterr().err


def test_the_difference_of_two_runs(tmp_path, capsys):
    for name, right in (("a", 10), ("b", 25)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "run.json").write_text(json.dumps({"task": "vqa-ai2d-test"}))
        rows = [{"id": i, "answer": "yes" if i < right else "no", "reference": {"answers": ["yes"]}} for i in range(40)]
        (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    compare_command.main([str(tmp_path / "a"), str(tmp_path / "b"), "--show", "2"])
    shown = capsys.readouterr().out
    assert "difference +0.3750" in shown and "15 gained, 0 lost, 15 answers differ" in shown and shown.count('"first"') == 2


def test_runs_of_own_data_and_of_judges_are_compared_too(tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text("data: rows.jsonl\nmetric: exact\n")
    for name, right, grade in (("a", 2, "8 4"), ("b", 3, "8 6")):
        for task, folder in (("mine", tmp_path / name), ("llava-bench", tmp_path / f"judged_{name}")):
            folder.mkdir()
            (folder / "run.json").write_text(json.dumps({"task": task}))
            truth = {"answers": ["yes"], "category": "conv"}
            rows = [{"id": i, "answer": "yes" if i < right else "no", "reference": truth} for i in range(4)]
            (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            (folder / "reviews.jsonl").write_text("".join(json.dumps({"id": i, "review": grade}) + "\n" for i in range(4)))
    with pytest.raises(SystemExit, match="1"):
        compare_command.main([str(tmp_path / "a"), str(tmp_path / "b")])
    assert "name its --task_file" in capsys.readouterr().err
    compare_command.main([str(tmp_path / "a"), str(tmp_path / "b"), "--task-file", str(tmp_path / "mine.yaml")])
    assert "difference +0.2500" in capsys.readouterr().out
    compare_command.main([str(tmp_path / "judged_a"), str(tmp_path / "judged_b")])
    assert "means 0.4000 and 0.6000" in capsys.readouterr().out


def test_intervals_hold_the_mean_and_pairs_are_tighter_than_runs_apart():
    rng = np.random.default_rng(0)
    each = rng.random(400) < 0.6
    low, high = interval(each)
    error = np.sqrt(each.mean() * (1 - each.mean()) / 400)  # of the normal approximation
    assert abs(low - (each.mean() - 1.96 * error)) < 0.01 and abs(high - (each.mean() + 1.96 * error)) < 0.01
    other = each.copy()
    other[np.flatnonzero(~each)[:8]] = True
    found = compare({i: (str(v), float(v)) for i, v in enumerate(each)}, {i: (str(v), float(v)) for i, v in enumerate(other)})
    assert found["difference"] == pytest.approx(8 / 400) and found["interval"][0] > 0 and len(found["gained"]) == 8
