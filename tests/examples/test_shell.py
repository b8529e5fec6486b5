"""The shell scripts: what they start, with which numbers. The interpreter is replaced by one that writes down its arguments."""

import itertools
import json
import os
import shutil
import subprocess
import sys

import pytest

from paddlemix.examples.internvl2.cli import ROOT
from paddlemix.training.arguments import parse

SHELL = ROOT / "examples" / "internvl2" / "shell"

# size: (model, template, processes, per-device batch, learning rate, weight decay, drop path) of the published full scripts.
V2 = {
    "1b_qwen2_0_5b": ("InternVL2-1B", "Hermes-2", 8, 4, 4e-5, 0.01, 0.1),
    "2b_internlm2_1_8b": ("InternVL2-2B", "internlm2-chat", 8, 4, 4e-5, 0.01, 0.1),
    "4b_phi3_3_8b": ("InternVL2-4B", "phi3-chat", 8, 4, 4e-5, 0.01, 0.1),
    "8b_internlm2_7b": ("InternVL2-8B", "internlm2-chat", 8, 4, 4e-5, 0.05, 0.1),
    "26b_internlm2_20b": ("InternVL2-26B", "internlm2-chat", 8, 2, 2e-5, 0.05, 0.4),
    "76b_hermes2_llama3_70b": ("InternVL2-Llama3-76B", "internlm2-chat", 32, 1, 2e-5, 0.05, 0.4),
    "40b_hermes2_yi_34b": ("InternVL2-40B", "Hermes-2", 16, 2, 2e-5, 0.05, 0.4),
}
V25 = {
    "1b": ("InternVL2_5-1B", "internvl2_5", 8, 4, 4e-5, 0.01, 0.1),
    "2b": ("InternVL2_5-2B", "internvl2_5", 8, 4, 4e-5, 0.01, 0.1),
    "4b": ("InternVL2_5-4B", "internvl2_5", 8, 4, 4e-5, 0.01, 0.1),
    "8b": ("InternVL2_5-8B", "internvl2_5", 8, 4, 4e-5, 0.05, 0.1),
    "26b": ("InternVL2_5-26B", "internvl2_5", 8, 2, 2e-5, 0.05, 0.4),
    "38b": ("InternVL2_5-38B", "internvl2_5", 16, 2, 2e-5, 0.05, 0.4),
    "78b": ("InternVL2_5-78B", "internvl2_5", 32, 1, 2e-5, 0.05, 0.4),
}
SCRIPTS = {
    **{f"internvl2.0/2nd_finetune/internvl2_{size}_dynamic_res_2nd_finetune": (*row, 4096) for size, row in V2.items()},
    **{f"internvl2.5/2nd_finetune/internvl2_5_{size}_dynamic_res_2nd_finetune": (*row, 8192) for size, row in V25.items()},
}
ONE = "internvl2.0/2nd_finetune/internvl2_1b_qwen2_0_5b_dynamic_res_2nd_finetune_full.sh"
FORTY = "internvl2.0/2nd_finetune/internvl2_40b_hermes2_yi_34b_dynamic_res_2nd_finetune_full.sh"


