"""Commands over several processes: who they are, how they end, and how much memory each takes."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from paddlemix.models.internvl2 import InternVLChatConfig

# Starting ranks takes long, and a meeting of four was seen to wait for ever once.
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
CHAT = [sys.executable, str(ROOT / "paddlemix" / "examples" / "internvl2" / "chat_demo.py"), "--dtype", "float32"]


def start(tag, *more):
    """The chat command over two ranks, waiting for questions; ``tag`` is in every rank's command line."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    flags = ["--tensor_parallel", "2", "--stop", tag, *more]
    return subprocess.Popen([*CHAT, *flags], env=environment, start_new_session=True, **pipes)


def pids(tag):
    """Processes whose command line has ``tag``."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line, state = (folder / "cmdline").read_bytes(), (folder / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if tag.encode() in line and state != "Z":
            found.append(int(folder.name))
    return sorted(found)


def gone(tag, seconds=30):
    deadline = time.monotonic() + seconds
    while pids(tag) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not pids(tag)


def test_two_ranks_say_what_one_does_and_leave_nothing():
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    one = subprocess.run([*CHAT, "--engine", "eager"], env=environment, capture_output=True, text=True, timeout=120)
    process = start("tag-one")
    said, errors = process.communicate(timeout=120)
    assert process.returncode == 0 and said == one.stdout and "warn" not in errors.lower(), errors
    assert gone("tag-one", 5)


@pytest.mark.slow
@pytest.mark.parametrize("end", ["interrupt", "kill the first", "kill the other", "terminate"])
def test_all_end_when_one_does(end):
    """While the first waits for the next question, and nobody is in a collective."""
    tag = f"tag-{end.replace(' ', '-')}"
    process = start(tag, "--interactive")
    try:
        assert process.stdout.readline().strip()  # the first answer
        everybody = pids(tag)
        assert len(everybody) == 2 and process.pid in everybody
        (other,) = set(everybody) - {process.pid}
        if end == "interrupt":
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        else:
            os.kill(other if end == "kill the other" else process.pid, signal.SIGTERM if end == "terminate" else signal.SIGKILL)
        process.wait(timeout=60)  # its standard input stays open: nobody has ended the conversation
        _, errors = process.communicate()
        assert gone(tag)
        if end == "interrupt":
            assert process.returncode == 130
        if end == "kill the other":
            assert process.returncode == 1
            assert re.search(rf"^error: rank 1 of 2 \(process {other}\) ended by SIGKILL", errors, re.MULTILINE), errors
            assert errors.count("rank 1 of 2") == 1
    finally:
        process.kill()


PROGRAM = """
import re, sys
import paddle
from paddlemix.models.internvl2 import InternVLChatModel
def peak(pid="self"):
    return int(re.search(r"VmHWM:\\s+(\\d+)", open(f"/proc/{pid}/status").read())[1]) / 1e6
paddle.zeros([1])
empty = peak()
model = InternVLChatModel.from_pretrained(sys.argv[1], dtype="float32", tensor_parallel=4)
print("@", *[peak(pid) - empty for pid in ["self", *(p.pid for p in model.workers.processes)]], flush=True)
model.close()
"""


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["torch", "paddle"])
def test_each_of_four_ranks_takes_its_share_of_a_gigabyte(tmp_path, layout):
    vision = dict(hidden_size=512, num_hidden_layers=4, num_attention_heads=8, intermediate_size=2048, image_size=224)
    vision.update(qkv_bias=True, qk_normalization=False, norm_type="layer_norm", patch_size=14)
    llm = dict(architectures=["Qwen2ForCausalLM"], vocab_size=32000, hidden_size=1536, intermediate_size=6144)
    llm.update(num_hidden_layers=4, num_attention_heads=12, num_key_value_heads=4)
    config = InternVLChatConfig.from_dict({"vision_config": vision, "llm_config": llm, "ps_version": "v2"})
    rng, tensors = np.random.default_rng(0), {}
    for weight in config.weight_table():
        for part in weight.parts:
            shape = part.stored_shape[::-1] if weight.linear and layout == "paddle" else part.stored_shape
            tensors[part.name] = np.full(shape, rng.normal(), "float32")
    size = sum(array.nbytes for array in tensors.values()) / 1e9
    assert 0.9 < size < 1.2
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config.save(str(tmp_path))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    peaks = [float(number) for number in re.search(r"^@ (.+)$", done.stdout, re.MULTILINE)[1].split()]
    print(json.dumps({"checkpoint": size, "above an empty process": peaks}))
    assert len(peaks) == 4 and max(peaks) < 0.45, peaks
