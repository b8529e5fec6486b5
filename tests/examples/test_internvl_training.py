"""Probes and segmentation on drawn scenes, with the demo model's tower."""

import json
import random
from pathlib import Path

import numpy as np
import paddle
import pytest
from PIL import Image, ImageDraw

import paddlemix
from paddlemix.examples.internvl import linear_probe, segmentation
from paddlemix.examples.internvl2.demo_model.scenes import COLORS, SHAPES, SIDE, Item, arrange, draw_items
from paddlemix.models.internvl import InternVisionModel
from paddlemix.models.internvl.heads import SegmentationModel
from paddlemix.training.segmentation import layer_rates, mean_iou, pixel_loss, read_labels, training_crop

DEMO = str(Path(paddlemix.__file__).parent / "demo_model")
MODEL = ["--model_name_or_path", DEMO, "--device", "cpu", "--engine", "eager"]


def shapes(root, count, seed):
    """A folder of pictures of one shape each for every shape."""
    rng = random.Random(seed)
    for shape in SHAPES:
        (root / shape).mkdir(parents=True)
        for i in range(count):
            item = Item(rng.choice(list(COLORS)), shape, rng.uniform(25, 59), rng.uniform(25, 59), rng.uniform(10, 16))
            draw_items([item], rng).save(root / shape / f"{i}.png")
    return str(root)


def segments(root, part, count, seed):
    """Scenes in ADE20K's layout: label 1 is the ground, the others are shapes."""
    rng = random.Random(seed)
    for name in ("images", "annotations"):
        (root / name / part).mkdir(parents=True)
    for i in range(count):
        items = arrange([(rng.choice(list(COLORS)), rng.choice(SHAPES)) for _ in range(3)], rng)
        draw_items(items, rng).save(root / "images" / part / f"{i}.png")
        labels = Image.new("L", (SIDE, SIDE), 1)
        for item in items:
            ImageDraw.Draw(labels).polygon(item.outline, fill=2 + SHAPES.index(item.shape))
        labels.save(root / "annotations" / part / f"{i}.png")


DEEP = ["--layer_decay", "0.9", "--drop_path_rate", "0.1"]


def score(folder):
    return json.loads((folder / "score.json").read_text(encoding="utf-8"))["scores"]


@pytest.mark.slow
@pytest.mark.parametrize("probe", ["linear", "attention"])
def test_a_probe_tells_shapes_apart(tmp_path, probe):
    data, val = shapes(tmp_path / "train", 400, 0), shapes(tmp_path / "val", 50, 1)
    flags = ["--data", data, "--val", val, "--out", str(tmp_path / "out"), "--probe", probe, "--epochs", "30"]
    linear_probe.main([*MODEL, *flags, "--train_batch_size", "64", "--learning_rate", "1.0"])
    assert score(tmp_path / "out")["acc1"] > 0.9


def test_a_probe_with_augmentation_runs_on_few_pictures(tmp_path):
    data = shapes(tmp_path / "train", 3, 0)
    some = tmp_path / "some"
    for shape in SHAPES[1:3]:
        (some / shape).mkdir(parents=True)
        (some / shape / "0.png").hardlink_to(tmp_path / "train" / shape / "0.png")
    flags = ["--data", data, "--val", data, str(some), "--out", str(tmp_path / "out"), "--epochs", "2", "--augment"]
    linear_probe.main([*MODEL, *flags, "--train_batch_size", "6"])
    assert 0 <= score(tmp_path / "out")["acc1"] <= 1
    sets = json.loads((tmp_path / "out" / "score.json").read_text(encoding="utf-8"))["sets"]
    assert sets.keys() == {data, str(some)} and sets[str(some)]["acc1"] in (0, 0.5, 1)
    (some / "other").mkdir()
    (some / SHAPES[1] / "0.png").rename(some / "other" / "0.png")
    (some / SHAPES[1]).rmdir()
    with pytest.raises(SystemExit):
        linear_probe.main([*MODEL, *flags])
    assert (tmp_path / "out" / "probe.npz").exists()


@pytest.mark.slow
def test_a_linear_head_finds_shapes(tmp_path):
    """With a tower that learns: behind the demo model's, which has seen shapes of one or two tokens, it comes to 0.36."""
    segments(tmp_path, "training", 150, 0)
    segments(tmp_path, "validation", 20, 1)
    flags = ["--data", str(tmp_path), "--out", str(tmp_path / "out"), "--classes", "5", "--crop", "252", "--steps", "500"]
    flags += ["--scale", "1", "1", "--tune_tower"]
    segmentation.main([*MODEL, *flags, "--warmup", "10", "--train_batch_size", "4", "--learning_rate", "1e-3"])
    assert score(tmp_path / "out")["mIoU"] > 0.6


