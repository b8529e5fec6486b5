"""The index against features computed by hand, and the search in blocks against sorting."""

import json
import os

import numpy as np
import pytest
from PIL import Image

from paddlemix.errors import DataError
from paddlemix.examples.internvl import embed, search
from paddlemix.search import Index, best, index, nearest
from tests.conftest import PICTURE_TOLERANCE, SAME_PILLOW
from tests.models.internvl.helpers import CHECKPOINT, PICTURES, load

MODEL = ["--model_name_or_path", str(CHECKPOINT), "--device", "cpu", "--engine", "eager"]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("rows, k", [(1000, 7), (64, 64), (65, 10), (3, 10), (1, 1)])
def test_best_is_what_sorting_finds(monkeypatch, dtype, rows, k):
    monkeypatch.setattr(nearest, "_BLOCK", 64)
    generator = np.random.default_rng(0)
    vectors = generator.integers(-2, 3, [rows, 3]).astype(dtype)  # many ties
    queries = generator.integers(-2, 3, [9, 3]).astype("float32")
    scores, found = best(vectors, queries, k)
    whole = queries @ vectors.astype("float32").T
    order = np.argsort(-whole, axis=1, kind="stable")[:, :k]
    assert np.array_equal(found, order)
    assert np.array_equal(scores, np.take_along_axis(whole, order, 1))


def test_best_in_a_mapped_file(tmp_path):
    vectors = np.random.default_rng(0).standard_normal([20000, 16]).astype("float16")
    np.save(tmp_path / "x.npy", vectors)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    queries = np.random.default_rng(1).standard_normal([4, 16])
    for first, second in zip(best(mapped, queries, 5), best(vectors, queries, 5)):
        assert np.array_equal(first, second)
    assert best(vectors, queries[:0], 5)[0].shape == (0, 5)


@pytest.fixture
def photos(tmp_path):
    """A folder of pictures, one of them damaged, one in a folder of its own."""
    root = tmp_path / "photos"
    (root / "more").mkdir(parents=True)
    for i, path in enumerate(PICTURES):
        Image.open(path).convert("RGB").save(root / ("more" if i == 3 else ".") / f"{i}.png")
    (root / "bad.jpg").write_bytes(b"no picture")
    return root


def test_an_index_is_built_searched_and_brought_up_to_date(photos, tmp_path, capsys):
    target = tmp_path / "index"
    search.main([*MODEL, "--index", str(photos), "--out", str(target)])
    assert "4 pictures" in capsys.readouterr().out
    first = Index(target)
    assert [entry[0] for entry in first.entries] == ["0.png", "1.png", "2.png", "more/3.png"]
    assert first.features.dtype == np.float16
    assert sorted(os.listdir(target)) == ["features.npy", "index.json", "names.jsonl"]

    search.main(
        ["--device", "cpu", "--engine", "eager", str(target), "--query", "a red star", "--image", PICTURES[2], "--top", "3"]
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "a red star" and lines[4] == PICTURES[2]
    assert lines[5].endswith("2.png") and float(lines[5].split()[0]) == pytest.approx(1, abs=2e-3)  # it finds itself
    features = load().model.encode_image(load().arrays["pixels_retrieval"]).numpy()
    query = load().model.encode_text(load().tokenizer(["a red star"])).numpy()[0]
    cosines = features @ query / np.linalg.norm(features, axis=1) / np.linalg.norm(query)
    assert [os.path.basename(line.split()[1]) for line in lines[1:4]] == [f"{i}.png" for i in np.argsort(-cosines)[:3]]
    assert Image.open(target / "matches.png").size[0] > 400

    # A new picture and one that changed: the others keep their rows.
    Image.new("RGB", (30, 30), (1, 2, 3)).save(photos / "new.png")
    Image.open(PICTURES[1]).convert("RGB").save(photos / "0.png")
    search.main([*MODEL, "--index", str(photos), "--out", str(target)])
    again = Index(target)
    assert [entry[0] for entry in again.entries] == ["0.png", "1.png", "2.png", "more/3.png", "new.png"]
    assert np.array_equal(again.features[1:4], first.features[1:4])
    assert np.abs(again.features[0] - first.features[1]).max() < 1e-3 and len(np.unique(again.features[4])) > 1


def test_only_what_changed_is_computed(photos, tmp_path, monkeypatch):
    from paddlemix.models.internvl.embedder import Embedder
    from paddlemix.training.processes import Processes

    embedder, seen = Embedder(CHECKPOINT, "float32", "eager"), []
    read = embedder.read
    monkeypatch.setattr(embedder, "read", lambda picture: seen.append(os.path.basename(picture)) or read(picture))
    index.build_index(embedder, str(photos), str(tmp_path / "x"), Processes())
    assert sorted(seen) == ["0.png", "1.png", "2.png", "3.png", "bad.jpg"]
    seen.clear()
    (photos / "1.png").unlink()
    found = index.build_index(embedder, str(photos), str(tmp_path / "x"), Processes())
    assert seen == ["bad.jpg"] and [entry[0] for entry in found.entries] == ["0.png", "2.png", "more/3.png"]
    embedder.mode = "InternVL-G"
    index.build_index(embedder, str(photos), str(tmp_path / "x"), Processes())
    assert len(seen) == 1 + 4


def test_an_index_of_another_model_is_refused(photos, tmp_path, capsys):
    search.main([*MODEL, "--index", str(photos), "--out", str(tmp_path / "x")])
    path = tmp_path / "x" / "index.json"
    meta = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**meta, "digest": "other"}), encoding="utf-8")
    capsys.readouterr()
    with pytest.raises(SystemExit):
        search.main([*MODEL, str(tmp_path / "x"), "--query", "x"])
    assert "was made with digest other" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, text", [("index.json", "{"), ("index.json", "[]"), ("names.jsonl", "3\n"), ("features.npy", "x")]
)
def test_a_damaged_index_is_told(photos, tmp_path, name, text):
    search.main([*MODEL, "--index", str(photos), "--out", str(tmp_path / "x")])
    (tmp_path / "x" / name).write_text(text, encoding="utf-8")
    with pytest.raises(DataError):
        Index(tmp_path / "x")


