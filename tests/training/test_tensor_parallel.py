"""Training with layers divided over processes (gloo, loopback) against one process with the same global batch."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from paddlemix.checkpoints.files import open_weight_file
from paddlemix.training.log import read_log
from tests.conftest import REFERENCE
from tests.training.helpers import flags, run
from tests.training.test_finetune import SCRIPT, losses

pytestmark = pytest.mark.slow
COMMON = ("--max_steps", "10", "--learning_rate", "1e-4", "--weight_decay", "0.05")


def start(folder, processes, *more, **options):
    logs = folder / "logs"
    shutil.rmtree(logs, ignore_errors=True)
    launcher = [sys.executable, "-m", "paddle.distributed.launch", "--nproc_per_node", str(processes), "--log_dir", str(logs)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    arguments = [*launcher, SCRIPT, *flags(folder, *COMMON, *more, **options)]
    return subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run_many(folder, processes, *more, **options):
    process = start(folder, processes, *more, **options)
    output, _ = process.communicate(timeout=400)
    said = output + "".join(path.read_text() for path in sorted((folder / "logs").glob("workerlog.*")))
    assert process.returncode == 0, said


def norms(folder, name):
    return [row["grad_norm"] for row in read_log(str(folder / name / "train_log.jsonl")) if "grad_norm" in row]


def tensors(folder):
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        if not path.name.startswith("optimizer"):
            with open_weight_file(str(path)) as stored:
                found |= {
                    name: tensor.read(0, max(1, tensor.shape[0] if tensor.shape else 1)) for name, tensor in stored.items()
                }
    return found


PACKED = "--use_packed_ds True --max_packed_tokens 200 --max_seq_length 200 --num_images_expected 6 --max_buffer_size 2"
MIXTURE = REFERENCE / "internvl3" / "qwen3_moe" / "checkpoint"
EXPERTS = f"--model_name_or_path {MIXTURE} --conv_style internvl2_5 --force_image_size "
EXPERTS += str(json.loads((MIXTURE / "config.json").read_text())["force_image_size"])
SINGLE, FOUR = "--per_device_train_batch_size 1", "--gradient_accumulation_steps 4 --per_device_train_batch_size 1"
CASES = {
    # processes, of which divide a layer; flags; those that differ in one process; how far losses may be apart
    "tp2": (2, 2, "", "", 1e-5),
    "tp4 with two key heads": (4, 4, "", "", 1e-5),
    "tp2 dp2": (4, 2, "--per_device_train_batch_size 1", "--gradient_accumulation_steps 2", 1e-5),
    "tp2 stage1": (4, 2, "--per_device_train_batch_size 1 --sharding stage1", "--gradient_accumulation_steps 2", 1e-4),
    "tp2 stage2": (4, 2, "--per_device_train_batch_size 1 --sharding stage2", "--gradient_accumulation_steps 2", 1e-4),
    "tp2 stage3": (4, 2, "--per_device_train_batch_size 1 --sharding stage3", "--gradient_accumulation_steps 2", 1e-4),
    "lora": (2, 2, "--freeze_llm True --use_llm_lora 4 --use_backbone_lora 2 --lora_dropout 0", "", 1e-4),
    "lora with dropout": (4, 4, "--freeze_llm True --use_llm_lora 4", "", 1e-4),
    "packing": (2, 2, PACKED, "", 1e-5),
    "recompute with the tower": (2, 2, "--recompute True --freeze_backbone False", "", 1e-5),
    "experts": (2, 2, EXPERTS, "", 1e-5),
    "experts over four": (4, 4, EXPERTS, "", 1e-5),
    # States divided over two of four processes, and twice there.
    "two stage1 of two": (4, 1, f"{SINGLE} --sharding_parallel_degree 2 --sharding stage1", FOUR, 1e-4),
    "two stage2 of two": (4, 1, f"{SINGLE} --sharding_parallel_degree 2 --sharding stage2", FOUR, 1e-4),
    "two stage3 of two": (4, 1, f"{SINGLE} --sharding_parallel_degree 2 --sharding stage3", FOUR, 1e-4),
}


def _without_sharding(more):
    found = more.split()
    return found[: found.index("--sharding")] if "--sharding" in found else found


@pytest.mark.parametrize("case", CASES)
def test_losses_are_those_of_one_process(tmp_path, case):
    processes, tensor, more, alone, tolerance = CASES[case]
    family = "llama_vit6b" if "tower" in case else "qwen2"
    run(tmp_path, *COMMON, *_without_sharding(more), *alone.split(), family=family, output="one")
    run_many(tmp_path, processes, *more.split(), "--tensor_parallel_degree", str(tensor), family=family, output="many")
    one, many = losses(tmp_path, "one"), losses(tmp_path, "many")
    assert len(one) == 10 and list(many.values()) == pytest.approx(list(one.values()), rel=tolerance)
    assert norms(tmp_path, "many") == pytest.approx(norms(tmp_path, "one"), rel=10 * tolerance)
    ours, theirs = tensors(tmp_path / "many"), tensors(tmp_path / "one")
    assert ours.keys() == theirs.keys()  # the original's layout, whole
    assert all(ours[name].shape == theirs[name].shape for name in ours)


DATA_PARALLEL = ("--per_device_train_batch_size", "1")  # two of them have the batch of one


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize(
    "flags",
    [("--tensor_parallel_degree", "2"), DATA_PARALLEL, (*DATA_PARALLEL, "--sharding", "stage3")],
    ids=["tensor", "data", "stage3"],
)
def test_a_killed_run_goes_on_with_equal_losses_over_any_number_of_ranks(tmp_path, flags, victim):
    """SIGKILL to either rank: all end; the last checkpoint goes on over two ranks, and over one."""
    saving = ("--save_strategy", "steps", "--save_steps", "4", "--lr_scheduler_type", "constant")
    run_many(tmp_path, 2, *saving, *flags, output="whole")
    whole = losses(tmp_path, "whole")
    for output, again in (("two", 2), ("one", 1)):
        process = start(tmp_path, 2, *saving, *flags, "--max_steps", "2000", output=output)
        folder = tmp_path / output
        deadline = time.monotonic() + 120
        while not (folder / "checkpoint-4").is_dir() and time.monotonic() < deadline:
            time.sleep(0.05)
        ranks = ranks_of(folder)
        os.kill(ranks[victim], signal.SIGKILL)
        began = time.monotonic()
        process.communicate(timeout=60)
        assert process.returncode != 0 and time.monotonic() - began < 30
        assert not any(os.path.exists(f"/proc/{pid}") for pid in ranks.values())
        other = (tmp_path / "logs" / f"workerlog.{1 - victim}").read_text()
        told = [line for line in other.splitlines() if line.startswith("error: ")]
        assert len(told) == 1 and f"rank {victim} (process {ranks[victim]}) has ended" in told[0], other
        for path in folder.glob("checkpoint-*"):
            if path.name != "checkpoint-4":
                shutil.rmtree(path)
        if again == 1:
            run(tmp_path, *COMMON, *saving, output=output)
        else:
            run_many(tmp_path, 2, *saving, *flags, output=output)
        assert list(losses(tmp_path, output).values()) == pytest.approx(list(whole.values()), rel=1e-5)


def ranks_of(folder):
    """Process of each rank of a run that writes to ``folder``."""
    found = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            variables, words = (open(f"/proc/{name}/{part}", "rb").read().split(b"\0") for part in ("environ", "cmdline"))
        except OSError:
            continue
        rank = next((v[18:] for v in variables if v.startswith(b"PADDLE_TRAINER_ID=")), None)
        if rank is not None and str(folder).encode() in words:
            found[int(rank)] = int(name)
    return found
