"""Meta files and records: what is read, and what is said of those that are wrong."""

import json
import os

import numpy as np
import pytest
from PIL import Image

from paddlemix.datasets.internvl2 import read_meta
from paddlemix.datasets.records import parse_record, picture_size
from paddlemix.errors import DataError
from tests.datasets.helpers import IMAGES, picture_record, talk, write_meta


def parse(record):
    return parse_record(record if isinstance(record, bytes) else json.dumps(record).encode(), "root")


def test_records_are_read_in_order_with_their_line_numbers(tmp_path):
    meta = write_meta(tmp_path, [{"conversations": talk(f"question {i}")} for i in range(5)])
    annotation = tmp_path / "set.jsonl"
    lines = annotation.read_text().splitlines()
    annotation.write_bytes("\ufeff".encode() + ("\r\n".join([lines[0], "", "  ", *lines[1:]])).encode())  # BOM, CRLF, blanks
    (source,) = read_meta(meta)
    assert [source.line(i) for i in range(len(source))] == [1, 4, 5, 6, 7]
    assert [source.read(i).conversations[0]["value"] for i in range(5)] == [f"question {i}" for i in range(5)]
    assert source.place(1) == f"{annotation}:4"


@pytest.mark.parametrize("repeat, expected", [(0.5, [0, 1]), (1, [0, 1, 2, 3]), (1.0, [0, 1, 2, 3]), (3, [0, 1, 2, 3] * 3)])
def test_repeat_time(tmp_path, repeat, expected):
    (source,) = read_meta(write_meta(tmp_path, [{"conversations": talk(str(i))} for i in range(4)], repeat_time=repeat))
    assert [int(source.read(i).conversations[0]["value"]) for i in range(len(source))] == expected


def test_all_forms_of_a_record():
    record = parse({"image": "a/b.png", "width": 30, "height": 20, "length": 99, "conversations": talk("<image>\nq"), "id": 7})
    assert record.images == (os.path.join("root", "a/b.png"),)
    assert record.sizes == ((30, 20),) and record.length == 99 and record.video is None
    several = {"image": ["a.png", "/b.png"], "width_list": [1, 2], "height_list": [3, 4]}
    record = parse({**several, "conversations": talk("<image><image>")})
    assert record.images == (os.path.join("root", "a.png"), "/b.png") and record.sizes == ((1, 3), (2, 4))
    record = parse({"video": "v.mp4", "clip": [1, 2.5], "conversations": talk("<video>\nq")})
    assert record.video == os.path.join("root", "v.mp4") and record.clip == (1, 2.5)
    for nothing in ({}, {"image": None}, {"image": ""}, {"image": []}, {"video": None}, {"video": ""}):
        record = parse({**nothing, "conversations": [{"from": "system", "value": "s"}, *talk()]})
        assert record.images == () and record.video is None
    assert parse({"conversations": talk("\U0001f600")}).conversations[0]["value"] == "\U0001f600"  # escaped as a pair
    # Sizes that do not fit the pictures only save time elsewhere, so they are passed over.
    assert parse({"image": "a.png", "width": [1, 2], "height": [1, 2], "conversations": talk()}).sizes is None
    assert parse({"image": "a.png", "width": "1", "height": 2, "conversations": talk()}).sizes is None


