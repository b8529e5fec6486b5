"""Scripts of pretraining, preference training and InternVL3: their settings are the published ones, and each has a plan."""

import os
import subprocess
import sys

import pytest

from paddlemix.examples.internvl2.cli import ROOT
from paddlemix.training import plan
from paddlemix.training.arguments import PreferenceArguments, parse
from tests.examples.test_shell_v1 import SHELL, batch_and_processes, run, settings

LLMS = {
    "1b": ("qwen2_5_0_5b", "Qwen/Qwen2.5-0.5B-Instruct"),
    "2b": ("internlm2_5_1_8b", "internlm/internlm2_5-1_8b-chat"),
    "4b": ("qwen2_5_3b", "Qwen/Qwen2.5-3B-Instruct"),
    "8b": ("internlm2_5_7b", "internlm/internlm2_5-7b-chat"),
    "26b": ("internlm2_5_20b", "internlm/internlm2_5-20b-chat"),
    "38b": ("qwen2_5_32b", "Qwen/Qwen2.5-32B-Instruct"),
    "78b": ("qwen2_5_72b", "Qwen/Qwen2.5-72B-Instruct"),
}
BIG = ("26b", "38b", "78b")


def _stages():
    packed = dict(use_packed_ds=True, num_images_expected=48, max_packed_tokens=16384, max_buffer_size=20, strict_mode=False)
    packed |= dict(
        replacement=False, allow_overflow=False, loss_reduction="square", loss_reduction_all_gather=True, log_freq=1000
    )
    packed |= dict(max_seq_length=16384, conv_style="internvl2_5", group_by_length=False, lr_scheduler_type="cosine", bf16=True)
    packed |= dict(save_steps=100, save_total_limit=3)

    def learning(*parts):
        return {f"freeze_{part}": part not in parts for part in ("llm", "mlp", "backbone")}

    for size, (llm, llm_path) in LLMS.items():
        sharding, small = "stage3" if size in BIG else "stage1", size in ("1b", "2b", "4b")
        common = dict(packed, sharding=sharding, weight_decay=0.01 if small else 0.05)
        first = dict(common, **learning("mlp"), learning_rate=2e-4, max_steps=100_000, warmup_steps=100, drop_path_rate=0.0)
        first |= dict(llm_path=llm_path, model_name_or_path=None)
        yield f"internvl2.5/stage1/internvl2_5_{size}_{llm}_dynamic_res_stage1", first, 512
        before = "stage1"
        if size in ("8b", "26b"):
            drop = 0.4 if size == "26b" else 0.1
            half = dict(common, **learning("mlp", "backbone"), learning_rate=1e-5, max_steps=100_000, warmup_steps=100)
            half |= dict(drop_path_rate=drop, model_name_or_path=f"{WORK}/internvl2_5_{size}_{llm}_dynamic_res_stage1")
            yield f"internvl2.5/stage1.5/internvl2_5_{size}_{llm}_dynamic_res_stage1_5", half, 512
            before = "stage1_5"
        last = dict(common, **learning("llm", "mlp", "backbone"), learning_rate=2e-5 if size in BIG else 4e-5)
        last |= dict(max_steps={"1b": 22_000, "2b": 22_000, "4b": 11_000}.get(size, 5_500), warmup_ratio=0.03, warmup_steps=0)
        last |= dict(drop_path_rate=0.4 if size in BIG else 0.1)
        last |= dict(model_name_or_path=f"{WORK}/internvl2_5_{size}_{llm}_dynamic_res_{before}")
        yield f"internvl2.5/stage2/internvl2_5_{size}_{llm}_dynamic_res_stage2", last, 512


WORK = "work_dirs/internvl_chat_v2_5"