FURTHER = [("upernet", []), ("full", []), ("linear", ["--tune_tower"])]


@pytest.mark.parametrize("head, more", [("linear", []), *(pytest.param(*case, marks=pytest.mark.slow) for case in FURTHER)])
def test_segmentation_runs_on_few_pictures(tmp_path, head, more):
    segments(tmp_path, "training", 2, 0)
    segments(tmp_path, "validation", 1, 1)
    flags = ["--data", str(tmp_path), "--out", str(tmp_path / "out"), "--classes", "5", "--channels", "12", "--steps", "2"]
    segmentation.main([*MODEL, *flags, "--warmup", "1", "--train_batch_size", "2", "--head", head, *more, *DEEP])
    assert 0 <= score(tmp_path / "out")["mIoU"] <= 1
    if head == "full" or more:
        tower, before = (InternVisionModel.from_pretrained(p, dtype="float32") for p in (tmp_path / "out" / "tower", DEMO))
        name = "encoder.layers.0.mlp.fc1.weight"
        assert np.abs(tower.state_dict()[name].numpy() - before.state_dict()[name].numpy()).max() > 0


def test_maps_of_the_heads_have_the_size_of_the_picture():
    tower = InternVisionModel.from_pretrained(DEMO, dtype="float32")
    for head, blocks in (("linear", [4]), ("upernet", [0, 1, 3, 4])):
        model = SegmentationModel(tower, head, 7, channels=12)
        model.eval()
        assert model.blocks == blocks
        scores, extra = model(paddle.zeros([1, 3, 84, 112]))
        assert scores.shape == [1, 7, 84, 112] and (extra is None or extra.shape == scores.shape)


def test_what_does_not_count_does_not():
    scores = paddle.to_tensor(np.random.default_rng(0).standard_normal([1, 3, 2, 2]).astype("float32"))
    labels = np.array([[[0, -1], [2, -1]]])
    rows = scores.numpy()[0].reshape(3, 4).T.astype("float64")
    logs = rows - np.log(np.exp(rows).sum(1, keepdims=True))
    assert float(pixel_loss(scores, labels)) == pytest.approx(-(logs[0, 0] + logs[2, 2]) / 2, rel=1e-5)
    assert float(pixel_loss(scores, labels * 0 - 1)) == 0
    assert mean_iou(np.array([[3, 1, 0], [0, 4, 0], [0, 0, 0]])) == pytest.approx((3 / 4 + 4 / 5) / 2)


def test_a_window_and_its_labels_belong_together(tmp_path):
    labels = np.zeros([40, 60], "uint8")
    labels[:, 30:] = 2
    labels[:, :30] = 1
    Image.fromarray(labels).save(tmp_path / "l.png")
    picture = Image.fromarray(np.repeat((labels == 2)[:, :, None] * np.uint8(255), 3, 2))
    known = read_labels(str(tmp_path / "l.png"), 2)
    for seed in range(6):
        pixels, found = training_crop(picture, known, 42, np.random.default_rng(seed), distort=False)
        inside = found >= 0
        assert inside.any() and ((pixels[0] > 0)[inside] == (found == 1)[inside]).mean() > 0.97
        assert not pixels[:, ~inside].any()


def test_learning_rates_fall_towards_the_towers_first_block():
    rate = layer_rates(48, 0.95)
    assert rate("head.conv.weight") == 1 and rate("tower.encoder.layers.47.ls1") == pytest.approx(0.95)
    assert rate("tower.encoder.layers.0.attn.qkv.weight") == pytest.approx(0.95**48)
    assert rate("tower.embeddings.class_embedding") == pytest.approx(0.95**49)


@pytest.mark.parametrize("blocks, told", [(["9"], "from 0 to 4"), (["0", "1"], "one number")])
def test_blocks_that_make_no_sense_are_told(tmp_path, capsys, blocks, told):
    segments(tmp_path, "training", 1, 0)
    segments(tmp_path, "validation", 1, 1)
    with pytest.raises(SystemExit):
        segmentation.main([*MODEL, "--data", str(tmp_path), "--out", str(tmp_path / "out"), "--blocks", *blocks])
    assert told in capsys.readouterr().err
