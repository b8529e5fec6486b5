"""Fine-tuning for retrieval: its data, what learns, how fast, and small runs."""

import json
import os
import subprocess
import sys

import numpy as np
import paddle
import pytest
from safetensors.numpy import load_file

from paddlemix.datasets.retrieval import RetrievalPairs, clean_caption
from paddlemix.errors import ConfigError, DataError
from paddlemix.examples.internvl import finetune_retrieval
from paddlemix.models.internvl import InternVLModel
from paddlemix.processors.transforms import augmented, transform
from paddlemix.training.arguments import PreTrainingArguments
from paddlemix.training.log import read_log
from paddlemix.training.optimizer import Optimizer
from paddlemix.training.retrieval import RetrievalModelArguments, layer_rates, prepare
from tests.conftest import REFERENCE
from tests.models.internvl.helpers import CHECKPOINT, PICTURES, fresh, load

CAPTIONS = ["a red thing", "something blue", "grey stones", "two dogs on grass", "the same red thing", "a blue one"]
OWNER = [0, 1, 2, 3, 0, 1]


def pairs(**options):
    return RetrievalPairs(PICTURES, CAPTIONS, OWNER, load().tokenizer, 56, **options)


def test_captions_are_cleaned():
    assert clean_caption('A "Red"  star: #1 (of 2)! ~ Yes.') == "a red star 1 of 2 yes"
    assert clean_caption("word " * 60) == " ".join(["word"] * 50)


def test_steps_do_not_depend_on_the_number_of_processes():
    data = pairs(seed=3)
    (whole,) = data.batch(4, 1, 4)
    halves = [data.batch(4, 1, 2, rank, 2)[0] for rank in range(2)]
    assert whole["names"] == halves[0]["names"] + halves[1]["names"]
    for name in ("pixel_values", "image_ids"):
        assert np.array_equal(whole[name], np.concatenate([half[name] for half in halves]))
    steps = [data.batch(step, 1, 2)[0] for step in range(3)]
    assert sorted(np.concatenate([b["image_ids"] for b in steps])) == sorted(OWNER)  # an epoch has all
    assert data.batch(3, 1, 2)[0]["image_ids"].tolist() != steps[0]["image_ids"].tolist() or not np.array_equal(
        data.batch(3, 1, 2)[0]["pixel_values"], steps[0]["pixel_values"]
    )


def test_negatives_are_of_other_pictures():
    data, tokenizer = pairs(), load().tokenizer
    seen = set()
    for step in range(30):
        (batch,) = data.batch(step, 1, 3)
        for row, mask, image in zip(batch["negative_input_ids"], batch["negative_attention_mask"], batch["image_ids"]):
            text = tokenizer.decode(row[mask > 0])
            assert OWNER[CAPTIONS.index(text)] != image
            seen.add(text)
        assert (batch["summarize_attention_mask"].sum(1) > batch["positive_attention_mask"].sum(1)).all()
    assert seen == set(CAPTIONS)
    with pytest.raises(DataError, match="two pictures"):
        RetrievalPairs(PICTURES[:1], ["a", "b"], [0, 0], tokenizer, 56)


def test_a_part_of_a_picture_is_in_it():
    generator = np.random.default_rng(0)
    ramp = np.repeat(np.arange(200, dtype="uint8")[None, :, None], 100, 0).repeat(3, 2)
    from PIL import Image

    picture = Image.fromarray(ramp)
    spans = []
    for _ in range(40):
        pixels = augmented(picture, 32, generator, scale=(0.5, 1.0), flip=0.5)
        row = (pixels[0, 16] * 0.229 + 0.485) * 255
        assert (np.diff(row) > -0.5).all() or (np.diff(row) < 0.5).all()  # flipped or not, never folded
        spans.append(abs(row[-1] - row[0]))
    assert max(spans) - min(spans) > 20 and min(spans) > 60
    whole = augmented(picture, 32, generator, scale=(1.0, 1.0), ratio=(2.0, 2.0), flip=0.0)
    assert np.abs(whole - transform(picture, "retrieval", 32)).max() < 1e-6


@pytest.mark.parametrize(
    "flags, learns, rests",
    [
        ({}, {"query_tokens", "vision_model.encoder.layers.0.ls1", "qllama.lm_head.weight", "logit_scale"}, set()),
        ({"freeze_model": True, "unfreeze_qllama_head": True}, {"qllama.lm_head.weight", "text_projection"}, {"query_tokens"}),
        (
            {"freeze_vision_model": True, "freeze_qllama": True, "unfreeze_qllama_head": True},
            {"query_tokens", "clip_projector.cross_attn.q.weight", "qllama.lm_head.weight"},
            {"vision_model.encoder.layers.0.ls1", "qllama.model.layers.0.cross_attn.q_proj.weight"},
        ),
        (
            {"use_backbone_lora": 2, "use_qllama_lora": 3},
            {"vision_model.encoder.layers.1.attn.qkv.lora_A.0", "qllama.model.layers.3.mlp.up_proj.lora_B.0", "itm_head.bias"},
            {"vision_model.encoder.layers.1.attn.qkv.weight", "qllama.model.layers.0.self_attn.q_proj.weight"},
        ),
    ],
)
def test_what_learns(flags, learns, rests):
    found = prepare(fresh(), RetrievalModelArguments("x", **flags))
    assert learns <= found.keys() and not rests & found.keys()
    if flags.get("freeze_model"):
        assert found.keys() == learns