def _mpo():
    common = dict(weight_decay=0.05, freeze_llm=False, freeze_mlp=False, freeze_backbone=False, num_train_epochs=1, bf16=True)
    common |= dict(warmup_ratio=0.03, lr_scheduler_type="cosine", use_thumbnail=True, ps_version="v2", group_by_length=False)
    common |= dict(loss_type="sigmoid,bco_pair", sigmoid_loss_weight=0.8, bco_pair_loss_weight=0.2, rpo_alpha=1)
    common |= dict(per_device_train_batch_size=1, gradient_accumulation_steps=1, max_dynamic_patch=12)

    def row(model, meta, conv, rate, drop, length, sharding, **more):
        return dict(common, model_name_or_path=model, meta_path=meta, conv_style=conv, learning_rate=rate, drop_path_rate=drop,
                    max_seq_length=length, sharding=sharding, **more)  # fmt: skip

    yield (
        "internvl2.0_mpo/preference_optimization/internvl2_8b_internlm2_7b_dynamic_res_mpo_full",
        row("OpenGVLab/InternVL2-8B", "MMPR/meta.json", "internlm2-chat", 5e-6, 0.1, 6144, "stage1", save_steps=100),
        256,
    )
    for size, (llm, _) in LLMS.items():
        big = size in BIG
        settings = row(f"OpenGVLab/InternVL2_5-{size.upper()}", "MMPR-v1.1/meta.json", "internvl2_5", 1e-6, 0.4 if big else 0.1,
                       8192, "stage3" if big else "stage1")  # fmt: skip
        name = f"internvl2.5_mpo/preference_optimization/internvl2_5_{size}_{llm}_dynamic_res_mpo"
        yield name, settings, 512 if size in ("38b", "78b") else 256
    for size in ("1b", "2b", "8b", "9b", "14b", "38b", "78b"):
        big = size in ("38b", "78b")
        settings = row(f"OpenGVLab/InternVL3-{size.upper()}-Instruct", "MMPR-v1.2/meta.json", "internvl2_5", 2e-7,
                       0.4 if big else 0.1, 8192 if big else 12288, "stage1" if size in ("1b", "2b") else "stage3")  # fmt: skip
        yield f"internvl3.0/mpo/internvl3_{size}_mpo", settings, 512 if big else 256
    for size in ("1b", "2b", "4b", "8b", "14b", "30b", "38b", "241b"):
        name = {"30b": "30B-A3B", "241b": "241B-A28B"}.get(size, size.upper())
        drop = 0.0 if size in ("1b", "2b", "4b") else 0.4 if size in ("38b", "241b") else 0.1
        model = f"OpenGVLab/InternVL3_5-{name}-Instruct"
        settings = row(model, "MMPR-v1.2/meta.json", "internvl2_5", 2e-7, drop, 16384, "stage3")
        yield f"internvl3_5_qwen3/internvl3_5_{size}_mpo", settings, 256
    model = "work_dirs/internvl3_5_gpt_oss_20b_pretrain/internvl3_5_gpt_oss_20b_stage2_sft"
    settings = row(model, "MMPR-v1.2/meta.json", "internvl3_5_gpt_oss", 2e-7, 0.1, 16384, "stage3")
    yield "internvl3_5_gpt_oss/internvl3_5_gpt_oss_20b_stage3_mpo", settings, 256


def _second():
    for size in ("1b", "2b", "8b", "9b", "14b", "38b", "78b"):
        expected = dict(learning_rate=1e-5 if size == "1b" else 2e-5, weight_decay=0.05, max_dynamic_patch=12)
        expected |= dict(drop_path_rate={"14b": 0.1, "38b": 0.2, "78b": 0.4}.get(size, 0), max_seq_length=16384)
        expected |= dict(freeze_backbone=True, freeze_llm=False, freeze_mlp=False, conv_style="internvl2_5")
        expected |= dict(per_device_train_batch_size=2 if size in ("38b", "78b") else 4)
        yield f"internvl3.0/2nd_finetune/internvl3_{size}_dynamic_res_2nd_finetune_full", expected, 128


def _sft():
    """InternVL3.5's supervised stages; gpt-oss's start from the language model alone."""
    common = dict(use_packed_ds=True, num_images_expected=96, max_packed_tokens=32768, max_buffer_size=20, replacement=True)
    common |= dict(allow_overflow=False, loss_reduction="square", weight_decay=0.05, sharding="stage3", seed=42, bf16=True)
    common |= dict(max_seq_length=32768, max_dynamic_patch=12, min_num_frame=8, max_num_frame=32, warmup_ratio=0.03)
    common |= dict(freeze_llm=False, freeze_mlp=False, freeze_backbone=False, lr_scheduler_type="cosine", recompute=True)
    common |= dict(per_device_train_batch_size=1, use_thumbnail=True, ps_version="v2", force_image_size=448)
    for size in ("1b", "2b", "4b", "8b", "14b", "30b", "38b", "241b"):
        name = {"30b": "30B-A3B", "241b": "241B-A28B"}.get(size, size.upper())
        drop = 0.0 if size in ("1b", "2b", "4b") else 0.4 if size in ("38b", "241b") else 0.1
        own = dict(model_name_or_path=f"OpenGVLab/InternVL3_5-{name}-Pretrained", conv_style="internvl2_5", max_steps=8_000)
        own |= dict(learning_rate=2e-5 if size == "241b" else 8e-5, drop_path_rate=drop)
        yield f"internvl3_5_qwen3/internvl3_5_{size}_sft", common | own, 512
    stem = "internvl3_5_gpt_oss_20b"
    gpt_oss = common | dict(conv_style="internvl3_5_gpt_oss", drop_path_rate=0.1)
    first = dict(vision_path="OpenGVLab/InternViT-300M-448px-V2_5", llm_path="openai/gpt-oss-20b", freeze_mlp=False)
    first |= dict(model_name_or_path=None, freeze_llm=True, freeze_backbone=True, learning_rate=1e-3, max_steps=5_000)
    first |= dict(max_seq_length=16384, warmup_ratio=0.01)
    yield f"internvl3_5_gpt_oss/{stem}_stage0_mlp", gpt_oss | first, 256
    for stage, before, rate, steps in (("1_pretrain", "0_mlp", 2e-5, 15_000), ("2_sft", "1_pretrain", 8e-5, 8_000)):
        own = dict(model_name_or_path=f"work_dirs/{stem}_pretrain/{stem}_stage{before}", learning_rate=rate, max_steps=steps)
        yield f"internvl3_5_gpt_oss/{stem}_stage{stage}", gpt_oss | own, 512