@pytest.mark.parametrize(
    "record, message",
    [
        (b'{"conversations": [', r"not valid JSON \(.* at column \d+\)"),
        (b'[{"conversations": []}]', "where a record, a JSON object, should be"),
        (b'"text"', "where a record, a JSON object, should be"),
        (b'{"a": "\xff\xfe"}', "not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"image": "s3://\\uD83D", "conversations": []}', "half a surrogate pair"),
        ({}, "needs 'conversations'"),
        ({"conversations": []}, "needs 'conversations'"),
        ({"conversations": "q"}, "needs 'conversations'"),
        ({"conversations": [{"role": "user", "content": "q"}]}, "turn 1 must have 'from'"),
        ({"conversations": [{"from": "user", "value": "q"}]}, "turn 1 must have 'from'"),
        ({"conversations": [*talk(), {"from": "human", "value": 3}]}, "turn 3 must have 'from'"),
        ({"conversations": talk("a <IMG_CONTEXT> b")}, "turn 1 contains the reserved token <IMG_CONTEXT>"),
        ({"conversations": talk(answer="a <IMG_CONTEXT> b")}, "turn 2 contains the reserved token <IMG_CONTEXT>"),
        ({"conversations": talk()[:1]}, "no answer to learn"),
        ({"conversations": talk(answer=" \n")}, "no answer to learn"),
        ({"conversations": talk("<image>\nq")}, r"has 1 <image> mark\(s\) but 0 picture"),
        ({"image": "a.png", "conversations": talk("<image><image>")}, r"has 2 <image> mark\(s\) but 1 picture"),
        ({"image": ["a.png", "b.png"], "conversations": talk()}, r"has 0 <image> mark\(s\) but 2 picture"),
        ({"image": ["a.png", "b.png"], "conversations": talk("<image>")}, r"has 1 <image> mark\(s\) but 2 picture"),
        ({"image": 3, "conversations": talk()}, "'image' must be a path"),
        ({"image": {"path": "a.png"}, "conversations": talk()}, "'image' must be a path"),
        ({"image": ["a.png", ""], "conversations": talk()}, "'image' must be a path"),
        ({"video": ["a.mp4", "b.mp4"], "conversations": talk()}, "'video' must be one path"),
        ({"image": "a.png", "video": "a.mp4", "conversations": talk()}, "both 'image' and 'video'"),
        ({"video": "a.mp4", "conversations": talk("<image>\nq")}, "mark the place of the video with <video>"),
        ({"video": "a.mp4", "conversations": talk("<video><video>")}, "<video> more than once"),
        ({"video": "a.mp4", "clip": [5, 2], "conversations": talk()}, "'clip' must be"),
        ({"video": "a.mp4", "clip": "0-5", "conversations": talk()}, "'clip' must be"),
    ],
)
def test_records_that_cannot_be_used_say_why(record, message):
    with pytest.raises(DataError, match=message):
        parse(record)


@pytest.mark.parametrize(
    "entry, message",
    [
        ({"augment": True}, r"data set 'set' of meta file .* unknown key 'augment': the keys are root, annotation"),
        ({"annotation": "a.json"}, "'annotation' that ends in .jsonl"),
        ({"annotation": "/nowhere/a.jsonl"}, "annotation file /nowhere/a.jsonl cannot be read"),
        ({"root": 3}, "'root' must be the path"),
        ({"data_augment": "yes"}, "'data_augment' must be true or false"),
        ({"repeat_time": 0}, "'repeat_time' must be"),
        ({"repeat_time": -1}, "'repeat_time' must be"),
        ({"repeat_time": 1.5}, "'repeat_time' must be"),
        ({"repeat_time": float("nan")}, "'repeat_time' must be"),
        ({"repeat_time": "2"}, "'repeat_time' must be"),
        ({"repeat_time": 0.1}, "repeat_time 0.1 leaves none"),
        ({"max_dynamic_patch": 0}, "'max_dynamic_patch' must be"),
    ],
)
def test_meta_entries_that_are_wrong_say_why(tmp_path, entry, message):
    with pytest.raises(DataError, match=message):
        read_meta(write_meta(tmp_path, [picture_record()] * 4, **entry))


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "not valid JSON"),
        ("[]", "at least one data set"),
        ("{}", "at least one data set"),
        ('{"a": "a.jsonl"}', "must be an object with 'root' and 'annotation'"),
        ('{"a": {"annotation": "x.jsonl"}, "a": {"annotation": "y.jsonl"}}', "has 'a' twice"),
        (None, "cannot be read"),
    ],
)
def test_meta_files_that_are_wrong_say_why(tmp_path, content, message):
    path = tmp_path / "meta.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=message):
        read_meta(path)


def test_empty_annotation(tmp_path):
    meta = write_meta(tmp_path, [])
    with pytest.raises(DataError, match="too few records: add some"):
        read_meta(meta)


def test_relative_paths_start_at_the_working_directory_and_then_at_the_meta_file(tmp_path, monkeypatch):
    for folder in ("work", "meta"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "work")
    write_meta(tmp_path / "meta", [picture_record()], annotation="set.jsonl", root="pictures")
    (tmp_path / "meta" / "pictures").mkdir()
    (source,) = read_meta("../meta/set.json")
    assert os.path.samefile(source.annotation, tmp_path / "meta" / "set.jsonl")
    assert os.path.samefile(source.root, tmp_path / "meta" / "pictures")
    (tmp_path / "work" / "set.jsonl").write_text(json.dumps({"conversations": talk("other")}))
    (source,) = read_meta("../meta/set.json")
    assert source.read(0).conversations[0]["value"] == "other"


def test_picture_sizes_come_from_headers(tmp_path):
    assert [picture_size(IMAGES / f"img{i}.png") for i in range(2)] == [(640, 427), (333, 500)]
    noise = np.random.default_rng(0).integers(0, 255, (200, 300, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.jpg")
    (tmp_path / "half.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:2000])
    assert picture_size(tmp_path / "half.jpg") == (300, 200)
    (tmp_path / "none.jpg").write_bytes(b"no picture")
    assert picture_size(tmp_path / "none.jpg") is None and picture_size("missing.png") is None


def test_shipped_meta_files_have_the_keys_that_are_read():
    """Their data are not here, so reading stops at the first annotation, not at a key."""
    import paddlemix.examples.internvl2

    folder = os.path.join(os.path.dirname(paddlemix.examples.internvl2.__file__), "shell", "data")
    files = [name for name in os.listdir(folder) if name.endswith(".json")] if os.path.isdir(folder) else []
    if not files:
        pytest.skip("no meta files are shipped")
    for name in files:
        with pytest.raises(DataError, match=r"annotation file playground/\S+\.jsonl cannot be read"):
            read_meta(os.path.join(folder, name))
