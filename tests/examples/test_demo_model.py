"""The demo model's data says what its pictures show, keeps its promises, and its training runs from nothing to a table."""

import json
import math
import random
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

from paddlemix.datasets.internvl2 import check
from paddlemix.examples.internvl2 import cli
from paddlemix.examples.internvl2.demo_model import data, evaluate, questions, scenes, train

MODEL = cli.DEMO_MODEL
RESULTS = Path(data.__file__).parent / "results"


def _blobs(picture):
    """Connected spots that are not ground: list of (box in pixels, mean colour)."""
    pixels = np.asarray(picture).astype(int)
    ground = pixels[0, 0]
    spots = (np.abs(pixels - ground).max(-1) > 60).astype(np.uint8)
    count, _, stats, _ = cv2.connectedComponentsWithStats(spots, connectivity=8)
    found = []
    for left, top, width, height, area in stats[1:count]:
        if area > 20:
            inner = pixels[top : top + height, left : left + width][spots[top : top + height, left : left + width] > 0]
            found.append(((left, top, left + width, top + height), np.median(inner, axis=0)))
    return found


def _nearest(color):
    return min(scenes.COLORS, key=lambda name: np.abs(np.array(scenes.COLORS[name]) - color).sum())


@pytest.mark.parametrize("seed", range(40))
def test_answers_about_shapes_agree_with_the_pixels(seed):
    rng = random.Random(seed)
    (picture,), _, turns = questions.shapes(rng)
    blobs = _blobs(picture)
    colors = [_nearest(color) for _, color in blobs]
    for turn in turns:
        if turn.question == "How many shapes are there?":
            assert int(turn.answer) == len(blobs)
        elif turn.task == "color":
            assert turn.answer in colors
        elif turn.task == "description":
            assert sorted(re.findall("|".join(scenes.COLORS), turn.answer)) == sorted(colors)
        elif turn.task == "box":
            box = [int(x) * scenes.SIDE / 1000 for x in re.findall(r"\d+", turn.answer)]
            misses = [np.abs(np.subtract(blob, box)).max() for blob, _ in blobs]
            assert min(misses) < 2, "a box is tight around its shape, to two pixels"
            assert colors[int(np.argmin(misses))] in turn.question
        elif turn.task == "place":
            assert turn.answer in _places(turn.question, blobs)


def _places(question, blobs):
    """Where the blobs are that a question may be about, as far as their color tells."""
    name = re.search(r"Where is the (.*?)\?", question)[1].split()
    asked = [box for box, color in blobs if len(name) == 1 or _nearest(color) == name[0]]
    centres = [((b[0] + b[2]) / 2, (b[1] + b[3]) / 2) for b in asked]
    columns, rows = ("left", "", "right"), ("top", "", "bottom")
    cells = [(int(y * 3 / scenes.SIDE), int(x * 3 / scenes.SIDE)) for x, y in centres]
    return [f"{rows[row]} {columns[column]}".strip() or "middle" for row, column in cells]


def test_shapes_in_a_row_are_where_the_answer_says():
    rng = random.Random(8)
    asked = 0
    for _ in range(60):
        (picture,), _, (turn,) = questions.where(rng)
        blobs = _blobs(picture)
        heights = [(box[1] + box[3]) / 2 for box, _ in blobs]
        assert max(heights) - min(heights) < scenes.SIDE / 6 and len(blobs) in (2, 3)
        if turn.task == "place":
            assert turn.answer in _places(turn.question, blobs)
            asked += 1
    assert asked > 50


def test_crossed_questions_are_answered_with_the_color_of_the_place_that_they_ask_about():
    rng = random.Random(7)
    asked = 0
    for _ in range(60):
        pictures, _, turns = questions.crossed(rng)
        for turn in turns:
            where = re.match(r"What color is (?:at|in) the (.*), and what shape (?:at|in) the (.*)\?", turn.question)[1]
            if where.endswith("picture"):
                ((_, color),) = _blobs(pictures[where == "second picture"])
            else:
                color = np.asarray(pictures[0])[_centre(where)]
            assert turn.answer.split(", ")[0] == _nearest(color)
            asked += 1
    assert asked == 120


def _centre(place):
    """The pixel (row, column) in the middle of a cell."""
    row, column = divmod(scenes.PLACES.index(place), 3)
    return int((row + 0.5) * scenes.SIDE / 3), int((column + 0.5) * scenes.SIDE / 3)