STAGES, MPO, SECOND, SFT = list(_stages()), list(_mpo()), list(_second()), list(_sft())
CASES = [*STAGES, *MPO, *SECOND, *SFT]
TRAINERS = {"stage": "internvl_chat_pretrain.py", "mpo": "internvl_chat_mpo.py", "2nd": "internvl_chat_finetune.py"}
ENDINGS = ("stage1", "stage1.5", "stage2", "preference_optimization", "mpo", "internvl3_5_qwen3", "internvl3_5_gpt_oss")


def test_every_script_is_there():
    found = {str(path.relative_to(SHELL))[:-3] for path in SHELL.rglob("*.sh") if path.parent.name in ENDINGS}
    found |= {str(path.relative_to(SHELL))[:-3] for path in SHELL.glob("internvl3.0/2nd_finetune/*.sh")}
    assert found == {name for name, *_ in CASES}


@pytest.mark.parametrize("name, expected, batch", CASES, ids=[case[0].rpartition("/")[2] for case in CASES])
def test_settings_are_the_published_ones_and_there_is_a_plan(name, expected, batch, tmp_path, capsys):
    argv = run(tmp_path, SHELL / f"{name}.sh")
    trainer = next(word for word in argv if word.endswith(".py"))
    supervised = any(name == case[0] for case in SFT)
    kind = "stage" if "/stage" in name or supervised else "2nd" if "2nd" in name else "mpo"
    assert os.path.basename(trainer) == TRAINERS[kind]
    extra = (PreferenceArguments,) if kind == "mpo" else ()
    args = settings(argv, lambda flags: parse(flags, extra=extra))
    assert {key: args[key] for key in expected} == expected
    assert batch_and_processes(argv, args)[0] == batch
    told = run(tmp_path, SHELL / f"{name}.sh", "--dry_run")
    assert os.path.basename(told[0]) == TRAINERS[kind]
    plan.main([word for word in told[1:] if word != "--dry_run"], extra=extra)
    assert "peak" in capsys.readouterr().out


def test_scripts_start_on_a_cpu(tmp_path):
    """One process of the real interpreter, up to the data that are not here."""
    script = SHELL / "internvl3.0/mpo/internvl3_1b_mpo.sh"
    environment = {**os.environ, "DEVICE": "cpu", "PYTHON": sys.executable, "META": "none.json", "OUTPUT_DIR": str(tmp_path)}
    checkpoint = ROOT / "demo_model"
    done = subprocess.run(
        ["sh", str(script)], cwd=tmp_path, env={**environment, "MODEL": str(checkpoint)}, capture_output=True, text=True
    )
    assert done.returncode == 1 and "meta file none.json cannot be read" in done.stderr


@pytest.mark.parametrize("name", [case[0] for case in [*SECOND, *SFT] if "gpt_oss" not in case[0]])
def test_the_stage_of_sharding_is_one_that_fits(name, tmp_path):
    """80 GB, or stage 3: the published stage is raised where the plan says that it does not fit."""
    argv = run(tmp_path, SHELL / f"{name}.sh")
    place = next(i for i, word in enumerate(argv) if word.endswith(".py"))
    model, data, train = parse(argv[place + 1 :])
    _, processes = batch_and_processes(argv, {**vars(train)})
    needed = plan.plan(plan.read_config(model), model, data, train, processes, "gpu")[2]
    assert train.sharding == "stage3" or (needed.peak + plan.OVERHEAD) < 80e9
