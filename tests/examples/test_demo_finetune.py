"""The fine-tune that can be seen to work: its pictures, its measure and its curve; the run itself is marked slow."""

import json
import random
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from paddlemix.datasets.records import read_meta
from paddlemix.examples.internvl2 import cli
from paddlemix.examples.internvl2.demo_finetune import run, signs
from paddlemix.examples.internvl2.demo_training import draw_losses
from paddlemix.models.internvl2 import InternVLChatModel, load_tokenizer
from paddlemix.processors.image import load_image


def test_the_same_seed_draws_the_same_pictures(tmp_path):
    for name in ("once", "again"):
        signs.write_data(tmp_path / name, train=16, heldout=8)
    files = sorted(path.relative_to(tmp_path / "once") for path in (tmp_path / "once").rglob("*.*") if path.suffix != ".json")
    assert len(files) == 16 + 8 + 2
    assert all((tmp_path / "once" / f).read_bytes() == (tmp_path / "again" / f).read_bytes() for f in files)


def test_both_parts_have_every_sign_alike_and_no_picture_in_common(tmp_path):
    signs.write_data(tmp_path, train=24, heldout=16)
    pictures = {}
    for name, each in (("train", 3), ("heldout", 2)):
        (source,) = read_meta(str(tmp_path / f"{name}.json"))
        records = [source.read(i) for i in range(len(source))]
        answers = [record.conversations[1]["value"] for record in records]
        assert sorted(answers) == sorted(list(signs.SIGNS) * each)
        pictures[name] = {Image.open(record.images[0]).tobytes() for record in records}
        assert len(pictures[name]) == len(records)
    assert not pictures["train"] & pictures["heldout"]


def test_signs_stay_inside_the_picture():
    rng = random.Random(5)
    for meaning in signs.SIGNS:
        for _ in range(20):
            picture = np.asarray(signs.draw(meaning, rng)).astype(int)
            ground = picture[0, 0]
            away = (np.abs(picture - ground).max(-1) > 12).mean()
            assert 0.05 < away < 0.75, meaning


def test_the_demo_model_cannot_do_it_yet(tmp_path):
    signs.write_data(tmp_path, train=8, heldout=24)
    assert run.accuracy(str(cli.DEMO_MODEL), tmp_path / "heldout.json") < 0.3


def test_accuracy_counts_exact_answers(tmp_path):
    """Half of the records ask for what the model says anyway."""
    signs.write_data(tmp_path, train=8, heldout=8)
    rows = [json.loads(line) for line in (tmp_path / "heldout.jsonl").read_text().splitlines()]
    model = InternVLChatModel.from_pretrained(str(cli.DEMO_MODEL))
    tokenizer = load_tokenizer(str(cli.DEMO_MODEL))
    for row in rows[:4]:
        pixels = load_image(str(tmp_path / "heldout" / row["image"]), input_size=model.config.image_size, max_num=1)
        question = f"<image>\n{signs.QUESTION}"
        row["conversations"][1]["value"] = model.chat(tokenizer, pixels, question, dict(max_new_tokens=16))
    (tmp_path / "heldout.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    assert run.accuracy(str(cli.DEMO_MODEL), tmp_path / "heldout.json", batch=3) == 0.5


@pytest.mark.parametrize("number, code, said", [(signal.SIGTERM, 143, ""), (signal.SIGINT, 130, "interrupted\n")])
def test_what_it_started_ends_with_it(tmp_path, number, code, said):
    """A program that is stopped stops its training, waits, so that this can save a checkpoint, and starts nothing more."""
    training = f"""
import pathlib, signal, sys, time
folder = pathlib.Path({str(tmp_path)!r})
signal.signal(signal.SIGTERM, lambda *_: sys.exit((folder / "saved").touch()))
(folder / "started").touch()
time.sleep(60)
"""
    program = """
import signal, sys
from paddlemix.errors import command_main
from paddlemix.examples.internvl2.demo_training import run_training
signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a terminal; what a script starts with & ignores it
command_main(run_training)(sys.argv[1:])
print("next")
"""
    command = [sys.executable, "-c", program, sys.executable, "-c", training]
    program = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 30
    while not (tmp_path / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    program.send_signal(number)
    assert program.communicate(timeout=30) == ("", said)
    assert program.returncode == code
    assert (tmp_path / "saved").exists()


def test_curve_is_a_picture_of_the_losses(tmp_path):
    log = tmp_path / "train_log.jsonl"
    log.write_text("\n".join(json.dumps({"step": i, "loss": 2 / i}) for i in range(1, 50)) + '\n{"eval_loss": 1.0}\n')
    draw_losses([log], tmp_path / "loss.png", "title")
    first = Image.open(tmp_path / "loss.png")
    assert first.width > 500
    log.write_text("\n".join(json.dumps({"step": i, "loss": 2.0}) for i in range(1, 50)) + "\n")
    draw_losses([log], tmp_path / "flat.png", "title")
    assert first.tobytes() != Image.open(tmp_path / "flat.png").tobytes()


@pytest.mark.slow
def test_it_learns(tmp_path):
    command = [sys.executable, run.__file__, "--output_dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-2000:]
    before, after = map(float, re.search(r"before: ([\d.]+)%, after: ([\d.]+)%", done.stdout).groups())
    assert before < 30 and after > 90
    assert (tmp_path / "loss.png").stat().st_size > 10_000


@pytest.mark.slow
def test_it_learns_the_same_in_bfloat16(tmp_path):
    """Losses of one pass, 50 steps, and what is got right after it, beside float32."""
    found = {}
    for name, flags in {"float32": [], "bfloat16": ["--bf16", "True"]}.items():
        command = [sys.executable, run.__file__, "--output_dir", str(tmp_path / name), "--epochs", "1", "--logging_steps", "1"]
        command += flags
        done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
        assert done.returncode == 0, done.stderr[-2000:]
        rows = [json.loads(line) for line in (tmp_path / name / "model" / "train_log.jsonl").read_text().splitlines()]
        found[name] = (
            np.array([row["loss"] for row in rows if "loss" in row]),
            float(re.search(r"after: ([\d.]+)%", done.stdout)[1]),
        )
    (plain, right), (rounded, right_rounded) = found.values()
    assert len(plain) == len(rounded) == 50 and not np.array_equal(plain, rounded)
    assert abs(rounded.mean() / plain.mean() - 1) < 0.02
    assert abs(right - right_rounded) <= 1  # two pictures of 200
