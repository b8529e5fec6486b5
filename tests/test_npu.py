"""Everything that can be tried of Ascend without a card: on tests/fake_npu, a Paddle device named npu on host memory.

Placement, fallback to CPU and collectives are real there; arithmetic in bfloat16, speed and memory are not. `make test-npu`
runs these; they need g++, and are no part of `make test`.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from paddlemix.training.log import read_log
from tests.conftest import REFERENCE
from tests.datasets.helpers import write_meta
from tests.training.helpers import RECORDS, flags
from tests.training.helpers import run as train_here
from tests.training.test_finetune import SCRIPT, losses
from tests.training.test_tensor_parallel import CASES, COMMON

ROOT = Path(__file__).parents[1]
COMMANDS = ROOT / "paddlemix" / "examples" / "internvl2"
IMAGES = ROOT / "paddlemix" / "demo_images"

pytestmark = [
    pytest.mark.npu,
    pytest.mark.skipif(shutil.which("g++") is None, reason="the stand-in needs g++"),
]


def build(folder, *more):
    """Environment in which Paddle finds a stand-in built into ``folder``, with the settings of tools/npu/env.sh."""
    script = ROOT / "tests" / "fake_npu" / "build.sh"
    done = subprocess.run(["bash", script, sys.executable, folder, *more], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    code = "source tools/npu/env.sh && env -0"
    environment = {
        **os.environ,
        "CUSTOM_DEVICE_ROOT": str(folder),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    told = subprocess.run(["bash", "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return dict(line.split("=", 1) for line in told.stdout.split("\0") if "=" in line)


@pytest.fixture(scope="module")
def npu(tmp_path_factory):
    """Environment with two stand-in devices."""
    return build(tmp_path_factory.mktemp("npu", numbered=False))


def run(arguments, environment, code=0):
    """Output of a Python command, as (stdout, stderr)."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == code, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout, done.stderr


def test_reference_checkpoints(npu):
    """Tokens of every chat and losses of every step, of all four families."""
    found = {}
    for name in ("cpu", "npu:0"):
        stdout, _ = run(["-m", "tests.on_device", name], npu)
        found[name] = json.loads(re.search(r"^@(.*)$", stdout, re.MULTILINE)[1])
    for family, actual in found["npu:0"].items():
        assert actual["places"] == ["Place(npu:0)"]
        original = json.loads((REFERENCE / family / "expected.json").read_text(encoding="utf-8"))
        assert actual["tokens"] == {chat["label"]: chat["output_ids"] for chat in original["chats"]}
        assert actual["tokens"] == found["cpu"][family]["tokens"]
        assert np.abs(np.subtract(actual["losses"], found["cpu"][family]["losses"])).max() < 1e-5
        assert np.allclose(actual["losses"], original["adamw"]["losses"], rtol=1e-4)


@pytest.mark.parametrize(
    "command, flags",
    [
        (
            "chat_demo.py",
            ["--image_path", IMAGES / "scene_1.png", IMAGES / "scene_2.png", "--text", "Please describe this picture."],
        ),
        ("chat_demo_video.py", []),
    ],
)
def test_chat_commands(npu, command, flags):
    answers = {
        name: run([COMMANDS / command, *flags, "--device", name, "--dtype", "float32"], npu)[0] for name in ("npu:0", "cpu")
    }
    assert answers["npu:0"] == answers["cpu"]
    assert len(answers["cpu"]) > 10


def test_chat_over_two_devices(npu):
    """Every layer divided over two, by the command, and each of the reference's chats, streams and its batch in one launch."""
    flags = ["--image_path", IMAGES / "scene_1.png", "--text", "Please describe this picture.", "--dtype", "float32"]
    over = ["--device", "npu", "--tensor_parallel", "2"]
    answers = [run([COMMANDS / "chat_demo.py", *flags, *more], npu)[0] for more in (over, ["--device", "cpu"])]
    assert answers[0] == answers[1] and len(answers[0]) > 10
    for family in ("qwen2", "internlm2", "llama_vit6b", "phi3", "internvl3/qwen3_moe", "internvl3/gpt_oss"):
        stdout, _ = run(["-m", "tests.models.internvl2.over_two_devices", family, "npu"], npu)
        found = json.loads(re.search(r"^@(.*)$", stdout, re.MULTILINE)[1])
        original = json.loads((REFERENCE / family / "expected.json").read_text(encoding="utf-8"))
        assert found["places"] == ["Place(npu:0)"]
        assert found["tokens"] == [chat["output_ids"] for chat in original["chats"]], family
        assert ["".join(pieces).strip() for pieces in found["streams"]] == [chat["response"] for chat in original["chats"]]
        assert all(len(pieces) > 1 for pieces in found["streams"])
        assert [answer.strip() for answer in found["batch"]] == original["batch_chat"]["responses"]


