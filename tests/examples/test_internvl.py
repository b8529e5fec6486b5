"""The commands of InternVL-C and -G on a few pictures."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from paddlemix.evaluation import retrieval_recalls
from paddlemix.evaluation.features import open_features
from paddlemix.examples.internvl import caption, retrieval, video_retrieval, zero_shot_classification
from tests.models.internvl.helpers import CHECKPOINT, PICTURES, load

MODEL = ["--model_name_or_path", str(CHECKPOINT), "--device", "cpu", "--engine", "eager"]
COLORS = {"red": (220, 30, 30), "green": (20, 160, 60), "blue": (30, 60, 220)}


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """A folder of class folders; one picture is damaged."""
    root = tmp_path_factory.mktemp("classes")
    generator = np.random.default_rng(0)
    for name, color in COLORS.items():
        (root / name).mkdir()
        for i in range(4):
            noise = generator.integers(-20, 20, [60 + 10 * i, 80, 3])
            Image.fromarray((np.array(color) + noise).clip(0, 255).astype("uint8")).save(root / name / f"{i}.png")
    (root / "red" / "bad.png").write_bytes(b"no picture")
    return root


@pytest.fixture(scope="module")
def captions(tmp_path_factory):
    """A folder of four pictures and their captions as lines."""
    root = tmp_path_factory.mktemp("captions")
    for i, path in enumerate(PICTURES):
        shutil.copy(path, root / f"{i}.png")
    lines = [f"{i}.png,caption {n}, of picture {i}" for i in range(4) for n in range(3)]
    (root / "list.txt").write_text("\n".join(["image,caption", *lines]), encoding="utf-8")
    return root


def scores(folder):
    return json.loads((folder / "score.json").read_text(encoding="utf-8"))["scores"]


def test_classification_goes_on_where_it_stopped(classes, tmp_path, capsys):
    flags = [*MODEL, "--data", str(classes), "--out", str(tmp_path), "--batch_size", "5"]
    zero_shot_classification.main(flags)
    first = scores(tmp_path)
    assert first["pictures"] == 12 and first["left out"] == 1
    assert "bad.png" in capsys.readouterr().err
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("<figure>") == 12 and "data:image/jpeg" in page

    (path,) = tmp_path.glob("features/*/features.npy")
    changed = path.stat().st_mtime_ns
    zero_shot_classification.main(flags)
    assert scores(tmp_path) == first and path.stat().st_mtime_ns == changed

    # By hand: features of each picture alone against the folder names.
    from paddlemix.evaluation import zero_shot_weights
    from paddlemix.evaluation.zero_shot import TEMPLATES
    from paddlemix.models.internvl import transform

    weights = zero_shot_weights(load().model, load().tokenizer, sorted(COLORS), TEMPLATES)
    right = 0
    for label, name in enumerate(sorted(COLORS)):
        for i in range(4):
            pixels = transform(classes / name / f"{i}.png", "classification", 56)[None]
            right += (load().model.encode_image(pixels).numpy() @ weights).argmax() == label
    assert first["acc1"] == pytest.approx(right / 12)


def test_retrieval_is_that_of_the_features(captions, tmp_path):
    retrieval.main(
        [
            *MODEL,
            "--images",
            str(captions),
            "--annotations",
            str(captions / "list.txt"),
            "--out",
            str(tmp_path),
            "--mode",
            "InternVL-G",
        ]
    )
    arrays = load().arrays["image_g"]
    texts = [f"caption {n}, of picture {i}" for i in range(4) for n in range(3)]
    features = load().model.encode_text(load().tokenizer(texts)).numpy()
    images, features = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (arrays, features))
    expected = retrieval_recalls(images @ features.T, np.repeat(np.arange(4), 3))
    found = scores(tmp_path)
    assert {name: found[name] for name in expected} == pytest.approx(expected)


@pytest.mark.slow
def test_several_processes_share_the_pictures(classes, tmp_path):
    flags = [*MODEL, "--data", str(classes), "--batch_size", "2"]
    zero_shot_classification.main([*flags, "--out", str(tmp_path / "one")])
    script = zero_shot_classification.__file__
    launcher = [sys.executable, "-m", "paddle.distributed.launch", "--nproc_per_node", "2", "--log_dir", str(tmp_path / "logs")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path])}
    command = [*launcher, script, *flags, "--out", str(tmp_path / "two")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    assert scores(tmp_path / "two") == scores(tmp_path / "one")
    pair = [open_features(next((tmp_path / name).glob("features/*/features.npy"))) for name in ("one", "two")]
    assert np.allclose(*pair, equal_nan=True, atol=1e-6)


def test_clips(tmp_path):
    for name, color in COLORS.items():
        (tmp_path / "clips" / name).mkdir(parents=True)
        for i in range(5):
            Image.new("RGB", (64, 48), tuple(min(255, c + 8 * i) for c in color)).save(tmp_path / "clips" / name / f"{i}.png")
    lines = [{"video": name, "caption": [f"a {name} clip", f"{name}"]} for name in COLORS]
    (tmp_path / "list.json").write_text(json.dumps(lines), encoding="utf-8")
    flags = ["--videos", str(tmp_path / "clips"), "--annotations", str(tmp_path / "list.json"), "--frames", "3"]
    video_retrieval.main([*MODEL, *flags, "--out", str(tmp_path / "out")])
    found = scores(tmp_path / "out")
    assert found["clips"] == 3 and found["texts"] == 6
    assert {"video_retrieval_recall@1", "text_retrieval_recall@10 (dual softmax)"} <= found.keys()
    features = open_features(next((tmp_path / "out").glob("features/*/features.npy")))
    # Frames 1, 3 and 4: intervals of two, the third of which ends beyond the clip.
    from paddlemix.models.internvl import transform

    pixels = np.stack([transform(tmp_path / "clips" / "red" / f"{i}.png", "retrieval", 56) for i in (1, 3, 4)])
    mean = load().model.encode_image(pixels).numpy().mean(0)
    assert np.abs(features[0] - mean / np.linalg.norm(mean)).max() < 1e-6


def test_captions_go_on_and_are_those_of_the_original(captions, tmp_path):
    flags = [*MODEL, "--images", str(captions), "--out", str(tmp_path), "--num_beams", "5", "--batch_size", "3"]
    caption.main(flags)
    path = tmp_path / "captions.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    texts = next(c["text"] for c in load().expected["captions"] if c["num_beams"] == 5 and len(c) == 5)
    assert [json.loads(line)["caption"] for line in lines] == texts

    path.write_text("".join(lines[:2]) + lines[2][:20], encoding="utf-8")  # as a killed run leaves it
    caption.main(flags)
    assert path.read_text(encoding="utf-8") == "".join(lines)
    with pytest.raises(SystemExit):
        caption.main([*flags, "--max_new_tokens", "9"])


@pytest.mark.parametrize(
    "command, flags, told",
    [
        (zero_shot_classification, ["--data", "nowhere"], "nowhere is not a folder"),
        (zero_shot_classification, ["--data", "{root}", "--classnames", "{root}/names.json"], "cannot be read"),
        (retrieval, ["--images", "{root}", "--annotations", "{root}/red/bad.png"], "expected the header image,caption"),
        (zero_shot_classification, ["--data", "{root}", "--image_size", "57"], "multiple of the model's patches"),
        (zero_shot_classification, ["--data", "{root}", "--batch_size", "0"], "at least 1"),
    ],
)
def test_bad_flags_end_in_one_sentence(classes, tmp_path, capsys, command, flags, told):
    with pytest.raises(SystemExit) as stop:
        command.main([*MODEL, *(flag.format(root=classes) for flag in flags), "--out", str(tmp_path)])
    said = capsys.readouterr().err
    assert stop.value.code == 1 and told in said and said.startswith("error: ") and said.count("\n") == 1
