"""The scripts of InternVL-Chat-LLaVA, of Chat V1.2 and V1.5 and of domain adaptation: their settings are the published ones."""

import os
import stat
import subprocess
import sys

import pytest

from paddlemix.examples.internvl2.cli import ROOT
from paddlemix.training.arguments import parse
from paddlemix.training.llava import parse_llava

SHELL = ROOT / "examples" / "internvl2" / "shell"
LLAVA = ROOT / "examples" / "internvl_llava" / "scripts_internvl"
STUB = """#!/bin/sh
printf "%s\\n" "$@" > "$ARGV"
"""


def run(folder, script, *arguments, **environment):
    """What the interpreter is given by a script, or srun."""
    for name in ("python", "srun"):
        path = folder / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(STUB)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    env = {"PATH": f"{folder}/bin:/usr/bin:/bin", "HOME": str(folder), "ARGV": str(folder / "argv"), "MASTER": "a:1"}
    done = subprocess.run(
        ["sh", str(script), *arguments], env={**env, **environment}, cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return (folder / "argv").read_text().splitlines()


def settings(argv, reader):
    """What the trainer is told, as one dictionary."""
    place = next(i for i, word in enumerate(argv) if word.endswith(".py"))
    return {key: value for part in reader(argv[place + 1 :]) for key, value in vars(part).items()}


def batch_and_processes(argv, args):
    """Samples of an update, and processes."""
    nodes = int(argv[argv.index("--nnodes") + 1]) if "--nnodes" in argv else 1
    processes = nodes * (len(argv[argv.index("--devices") + 1].split(",")) if "--devices" in argv else 1)
    return args["per_device_train_batch_size"] * args["gradient_accumulation_steps"] * processes, processes


def _llava():
    for px, sizes, tower, layer in (
        ("224to336", ("7b", "13b"), "InternViT-6B-224px", -4),
        ("448", ("7b", "13b"), "InternViT-6B-448px", -4),
        ("448_v1_2", ("13b",), "InternViT-6B-448px-V1-2", -1),
        ("448_v1_5", ("13b",), "InternViT-6B-448px-V1-5", -1),
    ):
        for size in sizes:
            common = dict(model_name_or_path=f"lmsys/vicuna-{size}-v1.5", vision_tower=f"OpenGVLab/{tower}")
            common |= dict(mm_vision_select_layer=layer, mm_projector_type="mlp2x_gelu", bf16=True, recompute=True)
            common |= dict(
                num_train_epochs=1, warmup_ratio=0.03, weight_decay=0.0, lr_scheduler_type="cosine", model_max_length=2048
            )
            common |= dict(mm_use_im_patch_token=False, save_total_limit=3)
            stem, new = f"internvit6b_{px}_vicuna{size}", layer == -1
            first = dict(version="plain", learning_rate=1e-3, tune_mm_mlp_adapter=True, image_aspect_ratio="square")
            first |= dict(
                sharding="stage1" if new else "stage2", per_device_train_batch_size=16 if new else 32, save_steps=1000
            )
            first |= dict(data_path="playground/data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json")
            yield f"pretrain_{stem}", dict(common, **first), 256, 8
            second = dict(
                version="v1", learning_rate=2e-5, tune_mm_mlp_adapter=False, image_aspect_ratio="pad", freeze_llm=False
            )
            second |= dict(sharding="stage3", per_device_train_batch_size=16, group_by_modality_length=True)
            second |= dict(
                pretrain_mm_mlp_adapter=f"work_dirs/pretrain_{stem}/mm_projector.bin", save_steps=100 if new else 1000
            )
            second |= dict(data_path="playground/llava_v1_5_mix665k.json", image_folder="playground/data")
            yield f"finetune_{stem}", dict(common, **second), 128, 8
    custom = dict(common, vision_tower="OpenGVLab/InternViT-6B-224px", mm_vision_select_layer=-4, version="v1", data_path=None)
    custom |= dict(group_by_modality_length=False, sharding="stage1", per_device_train_batch_size=2, learning_rate=2e-5)
    yield "finetune_internvit6b_224to336_vicuna13b_custom_data", custom, 512, 128


CASES = list(_llava())


def test_every_script_of_llava_is_there():
    assert {path.stem for path in LLAVA.glob("*.sh")} == {name for name, *_ in CASES} | {"run"}


@pytest.mark.parametrize("name, expected, batch, processes", CASES, ids=[case[0] for case in CASES])
def test_llava_settings(name, expected, batch, processes, tmp_path):
    argv = run(tmp_path, LLAVA / f"{name}.sh")
    args = settings(argv, parse_llava)
    assert {key: args[key] for key in expected} == expected
    assert batch_and_processes(argv, args) == (batch, processes)


def _chat():
    one = dict(dynamic_image_size=False, use_thumbnail=False, ps_version="v1", max_seq_length=2048)
    tiled = dict(dynamic_image_size=True, use_thumbnail=True, ps_version="v2", max_dynamic_patch=12)

    def row(learns, rate, decay, drop, sharding, **more):
        frozen = {f"freeze_{name}": name not in learns.split() for name in ("llm", "mlp", "backbone")}
        return dict(frozen, learning_rate=rate, weight_decay=decay, drop_path_rate=drop, sharding=sharding, **more)

    everything, projector, both = "llm mlp backbone", "mlp", "mlp backbone"
    stem = "internvl1.2/hermes2_yi34b/internvl_chat_v1_2_hermes2_yi34b_448_res_finetune"
    parts = dict(
        vision_path="OpenGVLab/InternViT-6B-448px-V1-2", model_name_or_path=None, mlp_path="pretrained/hermes_2_yi_34b.pth"
    )
    yield stem, row(everything, 1e-5, 0.05, 0.4, "stage3", **one, **parts, conv_style="Hermes-2", save_total_limit=3), 512, 64
    stem = "internvl1.2/2nd_finetune/internvl_chat_v1_2_hermes2_yi34b_448_res_2nd_finetune_"
    second = dict(model_name_or_path="OpenGVLab/InternVL-Chat-V1-2-Plus", save_total_limit=1, conv_style="Hermes-2", **one)
    yield f"{stem}full", row("llm mlp", 1e-5, 0.05, 0, "stage3", **second), 128, 16
    yield f"{stem}lora", row("", 1e-5, 0.05, 0, "stage3", **second, use_llm_lora=16), 16, 2
    for name, conv, first, then, sharding in (
        ("internlm2_20b", "internlm2-chat", (both, 1e-5, 0.05, 0.2, 256, 4), (2e-5, 0.05, 0.4, 256, 4, 4096), "stage3"),
        ("hermes2_yi34b", "Hermes-2", (projector, 1e-4, 0.05, 0, 256, 2), (2e-5, 0.05, 0.4, 256, 4, 4096), "stage3"),
        ("internlm2_1_8b", "internlm2-chat", (both, 2e-5, 0.01, 0.1, 128, 8), (4e-5, 0.01, 0.1, 128, 4, 8192), "stage1"),
        ("phi3_3_8b", "phi3-chat", (projector, 2e-4, 0.05, 0, 128, 8), (4e-5, 0.05, 0.1, 128, 4, 8192), "stage1"),
    ):
        stem = f"internvl1.5/{name}/internvl_chat_v1_5_{name}_dynamic_res_"
        learns, rate, decay, drop, cards, each = first
        more = dict(tiled, conv_style=conv, max_seq_length=4096, per_device_train_batch_size=each, warmup_steps=100)
        more |= dict(group_by_length=False, save_total_limit=3, save_steps=200)
        yield f"{stem}pretrain", row(learns, rate, decay, drop, sharding, **more), 2048, cards
        rate, decay, drop, cards, each, length = then
        more = dict(tiled, conv_style=conv, max_seq_length=length, per_device_train_batch_size=each, warmup_ratio=0.03)
        more |= dict(
            group_by_length=True,
            warmup_steps=0,
            model_name_or_path=f"work_dirs/internvl_chat_v1_5/{stem[12 + len(name) + 1 :]}pretrain",
        )
        yield f"{stem}finetune", row(everything, rate, decay, drop, sharding, **more), 1024, cards
    for name, model, rate, decay, drop, each, sharding in (
        ("internlm2_20b", "InternVL-Chat-V1-5", 2e-5, 0.05, 0.4, 2, "stage3"),
        ("internlm2_1_8b", "Mini-InternVL-Chat-2B-V1-5", 4e-5, 0.01, 0.1, 4, "stage1"),
        ("phi3_3_8b", "Mini-InternVL-Chat-4B-V1-5", 4e-5, 0.05, 0.1, 4, "stage1"),
    ):
        stem = f"internvl1.5/2nd_finetune/internvl_chat_v1_5_{name}_dynamic_res_2nd_finetune_"
        more = dict(tiled, model_name_or_path=f"OpenGVLab/{model}", max_seq_length=4096, per_device_train_batch_size=each)
        more |= dict(save_total_limit=1)
        yield f"{stem}full", row("llm mlp", rate, decay, drop, sharding, **more), 128, 8
        yield f"{stem}lora", row("", rate, decay, 0, sharding, **more, use_llm_lora=16), 16, 2
    for size, model, conv, epochs in (
        ("1b_qwen2_0_5b", "InternVL2-1B", "Hermes-2", 2),
        ("2b_internlm2_1_8b", "InternVL2-2B", "internlm2-chat", 2),
        ("4b_phi3_3_8b", "InternVL2-4B", "phi3-chat", 1),
    ):
        for domain, steps in (("bdd", 240), ("drivelm", 15100), ("medical", 2200), ("remote", 2500)):
            save = 500 if domain == "remote" and size[0] != "4" else 72 if (domain, size[0]) == ("bdd", "2") else 700
            more = dict(model_name_or_path=f"OpenGVLab/{model}", conv_style=conv, num_train_epochs=epochs, max_steps=steps)
            more |= dict(
                use_packed_ds=True, num_images_expected=48, max_packed_tokens=16384, max_buffer_size=20, save_steps=save
            )
            more |= dict(loss_reduction="square", loss_reduction_all_gather=True, group_by_length=False, max_seq_length=8192)
            more |= dict(meta_path=f"InternVL-Domain-Adaptation-Data/train_meta/internvl_1_2_finetune_{domain}.json")
            more |= dict(save_total_limit=7 if (domain, size[0]) == ("remote", "2") else 3)
            name = f"mini_internvl/domain_adaptation/internvl2_{size}_dynamic_res_finetune_{domain}"
            yield name, row(everything, 1e-5, 0.01, 0.1, "stage1", **more), 8 if domain == "drivelm" else 64, 8


CHAT = list(_chat())


def test_every_script_of_v1_is_there():
    folders = ("internvl1.2", "internvl1.5", "mini_internvl")
    found = {
        path.relative_to(SHELL).with_suffix("").as_posix() for folder in folders for path in (SHELL / folder).rglob("*.sh")
    }
    # with_suffix takes what is behind the last dot of the name alone
    assert found == {name for name, *_ in CHAT}


@pytest.mark.parametrize("name, expected, batch, processes", CHAT, ids=[case[0].rsplit("/", 1)[1] for case in CHAT])
def test_chat_settings(name, expected, batch, processes, tmp_path):
    argv = run(tmp_path, SHELL / f"{name}.sh")
    args = settings(argv, parse)
    assert {key: args[key] for key in expected} == expected
    assert batch_and_processes(argv, args) == (batch, processes)


def test_with_a_partition_the_script_starts_itself_there(tmp_path):
    script = SHELL / f"{CHAT[0][0]}.sh"
    more = dict(PARTITION="vlm", GPUS="32", SRUN_ARGS="--quiet --mem=0", QUOTA_TYPE="reserved", PER_DEVICE_BATCH_SIZE="8")
    argv = run(tmp_path, script, "--seed", "7", **more)
    assert argv[:4] == ["-p", "vlm", "--gres=gpu:8", "--nodes=4"]
    assert {"--quiet", "--mem=0", "--quotatype=reserved", "--cpus-per-task=80"} <= set(argv)
    assert str(script) in argv and argv[-2:] == ["--seed", "7"]
    # What srun starts on a machine is the same script, which then starts the launcher.
    (tmp_path / "bin" / "scontrol").write_text("#!/bin/sh\necho node7\n")
    os.chmod(tmp_path / "bin" / "scontrol", 0o755)
    command = argv[argv.index("sh") :]
    env = {
        "PATH": f"{tmp_path}/bin:/usr/bin:/bin",
        "ARGV": str(tmp_path / "argv"),
        "SLURM_NODEID": "2",
        "NODES": "4",
        "GPUS": "32",
    }
    subprocess.run(["/bin/sh", *_unfolded(command[1:])], env=env, cwd=tmp_path, check=True, capture_output=True)
    started = (tmp_path / "argv").read_text().splitlines()
    assert started[started.index("--rank") + 1] == "2" and started[started.index("--master") + 1] == "node7:8080"
    assert started[started.index("--nnodes") + 1] == "4"
    assert run(tmp_path, script, "--dry_run", **more)[0].endswith("internvl_chat_finetune.py")


def _unfolded(lines):
    """Arguments of which one, the text behind -c, was written over several lines."""
    end = next(i for i, line in enumerate(lines) if "exec sh" in line)
    return [lines[0], "\n".join(lines[1 : end + 1]), *lines[end + 1 :]]


@pytest.mark.slow
@pytest.mark.parametrize("name", [CHAT[0][0], CHAT[3][0], CHAT[4][0], CHAT[-1][0]])
def test_dry_runs_print_a_plan(name, tmp_path):
    env = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT.parent)}
    done = subprocess.run(["sh", str(SHELL / f"{name}.sh"), "--dry_run"], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "memory of each of" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", [case[0] for case in CASES])
def test_dry_runs_of_llava_print_a_plan(name, tmp_path):
    env = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT.parent)}
    done = subprocess.run(["sh", str(LLAVA / f"{name}.sh"), "--dry_run"], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "memory of each of" in done.stdout and done.stdout.startswith("learns: projector")
