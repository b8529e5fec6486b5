"""The scripts of InternVL-C and -G: their settings are the published ones."""

import subprocess
from pathlib import Path

import pytest

from paddlemix.examples import internvl
from paddlemix.training.arguments import parse
from paddlemix.training.retrieval import CLASSES

ROOT = Path(internvl.__file__).parent
STUB = """#!/bin/sh
printf "%s\\n" "$@" >> "$ARGV"
echo "--end" >> "$ARGV"
"""


def run(folder, script, *arguments, **environment):
    """Command lines that the interpreter is given by a script, and what it said."""
    (folder / "bin").mkdir(exist_ok=True)
    (folder / "bin" / "python").write_text(STUB)
    (folder / "bin" / "python").chmod(0o755)
    env = {"PATH": f"{folder}/bin:/usr/bin:/bin", "ARGV": str(folder / "argv"), "MASTER": "a:1", **environment}
    command = ["sh", str(ROOT / f"{script}.sh"), *arguments]
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = (folder / "argv").read_text().split("--end\n")[:-1] if (folder / "argv").exists() else []
    return [lines.splitlines() for lines in said], done.stdout + done.stderr


def flags(argv):
    """``{flag: value}`` behind the name of the command; of several values the list."""
    start = next(i for i, word in enumerate(argv) if word.endswith(".py")) + 1
    found = {}
    for word in argv[start:]:
        if word.startswith("--"):
            key = word
            found[key] = []
        else:
            found[key].append(word)
    return {key: values[0] if len(values) == 1 else values for key, values in found.items()}


def _finetune():
    for data, epochs in (("flickr", 10), ("flickrcn", 10), ("coco", 5)):
        whole = dict(force_image_size=364, drop_path_rate=0.3, vit_layer_decay_rate=0.9, qllama_layer_decay_rate=0.9)
        whole |= dict(freeze_model=False, use_backbone_lora=0, num_train_epochs=epochs)
        stem = f"internvl_stage2_finetune_{data}_364_bs1024_ep{epochs}"
        yield f"finetune/{stem}", whole, 32, 32
        yield f"finetune/{stem}_128gpu", whole, 128, 8
        part = dict(force_image_size=224, drop_path_rate=0.0, vit_layer_decay_rate=1.0, num_train_epochs=epochs)
        part |= dict(freeze_model=True, freeze_vision_model=True, freeze_qllama=True, unfreeze_qllama_head=True)
        stem = f"internvl_stage2_finetune_{data}_224_bs1024_ep{epochs}"
        yield f"head_finetune/{stem}_head_4gpu", part | dict(use_backbone_lora=0, use_qllama_lora=0), 4, 32
        yield f"lora_finetune/{stem}_lora16_4gpu", part | dict(use_backbone_lora=16, use_qllama_lora=16), 4, 32


FINETUNE = list(_finetune())


def test_every_script_is_checked():
    found = {p.relative_to(ROOT / "shell").with_suffix("").as_posix() for p in (ROOT / "shell").rglob("*.sh")}
    assert found == {name for name, *_ in FINETUNE} | {"run"}


@pytest.mark.parametrize("name, expected, devices, each", FINETUNE, ids=[case[0].split("/")[1] for case in FINETUNE])
def test_fine_tuning(name, expected, devices, each, tmp_path):
    ((argv,), _) = run(tmp_path, f"shell/{name}")
    place = next(i for i, word in enumerate(argv) if word.endswith("finetune_retrieval.py"))
    args = {key: value for part in parse(argv[place + 1 :], classes=CLASSES) for key, value in vars(part).items()}
    common = dict(learning_rate=1e-6, weight_decay=0.05, warmup_steps=100, lr_scheduler_type="cosine", bf16=True)
    common |= dict(gradient_accumulation_steps=1, per_device_train_batch_size=each, save_steps=100, save_total_limit=5)
    assert {key: args[key] for key in expected | common} == expected | common
    nodes = int(argv[argv.index("--nnodes") + 1]) if "--nnodes" in argv else 1
    assert nodes * len(argv[argv.index("--devices") + 1].split(",")) == devices
    assert args["output_dir"] == f"work_dirs/{name.split('/')[1]}"
    assert ("coco" in args["images"]) == ("coco" in name) and ("_cn_" in args["annotations"]) == ("flickrcn" in name)


def test_a_dry_run_starts_nothing(tmp_path):
    commands, said = run(tmp_path, f"shell/{FINETUNE[0][0]}", "--dry_run", "--seed", "7")
    assert not commands and said.startswith("32 processes of: python ") and "--seed 7" in said and "--dry_run" not in said


