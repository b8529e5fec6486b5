"""The demo of LLaVA's two stages: its scenes say what they show; the run itself is marked slow."""

import json
import random
import re
import subprocess
import sys

import pytest
from PIL import Image

from paddlemix.datasets.internvl_llava import read_sources
from paddlemix.datasets.internvl_llava.check import problems
from paddlemix.examples.internvl_llava.demo import run, scenes


@pytest.mark.parametrize("part, version", [("texts", "v1"), ("captions", "plain"), ("talk", "v1"), ("heldout", "v1")])
def test_the_checker_finds_nothing_wrong_and_the_same_seed_draws_the_same(part, version, tmp_path):
    path, folder = scenes.write_part(tmp_path / "once", part, 12)
    assert list(problems(read_sources(str(path), str(folder)), version)) == []
    again, other = scenes.write_part(tmp_path / "again", part, 12)
    assert again.read_bytes() == path.read_bytes()
    pictures = sorted(folder.iterdir())
    assert len(pictures) == (0 if part == "texts" else 12)
    assert [p.read_bytes() for p in sorted(other.iterdir())] == [p.read_bytes() for p in pictures]


def test_answers_follow_from_the_description():
    for number in range(40):
        rng = random.Random(number)
        items = scenes.draw(rng)
        shown = re.findall(r"an? (\w+) (\w+) (?:at|in) the ([a-z ]+?)(?= and |$)", scenes.describe(items))
        assert len(shown) == len(items)
        for question, answer in scenes.ask(items, rng):
            words = question.rstrip("?").split()
            if question.startswith("What color"):
                found = [color for color, shape, _ in shown if shape == words[-1]]
            elif question.startswith("What shape"):
                found = [shape for color, shape, _ in shown if color == words[-1]]
            elif question.startswith("Where"):
                found = [place for color, shape, place in shown if [color, shape] == words[-2:]]
            else:
                found = [str(len(shown))]
            assert found == [answer]


def test_parts_have_no_picture_in_common(tmp_path):
    pictures = {}
    for part in ("captions", "talk", "heldout"):
        _, folder = scenes.write_part(tmp_path, part, 60)
        pictures[part] = {Image.open(path).tobytes() for path in folder.iterdir()}
    assert not pictures["heldout"] & (pictures["captions"] | pictures["talk"])


@pytest.mark.slow
def test_it_learns(tmp_path):
    command = [sys.executable, run.__file__, "--output_dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr[-2000:]
    before, after = map(float, re.search(r"before: ([\d.]+)%, after: ([\d.]+)%", done.stdout).groups())
    assert before < 40 and after > 80
    assert (tmp_path / "loss.png").stat().st_size > 10_000
    assert {path.name for path in (tmp_path / "pretrain").glob("*.bin")} == {"mm_projector.bin"}
    values = json.loads((tmp_path / "finetune" / "config.json").read_text(encoding="utf-8"))
    assert values["mm_image_size"] == scenes.SIDE and values["architectures"] == ["LlavaLlamaForCausalLM"]