TRAIN = COMMANDS / "shell" / "internvl2.0" / "2nd_finetune" / "internvl2_1b_qwen2_0_5b_dynamic_res_2nd_finetune_full.sh"
TRAIN_FLAGS = "--force_image_size 112 --max_dynamic_patch 3 --max_steps 5 --learning_rate 2e-3 --dataloader_num_workers 0"
TRAIN_FLAGS += " --report_to none --save_strategy no --disable_tqdm True"


def train(folder, device, gpus, *flags, **variables):
    """Run a shell script of fine-tuning; returns losses by step and ``{name: array}`` of what it saved.

    The settings of tools/npu/env.sh are left to the script.
    """
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("FLAGS_", "CUSTOM_DEVICE_BLACK"))}
    environment |= {"DEVICE": device, "GPUS": str(gpus), "BATCH_SIZE": "4", "PER_DEVICE_BATCH_SIZE": "1", "PRECISION": "fp32"}
    environment |= {"MODEL": str(REFERENCE / "qwen2" / "checkpoint"), "META": str(write_meta(folder, RECORDS))}
    environment |= {"OUTPUT_DIR": str(folder / "out"), "PYTHON": sys.executable}
    environment |= {"CUSTOM_DEVICE_ROOT": str(folder.parent / "npu"), **variables}
    command = ["sh", str(TRAIN), *TRAIN_FLAGS.split(), *flags]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert f"on {gpus} x {device}" in done.stdout + done.stderr
    found = {row["step"]: row["loss"] for row in read_log(str(folder / "out" / "train_log.jsonl")) if "loss" in row}
    return found, load_file(folder / "out" / "model.safetensors")


