"""What a model takes: its weights once, its keys and values, and what it computes with; never a second copy."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from paddlemix.kernels import cpu as kernels
from paddlemix.models.internvl2 import InternVLChatConfig

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"

pytestmark = pytest.mark.skipif(
    not kernels.available("float32") or not Path("/proc/self/clear_refs").exists(), reason="needs the CPU kernels and Linux"
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Random weights, 410 MB of bfloat16; and a folder for caches."""
    folder = tmp_path_factory.mktemp("memory")
    config = InternVLChatConfig.from_pretrained(str(BENCHMARKS / "internvl2-1b"))
    vision = dataclasses.replace(config.vision_config, num_hidden_layers=2)
    llm = dataclasses.replace(config.llm_config, num_hidden_layers=10, vocab_size=16000)
    (folder / "shapes").mkdir()
    dataclasses.replace(config, vision_config=vision, llm_config=llm).save(folder / "shapes")
    for other in (folder / "shapes").iterdir():
        if other.name != "config.json":
            other.unlink()
    program = f"import sides; print(sides.checkpoint_directory({str(folder / 'shapes')!r}))"
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "weights"), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], cwd=BENCHMARKS, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), folder / "caches"


@pytest.mark.parametrize("weights", [None, *(pytest.param(few, marks=pytest.mark.slow) for few in ("int8", "int4"))])
def test_the_peak_is_weights_cache_and_activations(checkpoint, weights):
    directory, caches = checkpoint
    spec = {"directory": directory, "dtype": "float32", "weights": weights, "parts": "language,projector,vision"}
    spec |= {"threads": 2, "tiles": 1, "prompt": 300, "answer": 4}
    built = kernels._target()[2]  # the kernels are not compiled again for a cache of its own
    room = caches / str(weights) / "paddlemix"
    room.mkdir(parents=True)
    os.link(built, room / built.name) if os.stat(built).st_dev == os.stat(room).st_dev else (room / built.name).write_bytes(
        built.read_bytes()
    )
    environment = {**os.environ, "XDG_CACHE_HOME": str(room.parent), "PYTHONPATH": os.pathsep.join(sys.path)}
    for way in ("first", "mapped"):
        command = [sys.executable, str(BENCHMARKS / "memory.py"), "--load", json.dumps(spec)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        row = json.loads(done.stdout.splitlines()[-1])
        assert (room / "packed").exists() and row["weights"] > {None: 700e6, "int8": 180e6, "int4": 110e6}[weights], way
        allowed = row["weights"] + row["working"] + row["scratch"]  # keys and values are among the tensors
        assert row["peak"] <= 1.05 * allowed, (way, row, row["peak"] / allowed)
