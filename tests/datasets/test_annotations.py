"""The forms of annotations, and features that are kept on disk."""

import json

import numpy as np
import pytest

from paddlemix.datasets.annotations import read_captions, read_classes
from paddlemix.errors import DataError
from paddlemix.evaluation.features import compute_features, open_features
from paddlemix.training.processes import Processes

EXPECTED = (["root/a.jpg", "root/b.jpg"], ["one, two", "three", "four"], [0, 0, 1])

FORMS = {
    "karpathy.txt": "image,caption\na.jpg,one, two\na.jpg,three\nb.jpg,four\n",
    "quoted.csv": '\ufeffimage,caption\na.jpg,"one, two"\na.jpg,three\nb.jpg,"four"\n',
    "cn.txt": "a.jpg#0\tone, two\na.jpg#1\tthree\nb.jpg#enc#0\tfour\n",
    "list.json": json.dumps([{"image": "a.jpg", "caption": ["one, two", "three"]}, {"image": "b.jpg", "caption": "four"}]),
    "lines.jsonl": '{"image": "a.jpg", "caption": ["one, two", "three"]}\n{"image": "b.jpg", "caption": "four"}\n',
    "coco.json": json.dumps(
        {
            "images": [{"id": 7, "file_name": "a.jpg"}, {"id": 3, "file_name": "b.jpg"}],
            "annotations": [{"image_id": i, "caption": c} for i, c in ((7, "one, two"), (7, "three"), (3, "four"))],
        }
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_forms_of_captions(tmp_path, name):
    (tmp_path / name).write_text(FORMS[name], encoding="utf-8")
    assert read_captions(str(tmp_path / name), "root") == EXPECTED


def test_captions_and_names_apart(tmp_path):
    (tmp_path / "captions.txt").write_text("one, two\nthree\nfour\n", encoding="utf-8")
    (tmp_path / "names.txt").write_text("a.jpg\na.jpg\nb.jpg\n", encoding="utf-8")
    assert read_captions(str(tmp_path / "captions.txt"), "root", str(tmp_path / "names.txt")) == EXPECTED
    (tmp_path / "names.txt").write_text("a.jpg\n", encoding="utf-8")
    with pytest.raises(DataError, match="1 names but .* 3 captions"):
        read_captions(str(tmp_path / "captions.txt"), "root", str(tmp_path / "names.txt"))


@pytest.mark.parametrize(
    "name, text, told",
    [
        ("x.txt", "a.jpg,one\n", "line 1: expected the header"),
        ("x.txt", "image,caption\na.jpg\n", "line 2: expected name,caption"),
        ("x.txt", "a.jpg#0\tone\nb.jpg two\n", "line 2: expected name#n"),
        ("x.json", "[1]", "needs image and caption"),
        ("x.json", '{"a": 1}', "must hold a list"),
        ("x.json", '{"images": [{}], "annotations": []}', "COCO's form"),
        ("x.json", '[{"image": "a.jpg", "caption": [3]}]', "must be a text"),
        pytest.param("x.json", "[" * 100000, "not valid JSON", id="deep"),
        ("x.jsonl", '{"image": "a.jpg"}', "needs image and caption"),
        ("x.txt", "image,caption\n", "holds no caption"),
    ],
)
def test_annotations_that_cannot_be_read(tmp_path, name, text, told):
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=told):
        read_captions(str(tmp_path / name), "root")


def test_class_folders(tmp_path):
    for name in ("b/2.png", "a/x/1.PNG", "a/0.jpg", "a/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    paths, labels, names = read_classes(str(tmp_path))
    assert [path[len(str(tmp_path)) + 1 :] for path in paths] == ["a/0.jpg", "a/x/1.PNG", "b/2.png"]
    assert labels == [0, 0, 1] and names == ["a", "b"]
    (tmp_path / "c").mkdir()
    with pytest.raises(DataError, match="c holds no file"):
        read_classes(str(tmp_path))


def test_features_go_on_behind_the_last_part(tmp_path):
    rows, asked = np.random.default_rng(0).standard_normal([23, 4]).astype("float32"), []

    def function(start, stop):
        asked.append((start, stop))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return rows[start:stop]

    with pytest.raises(KeyboardInterrupt):
        compute_features(str(tmp_path), 23, function, Processes(), chunk=5)
    found = compute_features(str(tmp_path), 23, function, Processes(), "float16", chunk=5)
    assert asked == [(0, 5), (5, 10), (10, 15), (10, 15), (15, 20), (20, 23)]
    assert np.abs(np.asarray(found, "float32") - rows).max() < 2e-3
    assert [path.name for path in tmp_path.iterdir()] == ["features.npy"]
    assert len(compute_features(str(tmp_path), 23, None, Processes())) == 23
    with pytest.raises(DataError, match="instead of 24 rows"):
        compute_features(str(tmp_path), 24, None, Processes())
    (tmp_path / "features.npy").write_bytes(b"\x80\x04pickle")
    with pytest.raises(DataError, match="holds no features"):
        open_features(str(tmp_path / "features.npy"))