@pytest.fixture
def run(tmp_path):
    """Runs a script in an empty directory and returns what the interpreter was given; ``run.error`` is what was said."""
    for name in ("python", "srun", "scontrol"):
        (tmp_path / "bin").mkdir(exist_ok=True)
        stub = tmp_path / "bin" / name
        stub.write_text(
            {
                "python": f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/argv\n',
                "srun": '#!/bin/sh\nSLURM_NODEID=1 exec "$@"\n',
                "scontrol": '#!/bin/sh\necho "node7\nnode8"\n',
            }[name]
        )
        stub.chmod(0o755)

    def run(script, *arguments, status=0, shell=("sh",), **environment):
        (tmp_path / "argv").unlink(missing_ok=True)
        env = {"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "HOME": str(tmp_path)}
        result = subprocess.run(
            [*shell, str(SHELL / script), *arguments], env={**env, **environment}, cwd=tmp_path, text=True, capture_output=True
        )
        run.error = result.stderr
        assert result.returncode == status, result.stderr
        return (tmp_path / "argv").read_text().splitlines() if status == 0 else None

    return run


def split(argv):
    """(what comes before the trainer's name, the trainer's arguments)."""
    place = next(i for i, word in enumerate(argv) if word.endswith("internvl_chat_finetune.py"))
    return argv[:place], argv[place + 1 :]


def test_every_published_script_is_there():
    found = {str(path.relative_to(SHELL)) for path in SHELL.glob("internvl2.*/2nd_finetune/*.sh")}
    coco = "internvl2.0/2nd_finetune/internvl2_2b_internlm2_1_8b_dynamic_res_2nd_finetune_lora_coco.sh"
    later = "internvl2.5/2nd_finetune/internvl2_5_2b_dynamic_res_2nd_finetune_lora_coco.sh"
    assert found == {coco, later, *(f"{name}_{method}.sh" for name in SCRIPTS for method in ("full", "lora"))}


@pytest.mark.parametrize("name, method", itertools.product(SCRIPTS, ("full", "lora")))
def test_hyper_parameters_are_the_published_ones(name, method, run):
    model, template, gpus, per_device, rate, decay, drop_path, length = SCRIPTS[name]
    batch = 128
    if method == "lora":
        gpus, batch, drop_path = 8 if "78b" in name or "76b" in name else 2, 16, 0.0
    launch, flags = split(run(f"{name}_{method}.sh", MASTER="node7:8080"))
    args = {k: v for part in parse(flags) for k, v in vars(part).items()}
    expected = {
        "model_name_or_path": f"OpenGVLab/{model}",
        "conv_style": template,
        "per_device_train_batch_size": per_device,
        "gradient_accumulation_steps": batch // per_device // gpus,
        "learning_rate": rate,
        "weight_decay": decay,
        "drop_path_rate": drop_path,
        "max_seq_length": length,
        "freeze_llm": method == "lora",
        "freeze_mlp": method == "lora",
        "freeze_backbone": True,
        "use_llm_lora": 16 if method == "lora" else 0,
        "max_dynamic_patch": 6,
        "force_image_size": 448,
        "warmup_ratio": 0.03,
        "lr_scheduler_type": "cosine",
        "num_train_epochs": 1,
        "recompute": True,
        "bf16": True,
        "fp16": False,
        "dynamic_image_size": True,
        "use_thumbnail": True,
        "ps_version": "v2",
        "device": "gpu",
    }
    assert {key: args[key] for key in expected} == expected
    assert launch[:2] == ["-m", "paddle.distributed.launch"]
    started = len(launch[launch.index("--devices") + 1].split(","))
    nodes = int(launch[launch.index("--nnodes") + 1]) if "--nnodes" in launch else 1
    assert started * nodes == gpus
    assert os.path.isfile(args["meta_path"])


@pytest.mark.parametrize(
    "name", ["internvl2.0/2nd_finetune/internvl2_2b_internlm2_1_8b", "internvl2.5/2nd_finetune/internvl2_5_2b"]
)
def test_captions_of_coco_are_learned_by_wider_adapters(name, run):
    """Rank 128 and 512 samples an update on eight devices, as the original's tutorial has it."""
    _, flags = split(run(f"{name}_dynamic_res_2nd_finetune_lora_coco.sh"))
    model, data, training = parse(flags)
    assert (model.use_llm_lora, training.per_device_train_batch_size, training.gradient_accumulation_steps) == (128, 4, 16)
    assert data.meta_path.endswith("coco_caption.json")


def test_devices_that_divide_layers_have_the_same_samples(run):
    launch, flags = split(run(FORTY, MASTER="node7:8080", TENSOR_PARALLEL="8"))
    _, _, training = parse(flags)
    assert (training.tensor_parallel_degree, training.gradient_accumulation_steps) == (8, 128 // 2 // 2)
    run(FORTY, status=2, MASTER="node7:8080", TENSOR_PARALLEL="3")
    assert "GPUS=16 is not a multiple of TENSOR_PARALLEL=3" in run.error


def test_a_run_that_fails_is_started_again(run, tmp_path):
    """Twice, and not once more; what ends well is not."""
    run(ONE, status=0, GPUS="2", MAX_RESTARTS="2")
    python = tmp_path / "bin" / "python"
    python.write_text(f"#!/bin/sh\necho start >> {tmp_path}/starts\nexit 7\n")
    run(ONE, status=7, GPUS="2", MAX_RESTARTS="2")
    assert (tmp_path / "starts").read_text().split() == ["start"] * 3
    assert "the run ended with status 7: start 2 of 2 again, from the last checkpoint" in run.error
    run(ONE, status=2, GPUS="2", MAX_RESTARTS="often")
    assert "MAX_RESTARTS must be a number, not 'often'" in run.error


MONKEY = dict(multi_scale="training", freeze_backbone=True, freeze_mlp=True, learning_rate=4e-9, weight_decay=0.01)


@pytest.mark.parametrize(
    "method, expected",
    [
        (
            "full",
            dict(MONKEY, freeze_llm=False, max_dynamic_patch=8, max_seq_length=8192, drop_path_rate=0.1, sharding="stage3")
            | dict(per_device_train_batch_size=2, gradient_accumulation_steps=2, save_steps=1000, save_total_limit=1),
        ),
        (
            "lora",
            dict(MONKEY, freeze_llm=True, max_dynamic_patch=6, max_seq_length=4096, drop_path_rate=0.0, sharding="stage1")
            | dict(per_device_train_batch_size=4, gradient_accumulation_steps=2, save_steps=200, use_llm_lora=16),
        ),
    ],
)
def test_minimonkey_scripts_are_the_published_ones(method, expected, run):
    launch, flags = split(run(f"../../minimonkey/shell/minimonkey_finetune_{method}.sh"))
    args = {k: v for part in parse(flags) for k, v in vars(part).items()}
    assert {key: args[key] for key in expected} == expected
    assert args["model_name_or_path"] == "OpenGVLab/InternVL2-2B" and args["conv_style"] == "internlm2-chat"
    assert len(launch[launch.index("--devices") + 1].split(",")) == 8


@pytest.mark.parametrize(
    "environment, accumulation",
    [
        (dict(GPUS="1"), 32),
        (dict(GPUS="4"), 8),
        (dict(GPUS="3", BATCH_SIZE="96", PER_DEVICE_BATCH_SIZE="8"), 4),
        (dict(DEVICE="cpu"), 32),
        (dict(DEVICE="cpu", GPUS="2", PER_DEVICE_BATCH_SIZE="1"), 64),
        (dict(DEVICE="npu", GPUS="8", BATCH_SIZE="32"), 1),
        (dict(GPUS="16", NODES="2", MASTER="a:1"), 2),
    ],
)
def test_accumulation_is_for_the_processes_that_start(environment, accumulation, run):
    launch, flags = split(run(ONE, **environment))
    train = parse(flags)[2]
    assert train.gradient_accumulation_steps == accumulation
    gpus, nodes = (int(environment.get(key, 1)) for key in ("GPUS", "NODES"))
    total = train.per_device_train_batch_size * train.gradient_accumulation_steps * gpus
    assert total == int(environment.get("BATCH_SIZE", 128))
    assert train.device == environment.get("DEVICE", "gpu")
    if gpus == 1:
        assert launch == []  # no launcher for one process
    elif train.device == "cpu":
        assert launch[launch.index("--nproc_per_node") + 1] == str(gpus) and "--devices" not in launch
    else:
        assert len(launch[launch.index("--devices") + 1].split(",")) == gpus // nodes


def test_numbers_that_do_not_divide_are_refused(run):
    run(ONE, GPUS="3", status=2)
    assert "BATCH_SIZE=128 is not a multiple of PER_DEVICE_BATCH_SIZE=4 times GPUS=3 (12)" in run.error
    run(ONE, GPUS="two", status=2)
    assert "not 'two'" in run.error
    run(ONE, GPUS="8", NODES="3", status=2)
    assert "NODES=3" in run.error
    run(ONE, PRECISION="int4", status=2)
    assert "PRECISION is 'int4'" in run.error


def test_environment_and_arguments_replace_what_is_set(run):
    flags = split(
        run(ONE, "--learning_rate", "1e-6", "--use_packed_ds", GPUS="1", MODEL="my model", META="a.json", OUTPUT_DIR="out dir")
    )[1]
    model, data, train = parse(flags)
    assert (model.model_name_or_path, data.meta_path, train.output_dir) == ("my model", "a.json", "out dir")
    assert train.learning_rate == 1e-6 and data.use_packed_ds


def test_precision(run):
    for name, half in {"bf16": "bfloat16", "fp16": "float16", "fp32": None}.items():
        assert parse(split(run(ONE, PRECISION=name))[1])[2].half == half


def test_only_visible_devices_are_used(run):
    launch, _ = split(run(ONE, GPUS="2", CUDA_VISIBLE_DEVICES="5,6,7"))
    assert launch[launch.index("--devices") + 1] == "5,6"


def test_many_machines(run):
    run(ONE, GPUS="16", NODES="2", status=2)
    assert "MASTER=host:port" in run.error
    launch, flags = split(run(ONE, GPUS="16", NODES="2", MASTER="node7:8080", NODE_RANK="1"))
    options = dict(zip(launch[2::2], launch[3::2]))
    assert (options["--nnodes"], options["--master"], options["--rank"]) == ("2", "node7:8080", "1")
    assert parse(flags)[2].gradient_accumulation_steps == 2
    # The 40B script asks for two machines, unless it is told how many devices there are.
    assert "--nnodes" in split(run(FORTY, MASTER="node7:8080"))[0]
    assert split(run(FORTY, GPUS="1"))[0] == []


def test_slurm(run):
    slurm = dict(SLURM_JOB_NODELIST="node[7-8]", SLURM_JOB_NUM_NODES="2", GPUS="16")
    launch, flags = split(run("slurm.sh", str(SHELL / ONE), "--seed", "7", **slurm))
    options = dict(zip(launch[2::2], launch[3::2]))
    assert (options["--nnodes"], options["--master"], options["--rank"]) == ("2", "node7:8080", "1")
    assert parse(flags)[2].seed == 7


def test_dry_run_starts_the_plan_alone(run):
    argv = run(ONE, "--dry_run")
    assert argv[0].endswith("internvl_chat_finetune.py") and argv[1:3] == ["--processes", "8"] and "--dry_run" in argv


@pytest.mark.parametrize("shell", [("dash",), ("bash", "--posix"), ("busybox", "sh")], ids=lambda words: words[0])
def test_scripts_run_in_every_posix_shell(shell, run):
    if shutil.which(shell[0]) is None:
        pytest.skip(f"{shell[0]} is not installed")
    assert run(ONE, GPUS="2", shell=shell) == run(ONE, GPUS="2")


def test_the_launcher_hands_the_arguments_on(tmp_path):
    """Two processes through Paddle's own launcher, with a trainer that writes down what it sees."""
    (tmp_path / "shell").symlink_to(SHELL)
    trainer = "import json, os, sys\n"
    trainer += "rank = os.environ['PADDLE_TRAINER_ID']\n"
    trainer += "json.dump([os.environ['PADDLE_TRAINERS_NUM'], sys.argv[1:]], open(f'seen{rank}', 'w'))\n"
    (tmp_path / "internvl_chat_finetune.py").write_text(trainer)
    script = (SHELL / ONE).read_text().replace('"$(dirname "$0")/../.." && pwd', "shell && pwd -L")
    (tmp_path / "script.sh").write_text(script)
    env = {**os.environ, "DEVICE": "cpu", "GPUS": "2", "PYTHON": sys.executable, "OUTPUT_DIR": "out"}
    subprocess.run(["sh", "script.sh", "--seed", "7"], cwd=tmp_path, env=env, check=True, capture_output=True)
    for rank in (0, 1):
        world, flags = json.loads((tmp_path / f"seen{rank}").read_text())
        train = parse(flags)[2]
        assert world == "2" and train.seed == 7 and train.gradient_accumulation_steps == 16


@pytest.mark.parametrize("path", sorted((SHELL / "data").glob("*.json")), ids=lambda path: path.name)
def test_shipped_meta_files_have_what_the_trainer_reads(path):
    for entry in json.loads(path.read_text()).values():
        assert entry.keys() == {"root", "annotation", "data_augment", "repeat_time", "length"}
        assert entry["annotation"].endswith(".jsonl") and entry["root"].endswith("/") and entry["length"] > 0