@pytest.fixture(scope="module")
def cpu_training(npu, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "cpu"
    folder.mkdir()
    return train(folder, "cpu", 1)


@pytest.mark.parametrize(
    "gpus, sharding, ranks", [(1, "stage1", 1), (2, "", 1), (2, "stage2", 1), (2, "stage3", 1), (2, "", 2)]
)
def test_fine_tuning_by_the_scripts(npu, cpu_training, tmp_path_factory, gpus, sharding, ranks):
    folder = tmp_path_factory.getbasetemp() / f"{gpus}{sharding}{ranks}"
    folder.mkdir()
    found, weights = train(folder, "npu", gpus, "--sharding", sharding, TENSOR_PARALLEL=str(ranks))
    losses, expected = cpu_training
    assert found == pytest.approx(losses, rel=1e-5) and len(found) == 5
    assert found[5] < 0.9 * found[1]
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        assert np.abs(weights[name] - value).max() < 1e-4, name


STEPS = {case: CASES[case] for case in ("tp2", "lora", "packing", "recompute with the tower", "experts")}
STEPS |= {
    stage: (2, 1, f"--per_device_train_batch_size 1 --sharding {stage}", "", 1e-4) for stage in ("stage1", "stage2", "stage3")
}


@pytest.mark.parametrize("case", STEPS)
def test_ten_steps_over_two_devices(npu, tmp_path, case):
    """Layers or states divided over two devices: the losses of one process on CPU."""
    processes, tensor, more, alone, tolerance = STEPS[case]
    family = "llama_vit6b" if "tower" in case else "qwen2"
    own = more.split() if tensor > 1 else []
    train_here(tmp_path, *COMMON, *own, *alone.split(), family=family, output="one")
    launcher = ["-m", "paddle.distributed.launch", "--devices", "0,1", "--log_dir", tmp_path / "logs"]
    divided = [*more.split(), "--tensor_parallel_degree", str(tensor), "--device", "npu"]
    given = flags(tmp_path, *COMMON, *divided, family=family, output="many")
    run([*launcher, SCRIPT, *given], {**npu, "PYTHONPATH": str(ROOT)})
    one, many = losses(tmp_path, "one"), losses(tmp_path, "many")
    assert len(one) == 10 and list(many.values()) == pytest.approx(list(one.values()), rel=tolerance)


HUNG = """
import sys, time
import paddle
from paddlemix import device
from paddlemix.errors import command_main
from paddlemix.parallel.groups import now_doing
from paddlemix.parallel.launched import world_group
device.set_device("npu")
group = world_group()
def main():
    for step in range(1, 4):
        now_doing(f"step {step}")
        if step == 3 and group.rank == 1:
            time.sleep(300)
        group.all_reduce(paddle.ones([4])).numpy()
command_main(main)()
"""


def test_a_collective_that_hangs_ends_the_run_with_step_and_name(npu, tmp_path):
    (tmp_path / "hung.py").write_text(HUNG)
    launcher = ["-m", "paddle.distributed.launch", "--devices", "0,1", "--log_dir", tmp_path / "logs", tmp_path / "hung.py"]
    environment = {**npu, "PADDLEMIX_COLLECTIVE_TIMEOUT": "5", "PYTHONPATH": str(ROOT)}
    began = time.monotonic()
    done = subprocess.run([sys.executable, *map(str, launcher)], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode != 0 and time.monotonic() - began < 90
    (told,) = re.findall(r"^error: .*$", (tmp_path / "logs" / "workerlog.0").read_text(), re.MULTILINE)
    assert re.match(r"error: step 3: all_reduce among all processes timed out after \d+ seconds: another rank hangs", told), (
        told
    )


def test_operators_of_a_block(npu):
    """Plain, as on GPU and as on Ascend, with the fused kernels played on the stand-in. A write that goes through the CPU does
    not show in what was reshaped before, so that the cache of a decode step is reshaped each time."""
    found = {}
    for name in ("npu:0", "cpu"):
        rows = [line.strip("|").split("|") for line in run(["-m", "tests.kernels.fakes", name], npu)[0].splitlines()]
        found[name] = {row[0].strip(): [int(n) for n in row[1:]] for row in rows[2:]}
    assert len(found["cpu"]) == 4
    for step, numbers in found["cpu"].items():
        more = [2, 2, 2, 0] if step == "decode step" else [0] * 4
        assert found["npu:0"][step] == [n + m for n, m in zip(numbers, more)]
        assert max(found["npu:0"][step][1:3]) <= 20 < numbers[0]


def test_choices_are_told(npu):
    _, stderr = run([COMMANDS / "chat_demo.py", "--dtype", "float32"], {**npu, "PADDLEMIX_LOG": "debug"})
    assert "norm in float32 on npu: plain (rms_norm_npu is not offered by the plug-in)" in stderr
    assert "not set" not in stderr


def test_strided_kernels_are_refused(npu):
    stdout, stderr = run([COMMANDS / "chat_demo.py"], {**npu, "FLAGS_use_stride_kernel": "1"}, code=1)
    assert stdout == ""
    assert re.search(r"^error: device 'npu' needs FLAGS_use_stride_kernel=0", stderr, re.MULTILINE)


def test_check(npu, tmp_path):
    """All passes, and every operator is told to have gone through the CPU."""
    report = tmp_path / "report.json"
    stdout, _ = run(["tools/npu/check.py", "--report", report], npu)
    told = json.loads(report.read_text(encoding="utf-8"))
    status = {result["check"]: result["status"] for result in told["results"]}
    assert told["stand_in"] and told["counts"]["fail"] == 0
    assert status["chat, float32"] == status["ten training steps, float32"] == status["all-reduce of two devices"] == "pass"
    operators = [r for r in told["results"] if r["check"].startswith("operator ")]
    assert len(operators) > 20
    for result in operators:
        name = re.search(r"operator (\w+),", result["check"])[1]
        if name != "cast":  # of float32 to float32, which does nothing
            assert result["status"] == "slow" and re.search(rf"on CPU: .*\b{name}\b", result["detail"])
    assert stdout.count("\nslow ") == told["counts"]["slow"]


def test_check_names_a_broken_operator(tmp_path):
    environment = build(tmp_path / "npu", ROOT / "tests" / "fake_npu" / "broken_gelu.cc")
    stdout, _ = run(["tools/npu/check.py"], environment, code=1)
    failed = re.findall(r"^fail +(.*?)  ", stdout, re.MULTILINE)
    assert failed == ["operator gelu, float32", "chat, float32", "ten training steps, float32"]


@pytest.mark.parametrize("kind", ["npu", "gpu"])
def test_check_without_a_device(kind):
    environment = {key: value for key, value in os.environ.items() if key != "CUSTOM_DEVICE_ROOT"}
    stdout, stderr = run([f"tools/{kind}/check.py"], environment, code=1)
    assert stdout == ""
    assert stderr.count("\n") == 1 and stderr.startswith(f"nothing to check: device '{kind}' needs")


@pytest.mark.parametrize("shell", ["bash", "sh"])
def test_settings_of_the_user_stay(shell):
    environment = {**os.environ, "FLAGS_npu_jit_compile": "1"}
    code = ". ./tools/npu/env.sh; echo $FLAGS_npu_jit_compile $FLAGS_use_stride_kernel; default A B"
    done = subprocess.run([shell, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout == f"1 {os.environ.get('FLAGS_use_stride_kernel', 0)}\n"
    from paddlemix import device

    script = (ROOT / "tools" / "npu" / "env.sh").read_text(encoding="utf-8")
    assert set(device._NPU_FLAGS) <= set(re.findall(r"^default (\w+)", script, re.MULTILINE))


def test_llava_chats_and_learns(npu, tmp_path):
    """An answer of InternVL-Chat-LLaVA by its evaluation command, and two steps of its second stage."""
    folder = REFERENCE / "internvl_llava"
    expected = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    chat, tower, base = (folder / "pretrained" / expected[name] for name in ("chat", "tower", "llm"))
    suite, place = expected["evaluation"], tmp_path / "gqa"
    place.mkdir()
    (place / "llava_gqa_testdev_balanced.jsonl").write_text(json.dumps(suite["questions"][0]) + "\n", encoding="utf-8")
    (place / "data").mkdir()
    (place / "data" / "images").symlink_to(REFERENCE / "images")
    examples = ROOT / "paddlemix" / "examples" / "internvl_llava"
    flags = [
        "--model-path",
        chat,
        "--vision-tower",
        tower,
        "--task",
        "llava-gqa",
        "--data-root",
        tmp_path,
        "--dtype",
        "float32",
    ]
    run([examples / "answer.py", *flags, "--answers-file", tmp_path / "a.jsonl", "--device", "npu:0"], npu)
    assert json.loads((tmp_path / "a.jsonl").read_text(encoding="utf-8"))["text"] == suite["model_vqa_loader"][0]["text"]

    stage = expected["stage2"]
    records = [expected["train_samples"]["v1"][i]["record"] for i in stage["samples"]]
    (tmp_path / "data.json").write_text(json.dumps(records), encoding="utf-8")
    projector = folder / "pretrained" / expected["base_and_projector"]["model"] / "mm_projector.bin"
    flags = (
        "--version v1 --mm_projector_type mlp2x_gelu --mm_vision_select_layer -4 --mm_use_im_patch_token False --max_steps 2"
    )
    flags += " --image_aspect_ratio pad --per_device_train_batch_size 3 --lr_scheduler_type constant --learning_rate 1e-3"
    flags += (
        " --max_grad_norm 0 --model_max_length 2048 --save_strategy no --logging_steps 1 --disable_tqdm True --device npu:0"
    )
    paths = ["--model_name_or_path", base, "--vision_tower", tower, "--pretrain_mm_mlp_adapter", projector]
    paths += ["--data_path", tmp_path / "data.json", "--image_folder", REFERENCE / "images", "--output_dir", tmp_path / "out"]
    run([examples / "train.py", *flags.split(), *paths], npu)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "out" / "train_log.jsonl").read_text().splitlines()]
    assert np.allclose(losses, stage["losses"][:2], rtol=2e-4)


def test_internvl_features_captions_and_a_step(npu):
    """InternVL-C and -G: what the original computes, and what a step of either training makes of the next loss, as on CPU."""
    folder = REFERENCE / "internvl_14b"
    expected = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    found = {}
    for name in ("cpu", "npu:0"):
        stdout, _ = run(["-m", "tests.models.internvl.on_device", name], npu)
        found[name] = json.loads(re.search(r"^@(.*)$", stdout, re.MULTILINE)[1])
    actual = found["npu:0"]
    assert actual["places"] == ["Place(npu:0)"]
    assert actual["captions"] == [caption["ids"] for caption in expected["captions"]]
    with np.load(folder / "expected.npz") as arrays:
        for name in ("image_c", "image_g", "logits_c", "logits_g"):
            assert np.abs(np.subtract(actual[name], arrays[name])).max() < 1e-4 * np.abs(arrays[name]).max(), name
    first = [expected["loss"]["loss"], expected["retrieval_loss"]["shared"]["loss"]]
    assert actual["losses"][::2] == pytest.approx(first, rel=1e-4)
    assert actual["losses"] == pytest.approx(found["cpu"]["losses"], rel=1e-5)
    assert actual["losses"][1] < actual["losses"][0] and actual["losses"][3] < actual["losses"][2]


def test_minimonkey_answers_with_and_without_compression(npu):
    expected = json.loads((REFERENCE / "minimonkey" / "expected.json").read_text(encoding="utf-8"))
    found = {}
    for name in ("cpu", "npu:0"):
        stdout, _ = run(["-m", "tests.models.minimonkey.on_device", name], npu)
        found[name] = json.loads(re.search(r"^@(.*)$", stdout, re.MULTILINE)[1])
    actual = found["npu:0"]
    assert actual.pop("places") == ["Place(npu:0)"]
    assert actual["dropped"] == [chat.get("dropped") if chat["scm"] else None for chat in expected["chats"]]
    assert actual == {name: found["cpu"][name] for name in actual}  # which test_minimonkey.py compares with the original's


def test_steps_of_preference_training(npu):
    expected = json.loads((REFERENCE / "mpo" / "expected.json").read_text(encoding="utf-8"))
    stdout, _ = run(["-m", "tests.training.on_device", "npu:0"], npu)
    actual = json.loads(re.search(r"^@(.*)$", stdout, re.MULTILINE)[1])
    assert actual["places"] == ["Place(npu:0)"]
    for found, step in zip(actual["steps"], expected["steps"], strict=True):
        assert found["loss"] == pytest.approx(step["loss"], rel=1e-4)
        assert found["rewards/margins"] == pytest.approx(step["rewards/margins"], rel=2e-4)
        for name, norm in step.get("grad_norms", {}).items():
            if name in found["grad_norms"]:
                assert found["grad_norms"][name] == pytest.approx(norm, rel=1e-3), name


def test_internvl3_answers_and_learns(npu):
    """Experts, sinks, sliding windows, tied embeddings, the router of tiles: answers and steps are the original's."""
    from tests.models.internvl2.on_device import CHATS, STEPS

    stdout, _ = run(["-m", "tests.models.internvl2.on_device", "npu:0"], npu)
    found = json.loads(re.search(r"^@(.*)$", stdout, re.MULTILINE)[1])
    assert tuple(found) == CHATS
    for family, actual in found.items():
        expected = json.loads((REFERENCE / "internvl3" / family / "expected.json").read_text(encoding="utf-8"))
        assert actual["places"] == ["Place(npu:0)"]
        assert actual["answers"] == {chat["label"]: chat["response"] for chat in expected["chats"][:3]}
        if "losses" in actual:
            assert np.allclose(actual["losses"], expected["train"]["adamw"]["losses"][:STEPS], rtol=3e-4)
    assert sum("losses" in actual for actual in found.values()) >= 4
