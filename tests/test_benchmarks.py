"""benchmarks/inference.py and finetune.py: the commands as people run them, and their arithmetic."""

import dataclasses
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from paddlemix.examples.internvl2.cli import DEMO_MODEL
from paddlemix.models.blocks.flops import decode_bytes, decoder_flops, parameter_counts, vision_flops
from paddlemix.models.internvl2 import InternVLChatConfig, InternVLChatModel
from tests.conftest import REFERENCE

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def inference(monkeypatch):
    """The command's module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import inference

    return inference


@pytest.fixture
def finetune(monkeypatch):
    """The other command's module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import finetune

    return finetune


def run(*arguments, script="inference.py"):
    quick = ["--quick"] if script == "inference.py" else ["--steps", "1"]
    command = [sys.executable, BENCHMARKS / script, *quick, "--repeat", "1", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def figures(text):
    """``{row: (our figure, our share of the limit or None)}`` of the table in ``text``."""
    rows, names = {}, []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        names = cells if line.startswith("| |") else names
        if line.startswith("|") and cells[1][:1].isdigit():
            found = dict(zip(names, cells))
            assert not found.get("torch") and not found["ratio"]  # nothing else ran
            share = found["ours reaches"].strip("%")
            rows[cells[0]] = (float(cells[1].replace(",", "")), float(share) / 100 if share else None)
    return rows


def assert_share(text, row, flops):
    """The share of the matmul peak that ``text`` gives is the row's FLOPs, ``flops`` each, over the peak that it names."""
    figure, share = row
    peak = float(re.search(r"matmul peak float32 ([\d.]+) TFLOP/s", text)[1]) * 1e12
    expected = figure * flops / peak
    # Whole percents, three digits of the figure and two decimals of the peak are printed.
    assert share == pytest.approx(expected, abs=0.006 + expected * (0.01 + 0.006e12 / peak))


ALONE = ["--torch-python", shutil.which("false") or "/bin/false", "--sides", "ours"]


def test_bundled_model_alone():
    done = run("--model", "demo", "--dtype", "float32", *ALONE)
    assert done.returncode == 0, done.stderr
    assert "make bench-torch" in done.stdout
    assert 0 <= float(re.search(r"other programs used ([\d.]+)", done.stdout)[1]) <= os.cpu_count()
    rows = figures(done.stdout)
    names = "ViT and projector, tiles/s", "prefill, tokens/s", "decode at depth 0, tokens/s", "decode at depth 40, tokens/s"
    more = ["decode of 1 sequences, tokens/s", "decode of 2 sequences, tokens/s"]
    assert list(rows) == [*names, *more, "pixels to first token, s", "load, s", "peak memory, GB"]
    assert all(figure > 0 for figure, _ in rows.values())
    config = InternVLChatConfig.from_pretrained(str(DEMO_MODEL))
    assert_share(done.stdout, rows[names[0]], vision_flops(config, 1))
    assert_share(done.stdout, rows[names[1]], decoder_flops(config, 40) / 40)
    assert all(rows[name][1] >= 0 for name in names)  # of what the machine can do
    assert 0.03 < rows["peak memory, GB"][0] < 4  # the weights alone are 10 MB


def test_a_run_goes_on_where_it_ended(tmp_path):
    kept = tmp_path / "runs.jsonl"
    arguments = ["--model", "demo", "--dtype", "int4", "--rows", "batch,load", "--keep", str(kept), *ALONE]
    first = run(*arguments)
    assert first.returncode == 0, first.stderr
    assert "ours, activations in 8 bits" in first.stdout and len(kept.read_text().splitlines()) == 2
    lines = kept.read_text().splitlines()
    kept.write_text(re.sub(r'"load": [\d.e-]+', '"load": 1000.0', lines[0]) + "\n" + lines[1] + "\n")
    again = run(*arguments)
    assert kept.read_text().splitlines()[1:] == lines[1:] and "| load, s | 1,000" in again.stdout


@pytest.mark.parametrize(
    "arguments, code, words",
    [
        (["--rows", "vit,speed"], 2, "speed"),
        (["--model", "/no/such/model"], 1, "/no/such/model"),
        (["--torch-python", "/no/such/python"], 1, "/no/such/python"),
    ],
)
def test_wrong_arguments_are_named(arguments, code, words):
    done = run(*arguments)
    assert done.returncode == code
    assert words in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("weights", [None, "int4"])
def test_ratios_and_shares(inference, weights):
    config = InternVLChatConfig.from_pretrained(REFERENCE / "qwen2" / "checkpoint")
    spec = {"rows": list(inference.ROWS), "prompt": 88, "depths": [0, 88], "batches": [8]}
    spec |= {"weights": weights, "products": "bfloat16"}
    peak, bandwidth = 1e12, 1e10
    read = decode_bytes(config, 88, "bfloat16")
    if weights:
        counts = parameter_counts(config)
        read += counts["decoder"] * (0.5 + 4 / 64 - 2) + counts["head"] * (1 + 2 / 64 - 2)
    ours = {
        "vit": peak / vision_flops(config, 1) / 2,  # half of the peak
        "prefill": peak / (decoder_flops(config, 88) / 88) / 4,
        "decode 0": 5.0,
        "decode 88": bandwidth / read / 10,
        "batch 8": 30.0,
        "first": 2.0,
        "load": 3.0,
        "memory": 4e9,
    }
    worse = {row: figure * (2 if row in ("first", "load", "memory") else 0.5) for row, figure in ours.items()}
    better = {**dict.fromkeys(ours), "load": 1.5, "batch 8": 40.0}
    limits = {"matmul peak": peak, "memory reads": bandwidth}
    lines = list(inference.table(config, spec, {"ours": ours, "torch": worse, "OpenVINO": better}, limits))
    cells = {}
    for line in lines[2:]:
        name, *values = (cell.strip() for cell in line.strip("|").split("|"))
        cells[name] = values
    ratios = {name: values[3] for name, values in cells.items()}
    assert ratios.pop("load, s") == "**0.50**" and ratios.pop("decode of 8 sequences, tokens/s") == "**0.75**"
    assert set(ratios.values()) == {"2.00"}  # against the best of the others
    assert cells["ViT and projector, tiles/s"][-1] == "50%" and cells["prefill, tokens/s"][-1] == "25%"
    assert cells["decode at depth 88, tokens/s"][-1] == "10%"
    assert cells["peak memory, GB"][:3] == ["4", "8", ""]
    alone = list(inference.table(config, spec, {"ours": ours, "torch": {"error": "none"}}, limits))
    assert all(line.strip("|").split("|")[2].strip() == "" for line in alone[2:])


def test_runs_are_merged_by_their_medians(inference):
    runs = [{"vit": n, "memory": 10 * n, "peak": n, "engine": "x"} for n in (3, 1, 2)]
    assert inference.merged(runs) == {"vit": 2, "memory": 20, "peak": 3, "engine": "x"}
    assert inference.merged([runs[0], {"error": "gone"}]) == {"error": "gone"}


def test_configuration_alone_gets_random_weights(inference, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    published = tmp_path / "shapes"
    published.mkdir()
    shutil.copy(REFERENCE / "internlm2" / "checkpoint" / "config.json", published)
    directory = inference.sides.checkpoint_directory(str(published))
    assert directory.is_relative_to(tmp_path / "cache")
    model = InternVLChatModel.from_pretrained(str(directory), dtype="float32")
    pixels = np.random.default_rng(0).standard_normal([1, 3, 112, 112], np.float32)
    features = model.extract_feature(pixels).numpy()
    assert np.isfinite(features).all() and features.std() > 1e-3
    written = os.stat(directory / "model.safetensors").st_mtime_ns
    assert inference.sides.checkpoint_directory(str(published)) == directory
    assert os.stat(directory / "model.safetensors").st_mtime_ns == written  # once is enough
    # A complete checkpoint is measured as it is.
    whole = REFERENCE / "qwen2" / "checkpoint"
    assert inference.sides.checkpoint_directory(str(whole)) == whole


# ---------------------------------------------------------------------- finetune.py


def test_a_training_step_of_the_bundled_model_without_torch(finetune):
    done = run("--model", "demo", "--layers", "2", "--torch-python", shutil.which("false"), script="finetune.py")
    assert done.returncode == 0, done.stderr
    assert "With 2 layers" in done.stdout and "pip install torch==" in done.stdout
    plain, rounded = done.stdout.split("## demo, products in ")[1:]
    assert plain.startswith("float32") and rounded.startswith("bfloat16")
    assert list(figures(rounded)) == list(figures(plain)) and figures(rounded) != figures(plain)
    rows = figures(plain)
    assert list(rows) == ["step, s", "tokens/s", "samples/s", "peak memory, GB"]
    step, tokens = rows["step, s"][0], rows["tokens/s"][0]
    assert tokens * step == pytest.approx(4 * 9 + 128, rel=0.02)
    assert rows["samples/s"][0] * step == pytest.approx(1, rel=0.02)
    config = InternVLChatConfig.from_pretrained(str(DEMO_MODEL))
    config = dataclasses.replace(config, llm_config=dataclasses.replace(config.llm_config, num_hidden_layers=2))
    flops = finetune.step_flops(config, {"rows": 1, "text": 128, "answer": 64})
    assert_share(done.stdout, rows["tokens/s"], flops / (4 * 9 + 128))
    assert rows["tokens/s"][1] > 0
    assert 0.03 < rows["peak memory, GB"][0] < 4


@pytest.mark.parametrize("arguments, words", [(["--answer", "128"], "--answer"), (["--layers", "0"], "--layers")])
def test_wrong_arguments_of_finetune_are_named(arguments, words):
    done = run(*arguments, script="finetune.py")
    assert done.returncode == 2 and words in done.stderr.splitlines()[-1]


def test_the_sides_train_on_the_same_batch_and_their_losses_are_compared(finetune):
    config = InternVLChatConfig.from_pretrained(REFERENCE / "qwen2" / "checkpoint")
    spec = {"rows": 2, "text": 40, "answer": 12}
    first, second = finetune.batch(config, spec), finetune.batch(config, spec)
    assert all(np.array_equal(first[key], second[key]) for key in first)
    context = config.llm_config.vocab_size - 1
    assert ((first["input_ids"] == context).sum(1) == finetune.TILES * config.num_image_token).all()
    learned = first["labels"] >= 0
    assert (learned.sum(1) == 12).all() and (first["labels"][learned] == first["input_ids"][learned]).all()
    assert first["pixel_values"].shape == (2 * finetune.TILES, 3, 112, 112)
    ours, torch = {"losses": [2.0, 1.0]}, {"losses": [2.0, 1.25]}
    assert finetune.apart({"ours": ours, "torch": torch}) == pytest.approx(0.2)
    assert finetune.apart({"ours": ours, "torch": {"error": "no"}}) is None
    # Backward costs twice the forward pass where weights learn, nothing in the frozen tower.
    tokens = finetune.TILES * config.num_image_token + 40
    forward = decoder_flops(config, tokens, logits=12)
    assert finetune.step_flops(config, spec) == 2 * (3 * forward + vision_flops(config, finetune.TILES))
