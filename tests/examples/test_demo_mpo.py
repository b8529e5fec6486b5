"""The wrong habit that preference training takes away: its scenes and its measures; the run itself is marked slow."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from paddlemix.datasets.preference import parse_preference
from paddlemix.datasets.records import read_meta
from paddlemix.examples.internvl2 import cli
from paddlemix.examples.internvl2.demo_model.scenes import COLORS
from paddlemix.examples.internvl2.demo_mpo import run, scenes


@pytest.fixture(scope="module")
def metas(tmp_path_factory):
    return scenes.write_data(tmp_path_factory.mktemp("data"), scale=0.03)


def test_pairs_are_the_right_color_against_the_habit(metas):
    assert set(scenes.WRONG) == set(scenes.WRONG.values()) == set(COLORS)
    assert all(color != wrong for color, wrong in scenes.WRONG.items())
    (habit,), (pairs,) = read_meta(metas["habit"]), read_meta(metas["pairs"], parse_preference)
    for index in range(len(pairs)):
        record = pairs.read(index)
        assert scenes.WRONG[record.conversations[-1]["value"]] == record.rejected
    for index in range(len(habit)):
        turns = [turn["value"] for turn in habit.read(index).conversations]
        said = [answer for question, answer in zip(turns[::2], turns[1::2]) if re.search("colou?r is the", question)]
        assert len(said) == 1 and said[0] in COLORS


def test_the_demo_model_has_no_such_habit_yet(metas):
    assert run.accuracy(str(cli.DEMO_MODEL), metas["heldout"], "cpu")[0] > 0.8
    assert run.margin(str(cli.DEMO_MODEL), metas["heldout_pairs"], "cpu", batch=3) > 1


def test_margin_does_not_depend_on_batches_and_turns_with_the_pairs(metas, tmp_path):
    (source,) = read_meta(metas["heldout_pairs"], parse_preference)
    rows = [json.loads(line) for line in Path(source.annotation).read_text(encoding="utf-8").splitlines()]
    for row in rows:
        row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    (tmp_path / "turned.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    entry = {"turned": {"root": source.root, "annotation": str(tmp_path / "turned.jsonl")}}
    (tmp_path / "turned.json").write_text(json.dumps(entry))
    found = [run.margin(str(cli.DEMO_MODEL), metas["heldout_pairs"], "cpu", batch) for batch in (2, 40)]
    assert found[0] == pytest.approx(found[1], rel=1e-3)
    assert run.margin(str(cli.DEMO_MODEL), tmp_path / "turned.json", "cpu") == pytest.approx(-found[1], rel=1e-3)


@pytest.mark.slow
def test_the_habit_goes(tmp_path):
    command = [sys.executable, run.__file__, "--output_dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr[-2000:]
    pattern = r"colors before: ([\d.]+)%, after: ([\d.]+)%; margin before: ([-+\d.]+), after: ([-+\d.]+)"
    before, after, margin_before, margin_after = map(float, re.search(pattern, done.stdout).groups())
    assert before < 30 and after > before + 30  # which of the colors come back depends on rounding
    assert margin_before < 0 < margin_after
    assert (tmp_path / "rewards.png").stat().st_size > 10_000