def test_the_highest_bar_is_the_tallest_spot():
    rng = random.Random(1)
    for _ in range(20):
        (picture,), _, turns = questions.chart(rng)
        pixels = np.asarray(picture).astype(int)
        # Above the axis and right of it.
        tops = dict.fromkeys(scenes.COLORS, 200)
        for y, x in zip(*np.nonzero(np.abs(pixels - pixels[0, 0]).max(-1) > 90)):
            if x > 9 and y < 74:
                name = _nearest(pixels[y, x])
                if np.abs(np.array(scenes.COLORS[name]) - pixels[y, x]).max() <= 21:
                    tops[name] = min(tops[name], y)
        if turns[0].task == "description":
            assert turns[0].answer == f"a chart of {sum(top < 200 for top in tops.values())} bars"
            continue
        highest = next(turn.answer for turn in turns if "highest" in turn.question)
        assert tops[highest] == min(tops.values())


def test_the_first_and_last_frame_lie_in_the_direction_of_the_answer():
    rng = random.Random(2)
    for _ in range(20):
        pictures, prefix, turns = questions.video(rng)
        assert prefix.count("<image>") == len(pictures) == 4
        (first, _), (last, _) = _blobs(pictures[0])[0], _blobs(pictures[-1])[0]
        dx, dy = last[0] - first[0], last[1] - first[1]
        seen = ("right" if dx > 0 else "left") if abs(dx) > abs(dy) else ("down" if dy > 0 else "up")
        assert seen == next(turn.answer for turn in turns if turn.question == "Which way does it move?")


def test_nothing_is_known_of_pictures_that_are_no_scenes():
    rng = random.Random(3)
    for _ in range(20):
        pictures, prefix, (turn,) = questions.unknown(rng)
        assert turn.answer == "I do not know." and prefix.count("<image>") == len(pictures)
        for picture in pictures:  # no plain ground
            assert np.unique(np.asarray(picture.convert("L")) // 8, return_counts=True)[1].max() < 0.5 * scenes.SIDE**2


def test_a_larger_picture_for_people_looks_the_same():
    small, large = (scenes.draw_text("OPEN", random.Random(4), side) for side in (scenes.SIDE, 2 * scenes.SIDE))
    assert large.size == (168, 168)
    shrunk = np.asarray(large.resize(small.size, Image.Resampling.BOX)).astype(int)
    assert np.abs(shrunk - np.asarray(small)).mean() < 2


def _records(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo_data")
    for name in data.PARTS:
        data.write_part(folder, name, 0.02, processes=1)
    return folder


def test_training_never_names_a_combination_that_is_kept_for_the_end(parts):
    kept = [" ".join(kind) for kind in scenes.UNSEEN]
    names = set(data.PARTS) - {"heldout", "unseen"}
    training = [json.dumps(record["conversations"]) for name in names for record in _records(parts, name)]
    assert len(training) > 1000
    assert not [text for text in training if any(name in text for name in kept)]
    asked = [json.dumps(record["conversations"]) for record in _records(parts, "unseen")]
    assert any(name in text for text in asked for name in kept)


@pytest.mark.parametrize("color, shape", scenes.UNSEEN)
def test_random_colors_stay_away_from_combinations_that_are_kept_for_the_end(color, shape):
    rng = random.Random(6)
    for _ in range(100):
        item = scenes.Item(scenes.any_color(shape, rng), shape, 42, 42, 12)
        assert min(scenes.COLORS, key=lambda name: math.dist(scenes.COLORS[name], item.color)) != color
        ((_, shown),) = _blobs(scenes.draw_items([item], rng))
        assert np.abs(shown - scenes.COLORS[color]).max() > 45  # shades of one name differ by 20
        assert math.dist(shown, scenes.COLORS[color]) > 75  # and are up to 35 away


def test_held_out_pictures_are_no_training_pictures(parts):
    def pictures(name):
        return {path.read_bytes() for path in (parts / name).rglob("*.png")}

    assert not (pictures("mixed") | pictures("all")) & pictures("heldout")


def test_the_same_seed_writes_the_same_bytes(parts, tmp_path):
    data.write_part(tmp_path, "heldout", 0.02, processes=2)
    again, before = (sorted((folder / "heldout").rglob("*.png")) for folder in (tmp_path, parts))
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in before]
    assert _records(tmp_path, "heldout") == _records(parts, "heldout")


def test_the_checker_finds_nothing_wrong_with_the_data(parts, tmp_path, capsys):
    check.main([str(parts / "mixed.json"), "--model_name_or_path", str(cli.DEMO_MODEL), "--output", str(tmp_path)])
    assert "\n0 of 1600 records cannot be used" in capsys.readouterr().out


def test_answers_are_exact_but_boxes_may_miss_by_a_part():
    truth = "<ref>red star</ref><box>[[100, 100, 300, 300]]</box>"
    assert evaluate.is_right("color", "red", "red") and not evaluate.is_right("color", "red.", "red")
    assert evaluate.is_right("box", "red star[[100, 100, 300, 300]]", truth)
    # Shifted by a quarter of the side: 3/4 of the area in common, 5/4 in all.
    assert evaluate.is_right("box", "red star[[150, 100, 350, 300]]", truth)
    # By a half: 1/2 in common, 3/2 in all.
    assert not evaluate.is_right("box", "red star[[200, 100, 400, 300]]", truth)
    assert not evaluate.is_right("box", "red star", truth)
    assert not evaluate.is_right("box", "blue star[[100, 100, 300, 300]]", truth)
    assert not evaluate.is_right("box", "[[100, 100, 300, 300], [0, 0, 1, 1]]", truth)


def test_what_cannot_be_evaluated_or_written_is_named(tmp_path, capsys, monkeypatch):
    def failure(module, *arguments):
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            module.main()
        assert caught.value.code == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
        return error

    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "red"}]
    (tmp_path / "plain.jsonl").write_text(json.dumps({"id": 0, "image": "x.png", "conversations": turns}) + "\n")
    entry = {"root": str(tmp_path), "annotation": str(tmp_path / "plain.jsonl"), "data_augment": False, "repeat_time": 1}
    (tmp_path / "plain.json").write_text(json.dumps({"plain": entry | {"length": 1}}))
    assert "plain.jsonl" in (error := failure(evaluate, MODEL, tmp_path / "plain.json")) and "'tasks'" in error
    (tmp_path / "file").touch()
    assert f"{tmp_path}/file" in failure(data, tmp_path / "file", "--scale", "0.001")
    assert f"{tmp_path}/file" in failure(train, "--output_dir", tmp_path / "file", "--scale", "0.001")