def test_nothing_to_learn_is_told():
    with pytest.raises(ConfigError, match="nothing is left"):
        prepare(fresh(), RetrievalModelArguments("x", freeze_model=True))


def test_learning_rates_fall_towards_the_first_block():
    rate = layer_rates(load().model.config, 0.9, 0.5)
    assert rate("vision_model.encoder.layers.2.ls1") == pytest.approx(0.9)
    assert rate("vision_model.encoder.layers.0.attn.qkv.weight") == pytest.approx(0.9**3)
    assert rate("vision_model.embeddings.class_embedding") == pytest.approx(0.9**4)
    assert rate("qllama.model.layers.3.mlp.up_proj.weight") == 0.5 and rate("qllama.model.embed_tokens.weight") == 0.5**5
    assert rate("query_tokens") == rate("qllama.lm_head.weight") == rate("clip_projector.norm1_q.bias") == 1


def test_the_optimiser_takes_each_parameters_own_rate():
    parameters = {n: paddle.create_parameter([3], "float32") for n in ("a", "b")}
    before = {n: p.numpy().copy() for n, p in parameters.items()}
    optimiser = Optimizer(parameters, PreTrainingArguments(output_dir="x"), rates={"a": 1.0, "b": 0.25}.get)
    for p in parameters.values():
        p.sum().backward()
    optimiser.step(1e-2)
    moved = {n: np.abs(p.numpy() - before[n]) for n, p in parameters.items()}
    assert moved["b"] == pytest.approx(0.25 * moved["a"], rel=1e-3) and moved["a"].min() > 5e-3


def flags(folder, *more, output="out"):
    lines = [{"image": os.path.basename(PICTURES[o]), "caption": c, "image_id": o} for c, o in zip(CAPTIONS, OWNER)]
    (folder / "list.json").write_text(json.dumps(lines), encoding="utf-8")
    return [
        *("--model_name_or_path", str(CHECKPOINT), "--images", str(REFERENCE / "images"), "--device", "cpu"),
        *("--annotations", str(folder / "list.json"), "--output_dir", str(folder / output), "--max_steps", "6"),
        *("--per_device_train_batch_size", "2", "--learning_rate", "1e-3", "--logging_steps", "1", "--report_to", "none"),
        *("--disable_tqdm", "True", "--save_strategy", "steps", "--save_steps", "3", *more),
    ]


def losses(folder, output="out"):
    return {row["step"]: row["loss"] for row in read_log(str(folder / output / "train_log.jsonl"))}


@pytest.mark.slow
@pytest.mark.parametrize("lora", ["0", "2"])
def test_a_run_learns_and_goes_on_exactly(tmp_path, lora):
    more = ["--use_qllama_lora", lora, "--drop_path_rate", "0.2", "--recompute", "True"]
    finetune_retrieval.main(flags(tmp_path, *more, output="whole"))
    whole = losses(tmp_path, "whole")
    assert len(whole) == 6
    finetune_retrieval.main(flags(tmp_path, *more, "--max_steps", "3", "--lr_scheduler_type", "constant", output="other"))
    finetune_retrieval.main(flags(tmp_path, *more, "--lr_scheduler_type", "constant", output="constant"))
    import shutil

    shutil.copytree(tmp_path / "constant", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoint-6")
    finetune_retrieval.main(flags(tmp_path, *more, "--lr_scheduler_type", "constant", output="again"))
    assert losses(tmp_path, "again") == losses(tmp_path, "constant")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("constant", "again"))
    assert all(np.array_equal(value, second[name]) for name, value in first.items())
    model = InternVLModel.from_pretrained(tmp_path / "again", dtype="float32")
    with paddle.no_grad():
        changed = model.encode_image(load().arrays["pixels_retrieval"]).numpy()
    assert np.abs(changed - load().arrays["image_c"]).max() > 1e-4


@pytest.mark.slow
def test_two_processes_are_one_with_the_same_batch(tmp_path):
    common = ["--max_steps", "4", "--weight_decay", "0.05"]
    finetune_retrieval.main(flags(tmp_path, *common, "--per_device_train_batch_size", "4", output="one"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path])}
    script = finetune_retrieval.__file__
    command = [sys.executable, script, "--devices", "2", *flags(tmp_path, *common, output="two")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert list(losses(tmp_path, "two").values()) == pytest.approx(list(losses(tmp_path, "one").values()), rel=1e-4)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert max(np.abs(value - second[name]).max() for name, value in first.items()) < 5e-4  # half a step of AdamW


@pytest.mark.parametrize(
    "more, told",
    [
        (["--annotations", "nowhere"], "cannot be read"),
        (["--per_device_train_batch_size", "20"], "a step takes 20 samples"),
        (["--force_image_size", "57"], "multiple of 14"),
        (["--learning-rat", "1"], "unrecognized"),
    ],
)
def test_bad_flags(tmp_path, capsys, more, told):
    with pytest.raises(SystemExit):
        finetune_retrieval.main(flags(tmp_path, *more))
    assert told in capsys.readouterr().err
