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


def box(*numbers):
    """A box as answers have it."""
    return f"<box>[{list(numbers)}]</box>"


def boxed(answer, number=1, **more):
    """A record about a reference picture of 640 by 480 pixels at most, whose answer is unique by its number."""
    return {"image": f"img{number}.png", "conversations": talk("<image>\nWhere?", answer), **more}


def warnings_of(tmp_path, records, capsys):
    """(warnings of the report, lines that begin with `warning:`, exit code)."""
    code = run(write_meta(tmp_path, records), tmp_path / "report")
    report = json.loads((tmp_path / "report" / "report.json").read_text())["set"]
    return report, [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning:")], code


@pytest.mark.parametrize(
    "kind, answers, count, example",
    [
        ("box_outside", [box(5, 5, 1001, 20), box(-1, 0, 5, 5), box(0, 0, 1000, 1000)], 2, "1001"),
        ("box_fractions", [box(0.1, 0.2, 0.5, 0.75), box(1, 1, 2, 2), '[{"bbox_2d": [0, 0, 1, 0.5]}]'], 2, "0.75"),
        ("box_order", [box(500, 1, 400, 9), "<box>[[1, 9, 5, 3], [1, 1, 2, 2]]</box>", "none"], 2, "[500, 1, 400, 9]"),
        (
            "mark_not_closed",
            ["<ref>a dog</ref><box>[[1, 2, 3, 4]]", f"<ref>a cat{box(1, 2, 3, 4)}", "<ref>x</ref>"],
            2,
            "a dog",
        ),
        ("box_form", ["<box>here</box>", box(1, 2, 3, 4), "there"], 1, "here"),
    ],
)
def test_doubtful_boxes_are_counted_with_examples(tmp_path, capsys, kind, answers, count, example):
    report, lines, code = warnings_of(tmp_path, [boxed(answer) for answer in answers], capsys)
    assert code == 0  # training takes them
    assert report["warnings"].keys() == {kind} and report["warnings"][kind]["count"] == count
    (line,) = lines
    assert line.startswith(f"warning: data set 'set': {count} ") and example in line and "line 1: " in line


def test_no_more_than_three_examples_and_lines_that_are_right(tmp_path, capsys):
    records = [{"conversations": talk(answer=f"<box>[[{i}, 0, 1500, 9]]</box>")} for i in range(5)]
    report, (line,), _ = warnings_of(tmp_path, [{"conversations": talk()}, *records], capsys)
    assert report["warnings"]["box_outside"]["count"] == 5
    assert [example["line"] for example in report["warnings"]["box_outside"]["examples"]] == [2, 3, 4]
    assert line.count("1500") == 3


def test_boxes_in_pixels_are_told_apart_from_those_outside(tmp_path, capsys):
    Image.new("RGB", (2000, 1500)).save(tmp_path / "large.png")
    large = {"image": str(tmp_path / "large.png")}
    records = [
        boxed("<box>[[10, 20, 1900, 1400]]</box>") | large,  # fits in pixels
        boxed("<box>[[10, 20, 2100, 1400]]</box>") | large,  # fits in nothing
    ]
    report, _, _ = warnings_of(tmp_path, records, capsys)
    assert {kind: entry["count"] for kind, entry in report["warnings"].items()} == {"box_pixels": 1, "box_outside": 1}
    Image.new("RGB", (320, 240)).save(tmp_path / "small.png")
    small = {"image": str(tmp_path / "small.png")}
    pixels = [boxed(f"<box>[[{i}, {i}, {i + 200}, {i + 100}]]</box>") | small for i in range(100, 120)]
    report, _, _ = warnings_of(tmp_path, pixels, capsys)
    assert report["warnings"]["box_pixels"]["count"] == 20
    report, _, _ = warnings_of(tmp_path, [*pixels, boxed("<box>[[700, 700, 900, 900]]</box>") | small], capsys)
    assert not report["warnings"]  # one that is surely in thousandths


def test_pictures_that_are_missing_again_are_named_once(tmp_path, capsys):
    records = [boxed(f"answer {i}", number) for i, number in enumerate((91, 92, 91, 1, 91))]
    report, lines, code = warnings_of(tmp_path, records, capsys)
    assert code == 1 and report["bad"] == 4
    assert report["warnings"]["missing_again"]["count"] == 1
    assert "img91.png in 3 records" in lines[0] and "img92" not in lines[0]


def test_records_that_repeat_and_answers_that_are_equal(tmp_path, capsys):
    report, lines, _ = warnings_of(tmp_path, [boxed("a"), boxed("b"), boxed("a", id=7), boxed("a", 2)], capsys)
    assert report["warnings"].keys() == {"duplicates"} and report["warnings"]["duplicates"]["count"] == 1
    assert "line 3: equals line 1" in lines[0]
    report, lines, _ = warnings_of(tmp_path, [boxed("yes", number) for number in range(4)], capsys)
    assert report["warnings"].keys() == {"equal_answers"} and "4 answers, all of them equal" in lines[0]
    report, _, _ = warnings_of(tmp_path, [boxed("yes")], capsys)
    assert not report["warnings"]


def test_turned_and_transparent_pictures_are_counted(tmp_path, capsys):
    exif = Image.Exif()
    for name, orientation in (("turned.jpg", 6), ("upright.jpg", 1)):
        exif[0x0112] = orientation
        Image.new("RGB", (20, 30), "red").save(tmp_path / name, exif=exif)
    clear = Image.new("RGBA", (8, 8), "red")
    clear.save(tmp_path / "opaque.png")
    clear.putpixel((3, 3), (0, 0, 0, 10))
    clear.save(tmp_path / "clear.png")
    names = ["turned.jpg", "upright.jpg", "opaque.png", "clear.png"]
    meta = write_meta(tmp_path, [{"image": name, "conversations": talk(answer=name)} for name in names], root=str(tmp_path))
    assert run(meta, tmp_path / "report") == 0
    report = json.loads((tmp_path / "report" / "report.json").read_text())["set"]
    assert (report["turned"], report["transparent"]) == (1, 1)
    assert "1 picture(s) that EXIF data turn and 1 with transparency" in capsys.readouterr().out


def test_pairs_that_are_equal_empty_or_too_long_are_named(tmp_path, capsys):
    """And the lengths of the others are those of their answers, also in a picture."""
    question = {"question": "Which?"}
    rows = [
        {**question, "chosen": "yes", "rejected": "no"},
        {**question, "chosen": "same", "rejected": "same"},
        {**question, "chosen": " ", "rejected": "no"},
        {"question": "long " * 300, "chosen": "a", "rejected": "b"},
        {**question, "chosen": "yes", "rejected": "no " * 200},
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "meta.json").write_text(json.dumps({"pairs": {"annotation": str(tmp_path / "pairs.jsonl")}}))
    given = [
        str(tmp_path / "meta.json"),
        "--pairs",
        "--output",
        str(tmp_path / "out"),
        "--workers",
        "1",
        "--max_seq_length",
        "120",
    ]
    with pytest.raises(SystemExit):
        check.main(given)
    told = capsys.readouterr().out
    for line, reason in ((2, "two equal answers"), (3, "no text as 'chosen'"), (4, "no token of an answer within")):
        assert f"pairs.jsonl:{line}: " in told and reason in told
    report = json.loads((tmp_path / "out/report.json").read_text())["pairs"]
    assert (report["records"], report["bad"], report["cut_to_max_seq_length"]) == (5, 3, 1)
    assert report["answer_tokens"]["chosen"] < report["answer_tokens"]["rejected"]
    with Image.open(tmp_path / "out/answers.png") as picture:
        assert picture.size == (1200, 480)
