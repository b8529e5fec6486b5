"""The checker: what it reads, counts and says."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from paddlemix.datasets.internvl2 import check
from tests.conftest import REFERENCE
from tests.datasets.helpers import make_dataset, picture_record, talk, write_meta

CHECKPOINT = str(REFERENCE / "qwen2" / "checkpoint")


def run(meta, output, *flags):
    """(exit code, folder of the report)."""
    try:
        check.main([str(meta), "--model_name_or_path", CHECKPOINT, "--output", str(output), "--workers", "1", *flags])
    except SystemExit as done:
        return done.code
    return 0


def good_records():
    two = {"image": ["img0.png", "img3.png"], "conversations": talk("<image><image>\nCompare.")}
    return [picture_record(), {"conversations": talk()}, two]


def test_counts_and_lengths_are_those_of_the_samples(tmp_path, capsys):
    meta = write_meta(tmp_path, good_records(), repeat_time=2, length=17)
    assert run(meta, tmp_path / "report", "--max_dynamic_patch", "6") == 0
    report = json.loads((tmp_path / "report" / "report.json").read_text())["set"]
    samples = [make_dataset(tmp_path, good_records())[i] for i in range(3)]
    tokens, tiles = ([len(s[key]) for s in samples] for key in ("input_ids", "image_flags"))
    assert report["records"] == 3 and report["samples_per_epoch"] == 6 and report["stated_length"] == 17
    assert [report[kind] for kind in ("picture", "pictures", "video", "text")] == [1, 1, 0, 1]
    assert (report["tokens"]["sum"], report["tokens"]["max"]) == (sum(tokens), max(tokens))
    assert (report["tiles"]["sum"], report["tiles"]["max"]) == (sum(tiles), max(tiles))
    assert report["bad"] == report["cut_to_max_seq_length"] == 0
    assert (tmp_path / "report" / "problems.jsonl").read_text() == ""
    out = capsys.readouterr().out
    assert "template Hermes-2, tiles of 112 pixels and 16 tokens, at most 6 a sample" in out
    assert "0 of 3 records cannot be used" in out and "states length 17 for 'set'" in out


def test_the_report_has_a_picture(tmp_path):
    run(write_meta(tmp_path, good_records()), tmp_path / "report")
    with Image.open(tmp_path / "report" / "lengths.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert picture.format == "PNG" and min(pixels.shape[:2]) > 300 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 10


def test_every_kind_of_problem_is_one_line(tmp_path, capsys):
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    (tmp_path / "half.png").write_bytes((REFERENCE / "images" / "img0.png").read_bytes()[:5000])
    long_prompt = {"conversations": talk("word " * 500)}
    bad = [
        ('{"conversations": [}', "is not valid JSON"),
        (picture_record(9), "does not exist"),
        ({"image": str(tmp_path / "half.png"), "conversations": talk()}, "damaged or cut off"),
        ({"conversations": talk("<image>\nq")}, "has 1 <image> mark(s) but 0 picture(s)"),
        ({"image": ["img0.png"] * 2, "conversations": talk("<image>")}, "has 1 <image> mark(s) but 2 picture(s)"),
        ({"conversations": talk(answer="")}, "has no answer to learn"),
        (long_prompt, "has no token of an answer within max_seq_length (400)"),
        ({"image": ["img0.png"] * 30, "conversations": talk("<image>" * 30)}, "but max_seq_length is 400"),
        ({"video": str(tmp_path / "broken.mp4"), "conversations": talk()}, "broken.mp4' cannot be read as a video"),
        ({"conversations": [*talk(), *talk()[1:]]}, "is from 'gpt' where 'human' should speak"),
    ]
    good = {"conversations": talk(answer="word " * 500)}
    meta = write_meta(tmp_path, [good, *(record for record, _ in bad)])
    assert run(meta, tmp_path / "report", "--max_seq_length", "400") == 1
    problems = [json.loads(line) for line in (tmp_path / "report" / "problems.jsonl").read_text().splitlines()]
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith(str(tmp_path / "set.jsonl:"))]
    assert len(problems) == len(printed) == len(bad)
    for number, (problem, line, (_, reason)) in enumerate(zip(problems, printed, bad), start=2):
        assert problem["line"] == number and line == f"{tmp_path / 'set.jsonl'}:{number}: {problem['reason']}"
        assert reason in problem["reason"]
    report = json.loads((tmp_path / "report" / "report.json").read_text())["set"]
    assert report["bad"] == len(bad) and report["cut_to_max_seq_length"] == 1 and report["tokens"]["max"] > 500


def test_videos_are_read_with_as_many_frames_as_allowed(tmp_path):
    frames = [Image.new("L", (16, 16), 5 * i) for i in range(20)]
    frames[0].save(tmp_path / "v.gif", save_all=True, append_images=frames[1:], duration=100)
    meta = write_meta(tmp_path, [{"video": "v.gif", "conversations": talk()}], root=str(tmp_path))
    assert run(meta, tmp_path / "report", "--max_num_frame", "12") == 0
    report = json.loads((tmp_path / "report" / "report.json").read_text())["set"]
    assert report["video"] == 1 and report["tiles"]["max"] == 12


def test_many_problems_are_capped_with_a_total(tmp_path, capsys):
    meta = write_meta(tmp_path, [picture_record(9)] * 30 + good_records())
    assert run(meta, tmp_path / "report", "--max_problems", "4") == 1
    out = capsys.readouterr().out
    assert out.count("does not exist") == 4 and "... and 26 more in" in out and "30 of 33 records cannot be used" in out
    assert len((tmp_path / "report" / "problems.jsonl").read_text().splitlines()) == 30


def test_training_options_count(tmp_path):
    meta = write_meta(tmp_path, [picture_record()])
    for flags, tiles in (
        (["--max_dynamic_patch", "2"], 3),
        (["--max_dynamic_patch", "2", "--use_thumbnail", "False"], 2),
        (["--dynamic_image_size", "False"], 1),
    ):
        assert run(meta, tmp_path / "report", *flags) == 0
        assert json.loads((tmp_path / "report" / "report.json").read_text())["set"]["tiles"]["max"] == tiles
    assert run(meta, tmp_path / "report", "--num_images_expected", "3") == 1


def test_command_with_several_processes(tmp_path):
    meta = write_meta(tmp_path, [*good_records(), "{"] * 5)
    command = [sys.executable, "-m", "paddlemix.datasets.internvl2.check", str(meta), "--output", str(tmp_path / "report")]
    done = subprocess.run([*command, "--workers", "2"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    assert [int(line.split(":")[1]) for line in done.stdout.splitlines() if "valid JSON" in line] == [4, 8, 12, 16, 20]
    assert "20/20" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["missing.json"], "error: meta file missing.json cannot be read"),
        (["{meta}", "--model_name_or_path", "/nowhere/model"], "error: .*/nowhere/model"),
        (["{meta}", "--conv_style", "vicuna"], "error: conversation template 'vicuna' is not known"),
        (["{meta}", "--min_dynamic_patch", "9", "--max_dynamic_patch", "3"], "error: min_dynamic_patch .9."),
    ],
)
def test_wrong_arguments_are_one_sentence(tmp_path, capsys, arguments, message):
    meta = write_meta(tmp_path, good_records())
    with pytest.raises(SystemExit) as done:
        check.main([argument.format(meta=meta) for argument in arguments])
    assert done.value.code == 1
    err = capsys.readouterr().err.strip()
    assert len(err.splitlines()) == 1
    with pytest.raises(ValueError, match=message):
        raise ValueError(err)