def test_the_table_counts_answers_not_tasks():
    table = evaluate.format_table(["a"], [{"color": (1, 1), "place": (0, 3)}])
    assert table.splitlines()[-1] == "| overall | 25.0% of 4 |"


def test_the_card_says_what_was_measured():
    card, measured = (
        (folder / name).read_text(encoding="utf-8") for folder, name in ((MODEL, "README.md"), (RESULTS, "accuracy.md"))
    )
    assert measured in card
    for name, _, steps, _ in train.STAGE1 + train.STAGE2:
        rows = [json.loads(line) for line in (RESULTS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        assert steps - 20 < max(row["step"] for row in rows if "loss" in row) <= steps  # a line every 20 steps
        assert re.search(rf"\b{steps:,} steps", card), name


def test_the_bundled_model_is_small_and_of_the_original_layout():
    assert sum(path.stat().st_size for path in MODEL.iterdir()) < 20e6
    with safe_open(MODEL / "model.safetensors", "np") as file:
        names = list(file.keys())
        assert {file.get_slice(name).get_dtype() for name in names} == {"BF16"}
    assert "language_model.model.layers.0.self_attn.q_proj.weight" in names  # as in InternVL2-1B


def _measured():
    """The accuracies in percent by task: pairs (heldout, unseen), an empty cell is None."""
    lines = (RESULTS / "accuracy.md").read_text(encoding="utf-8").splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {task: [float(cell.split("%")[0]) if cell else None for cell in cells] for task, *cells in rows}


def test_the_bundled_model_can_what_a_demo_model_must():
    measured = _measured()
    least = dict.fromkeys(("color", "shape", "yes/no", "place", "direction"), 95) | {"count": 90, "overall": 88}
    least |= dict.fromkeys(("box", "word", "number"), 80)
    assert {task: measured[task][0] for task in least if measured[task][0] < least[task]} == {}
    heldout, unseen = measured["overall"]
    assert heldout - unseen <= 10


def test_the_bundled_model_answers_as_its_card_says(tmp_path):
    """Scenes that are neither in training nor in the table; so few that some points are chance."""
    metas = [data.write_part(tmp_path, name, 0.1, seed=1, processes=1) for name in ("heldout", "unseen")]
    tables, _ = evaluate.evaluate(str(MODEL), metas)
    for table, overall, least, chance in zip(tables, _measured()["overall"], (200, 100), (5, 8)):
        right, asked = map(sum, zip(*table.values()))
        assert asked > least
        assert abs(100 * right / asked - overall) < chance


@pytest.mark.slow
def test_the_recipe_runs_from_nothing_to_a_table_and_can_be_given_again(tmp_path):
    command = [sys.executable, "-m", "paddlemix.examples.internvl2.demo_model.train"]
    command += ["--output_dir", str(tmp_path), "--scale", "0.002"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "| overall |" in result.stdout
    assert (tmp_path / "loss.png").stat().st_size > 1000
    weights = (tmp_path / "stage2" / "model.safetensors").read_bytes()
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0 and again.stdout.splitlines()[-1] == result.stdout.splitlines()[-1]
    assert (tmp_path / "stage2" / "model.safetensors").read_bytes() == weights