@pytest.mark.parametrize("probe", ["linear", "attention"])
def test_probes(probe, tmp_path):
    folder = {"linear": "linear_probing", "attention": "attn_pooling_probing"}[probe]
    scripts = sorted((ROOT / "classification" / folder).glob("*.sh"))
    assert len(scripts) == 6
    (tmp_path / "data" / "imagenet-a").mkdir(parents=True)
    for path in scripts:
        (tmp_path / "argv").unlink(missing_ok=True)
        ((argv,), _) = run(tmp_path, path.relative_to(ROOT).with_suffix(""), "--seed", "3")
        found = flags(argv)
        assert found["--probe"] == probe and found["--seed"] == "3" and "--augment" in found
        assert found["--image_size"] == path.stem.split("_64gpu")[0][-3:]
        assert found["--val"] == ["data/imagenet-1k/val", "data/imagenet-a"]
        version = (
            path.stem.split("448px_v")[1][:3].replace("_", "_").upper().replace("1_", "V1-") if "448px_v" in path.stem else ""
        )
        assert (version.startswith("V1-") and not version.endswith("0")) == ("V1-" in found["--model_name_or_path"])
        assert found["--model_name_or_path"].startswith(f"OpenGVLab/InternViT-6B-{path.stem.split('_6b_')[1][:5]}")


SEGMENTATION = {
    "linear_probing/linear_intern_vit_6b_504_80k_ade20k_bs16_lr4e-5_frozen": ("linear", False, 80000, 1, ["44"]),
    "head_tuning/upernet_intern_vit_6b_504_80k_ade20k_bs16_lr4e-5_frozen": ("upernet", False, 80000, 1, 4),
    "full_tuning/upernet_intern_vit_6b_504_80k_ade20k_bs16_lr4e-5": ("full", True, 80000, 1, 4),
    **{
        f"few_shot/linear_intern_vit_6b_504_{steps}k_ade20k_bs16_lr4e-5_1of{share}": (
            "linear",
            True,
            steps * 1000,
            share,
            ["47"],
        )
        for steps, share in ((5, 16), (10, 8), (20, 4), (40, 2), (80, 1))
    },
}


def test_segmentation(tmp_path):
    found = {p.relative_to(ROOT / "segmentation").with_suffix("").as_posix() for p in (ROOT / "segmentation").rglob("*.sh")}
    # with_suffix takes what is behind the last dot alone
    assert found == SEGMENTATION.keys() | {"run"}
    for name, (head, tunes, steps, share, blocks) in SEGMENTATION.items():
        (tmp_path / "argv").unlink(missing_ok=True)
        ((argv,), _) = run(tmp_path, f"segmentation/{name}", GPUS="1")
        given = flags(argv)
        assert (given["--head"], given["--steps"], given["--share"]) == (head, str(steps), str(share))
        assert (given["--crop"], given["--stride"], given["--learning_rate"]) == ("504", "322", "4e-5")
        assert ("--tune_tower" in given) == tunes == (given.get("--layer_decay") == "0.95")
        assert [given["--blocks"]] == blocks if head == "linear" else len(given["--blocks"]) == blocks


CLIP = {"imagenet": 10, "classification": 21, "retrieval": 4, "xtd": 8}


@pytest.mark.parametrize("mode", "cg")
@pytest.mark.parametrize("kind", CLIP)
def test_zero_shot(kind, mode, tmp_path):
    _, said = run(tmp_path, f"clip_benchmark/test_internvl_{mode}_{kind}", "--dry_run", "--batch_size", "4", TEXTS="texts")
    lines = said.splitlines()
    assert len(lines) == CLIP[kind]
    for line in lines:
        given = flags(line.split())
        assert given["--mode"] == f"InternVL-{mode.upper()}" and given["--batch_size"] == "4"
    assert len({flags(line.split())["--out"] for line in lines}) == len(lines)


def test_what_is_not_there_is_left_out(tmp_path):
    (tmp_path / "data" / "mnist").mkdir(parents=True)
    ((argv,), said) = run(tmp_path, "clip_benchmark/test_internvl_c_classification")
    assert flags(argv)["--data"] == "data/mnist" and said.count("left out: ") == 20
    _, said = run(tmp_path, "clip_benchmark/test_internvl_g_retrieval_finetune", "--dry_run", GPUS="2")
    assert said.count("paddle.distributed.launch --nproc_per_node 2") == 6 and said.count("--mode InternVL-G") == 3
