"""The converter, run as the command that users type."""

import json
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from tqdm import tqdm

from paddlemix.models.internvl2 import InternVLChatConfig
from paddlemix.models.internvl2.checkpoint import read_parameters
from paddlemix.models.internvl2.convert import convert, main
from tests.checkpoints.helpers import DEMO, equal, read_published, widen, write_safetensors
from tests.conftest import FAMILIES, REFERENCE

ROOT = Path(__file__).parents[3]


def checkpoint(family):
    return REFERENCE / family / "checkpoint"


def parameters(directory, dtype="bfloat16"):
    return dict(read_parameters(InternVLChatConfig.from_pretrained(str(directory)), directory, dtype))


def failure(capsys, *arguments):
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    assert caught.value.code == 1
    text = capsys.readouterr().err
    assert text.startswith("error: ") and text.count("\n") == 1
    return text


@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back_is_bit_identical(family, tmp_path, capsys):
    main([str(checkpoint(family)), str(tmp_path / "paddle"), "--layout", "paddle", "--max_shard_size", "250KB"])
    assert f"{checkpoint(family)}: torch layout, bfloat16" in capsys.readouterr().out
    main([str(tmp_path / "paddle"), str(tmp_path / "torch"), "--layout", "torch"])
    assert "paddle layout, bfloat16" in capsys.readouterr().out
    original, there = read_published(checkpoint(family)), read_published(tmp_path / "paddle")
    back = read_published(tmp_path / "torch")
    assert original.keys() == there.keys() == back.keys()
    for name, (_, bits) in original.items():
        tag, returned = back[name]
        assert tag == "BF16" and np.array_equal(returned.ravel(), bits.ravel()), name  # the .bin is read without shapes
        linear = returned.ndim == 2 and "embed" not in name
        assert np.array_equal(there[name][1], returned.T if linear else returned), name
    for directory in ("paddle", "torch"):
        assert equal(parameters(tmp_path / directory), parameters(checkpoint(family)))
        copied = {path.name for path in (tmp_path / directory).iterdir()}
        for path in checkpoint(family).iterdir():
            if not path.name.startswith(("model", "pytorch_model")):
                assert (tmp_path / directory / path.name).read_bytes() == path.read_bytes()
                copied.remove(path.name)
        assert all(name.startswith("model") for name in copied)
    assert len(list((tmp_path / "paddle").glob("*.safetensors"))) > 3
    assert [path.name for path in (tmp_path / "torch").glob("model*")] == ["model.safetensors"]


@pytest.mark.parametrize("layout", ["torch", "paddle"])
def test_dtype_is_converted_and_noted(layout, tmp_path):
    convert(checkpoint("qwen2"), tmp_path / "wide", layout, dtype="float32")
    original, wide = read_published(checkpoint("qwen2")), read_published(tmp_path / "wide")
    for name, (_, bits) in original.items():
        tag, values = wide[name]
        turned = layout == "paddle" and bits.ndim == 2 and "embed" not in name
        assert tag == "F32" and np.array_equal(values.view("f4"), widen(bits.T if turned else bits))
    config = json.loads((tmp_path / "wide/config.json").read_text())
    before = json.loads((checkpoint("qwen2") / "config.json").read_text())
    assert config["torch_dtype"] == "float32" and config == before | {"torch_dtype": "float32"}
    convert(tmp_path / "wide", tmp_path / "narrow", "torch", dtype="bfloat16")
    assert equal(parameters(tmp_path / "narrow"), parameters(checkpoint("qwen2")))


def test_converter_needs_no_framework_and_shows_progress(tmp_path):
    program = (
        "import runpy, sys\n"
        "sys.argv[0] = 'convert'\n"
        "runpy.run_module('paddlemix.models.internvl2.convert', run_name='__main__')\n"
        "assert not {'paddle', 'torch', 'transformers', 'huggingface_hub'} & set(sys.modules), sys.modules.keys()\n"
    )
    command = [sys.executable, "-c", program, str(DEMO), str(tmp_path / "out"), "--layout", "paddle"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    total = tqdm.format_sizeof(sum(bits.nbytes for _, bits in read_published(DEMO).values()))
    last = result.stderr.split("\r")[-1]
    assert "100%" in last and f"{total}/{total}" in last, last


def test_conversion_holds_one_tensor_at_a_time(tmp_path):
    width = 256  # wide enough that the blocks in which a tensor is turned are less than all of it
    tensors = {}
    for name, (_, bits) in read_published(DEMO).items():
        text = name.startswith(("language_model.", "mlp1."))
        tensors[name] = "BF16", np.ones([width if text and size == 128 else size for size in bits.shape], "u2")
    shutil.copytree(DEMO, tmp_path / "in", ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((DEMO / "config.json").read_text())
    for name in ("model.embed_tokens", "lm_head"):  # a vocabulary as large, beside the rest, as in real models
        tensors[f"language_model.{name}.weight"] = "BF16", np.ones((20000, width), "u2")
    config["llm_config"] |= {"vocab_size": 20000, "hidden_size": width}
    (tmp_path / "in/config.json").write_text(json.dumps(config))
    write_safetensors(tmp_path / "in/model.safetensors", tensors)
    del tensors
    tracemalloc.start()
    convert(tmp_path / "in", tmp_path / "out", "paddle")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    largest, whole = 20000 * width * 2, (tmp_path / "in/model.safetensors").stat().st_size
    assert largest < peak < 2 * largest < whole


def test_bad_arguments_end_in_one_sentence(tmp_path, capsys):
    source = checkpoint("qwen2")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes").write_text("keep me")
    assert "is not empty" in (text := failure(capsys, source, tmp_path / "full", "--layout", "torch")) and "--overwrite" in text
    assert "is a file" in failure(capsys, source, tmp_path / "full/notes", "--layout", "torch")
    copy = shutil.copytree(source, tmp_path / "copy")
    assert "the source itself" in failure(capsys, copy, tmp_path / "full/../copy", "--layout", "paddle", "--overwrite")
    assert equal(parameters(copy), parameters(source))
    assert "does not exist" in failure(capsys, tmp_path / "none", tmp_path / "x", "--layout", "torch")
    assert "max_shard_size" in failure(capsys, source, tmp_path / "x", "--layout", "torch", "--max_shard_size", "-5")
    (copy / "model.safetensors").write_bytes((copy / "model.safetensors").read_bytes()[:-7])
    assert "7 of" in failure(capsys, copy, tmp_path / "x", "--layout", "paddle")
    (copy / "config.json").unlink()
    assert "config.json" in failure(capsys, copy, tmp_path / "x", "--layout", "paddle")
    assert not (tmp_path / "x").exists()
    with pytest.raises(SystemExit) as caught:
        main([str(source), str(tmp_path / "x"), "--layout", "onnx"])
    assert caught.value.code == 2


def test_overwrite_replaces_weights_and_keeps_other_files(tmp_path):
    (tmp_path / "notes").write_text("keep me")
    convert(checkpoint("llama_vit6b"), tmp_path, "paddle", max_shard_size="200KB", overwrite=True)
    convert(checkpoint("qwen2"), tmp_path, "torch", overwrite=True)
    assert (tmp_path / "notes").read_text() == "keep me"
    assert [path.name for path in tmp_path.glob("model*")] == ["model.safetensors"]
    assert equal(parameters(tmp_path), parameters(checkpoint("qwen2")))