def test_other_folders_are_not_written_into(photos, capsys):
    with pytest.raises(SystemExit):
        search.main([*MODEL, "--index", str(photos), "--out", str(photos)])
    assert "not empty and no index" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, told",
    [
        ([], "name an index"),
        (["x", "--index", "y"], "without it"),
        (["nowhere", "--query", "x"], "holds no index"),
        (["--index", "nowhere"], "not a folder"),
        (["x", "--query", "y", "--top", "0"], "at least 1"),
    ],
)
def test_bad_flags(capsys, flags, told):
    with pytest.raises(SystemExit) as stop:
        search.main([*MODEL, *flags])
    assert stop.value.code == 1 and told in capsys.readouterr().err


def test_faiss_finds_nearly_the_same(photos, tmp_path, monkeypatch):
    pytest.importorskip("faiss")
    monkeypatch.setattr(index, "FAISS_ROWS", 2000)
    generator = np.random.default_rng(0)
    vectors = generator.standard_normal([4000, 32]).astype("float32")
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    entries = [[f"{i}.png", 1, 1] for i in range(4000)]
    index._write(str(tmp_path / "x"), vectors.astype("float16"), entries, {"version": 1, "root": "r", "model": "m"})
    found = Index(tmp_path / "x")
    assert found.meta["faiss"]
    queries = vectors[:50] + 0.01 * generator.standard_normal([50, 32])
    _, exact = found.search(queries, 10, exact=True)
    _, quick = found.search(queries, 10)
    assert np.array_equal(exact[:, 0], np.arange(50)) and np.array_equal(quick[:, 0], np.arange(50))
    assert np.mean([len(set(a) & set(b)) / 10 for a, b in zip(exact, quick)]) > 0.3


def test_embed_writes_rows_and_names(photos, tmp_path):
    out = tmp_path / "pictures.npy"
    embed.main([*MODEL, "--images", str(photos), PICTURES[0], "--out", str(out)])
    names = (tmp_path / "pictures.names.txt").read_text(encoding="utf-8").splitlines()
    assert [os.path.basename(name) for name in names] == ["0.png", "1.png", "2.png", "3.png", "img0.png"]
    features = load().arrays["image_c"] / np.linalg.norm(load().arrays["image_c"], axis=1, keepdims=True)
    assert np.abs(np.load(out)[:3] - features[:3]).max() < (1e-5 if SAME_PILLOW else PICTURE_TOLERANCE)

    (tmp_path / "texts.txt").write_text("\n".join(load().expected["texts"][:4]) + "\n", encoding="utf-8")
    embed.main([*MODEL, "--texts", str(tmp_path / "texts.txt"), "--out", str(tmp_path / "texts.npy"), "--half"])
    texts = np.load(tmp_path / "texts.npy")
    assert texts.dtype == np.float16
    scores = np.load(out)[:4] @ texts.astype("float32").T * np.exp(float(load().model.logit_scale))
    assert np.abs(scores - load().arrays["logits_c"][:4, :4]).max() < 2e-2
