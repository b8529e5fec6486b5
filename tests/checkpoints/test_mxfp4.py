"""gpt-oss's experts as openai/gpt-oss-20b has them: packed by the formula of the format, read into bfloat16."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file

from paddlemix.checkpoints import mxfp4, open_weight_file
from paddlemix.checkpoints.tensors import convert_dtype
from paddlemix.errors import CheckpointError
from paddlemix.models.internvl2 import InternVLChatConfig, InternVLChatModel, load_tokenizer
from paddlemix.models.internvl2.convert import convert
from paddlemix.training.arguments import DataTrainingArguments, ModelArguments
from paddlemix.training.parts import assemble
from paddlemix.training.plan import read_config
from tests.conftest import REFERENCE

SOURCE = REFERENCE / "internvl3" / "gpt_oss" / "checkpoint"
VALUES = [0, 0.5, 1, 1.5, 2, 3, 4, 6]


def by_the_formula(blocks, scales):
    """Value by value: sign, one of eight magnitudes, 2 ** (scale - 127); rows and inputs swapped at the end."""
    experts, rows, groups, _ = blocks.shape
    out = np.empty([experts, rows, groups * 32])
    for place in np.ndindex(*blocks.shape):
        byte, power = int(blocks[place]), 2.0 ** (int(scales[place[:3]]) - 127)
        for half, nibble in enumerate((byte & 15, byte >> 4)):
            sign = -1 if nibble & 8 else 1
            out[place[0], place[1], place[2] * 32 + place[3] * 2 + half] = sign * VALUES[nibble & 7] * power
    return out.transpose(0, 2, 1).astype(np.float32)


def test_values_are_those_of_the_formula():
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, [2, 3, 4, 16], dtype=np.uint8)
    blocks.reshape(-1)[:256] = np.arange(256)  # every byte
    scales = rng.integers(100, 140, [2, 3, 4], dtype=np.uint8)
    scales.reshape(-1)[:3] = 1, 0, 252  # the smallest, and the largest under which 6 is finite in bfloat16
    decoded = mxfp4.decode(blocks, scales)
    assert decoded.dtype == np.uint16 and decoded.shape == (2, 128, 3)
    assert np.array_equal(convert_dtype(decoded, "bfloat16", "float32"), by_the_formula(blocks, scales))
    assert np.isnan(convert_dtype(mxfp4.decode(blocks, np.full_like(scales, 255)), "bfloat16", "float32")).all()


@pytest.fixture
def packed(tmp_path):
    """A chat model whose experts are packed, in two files so that blocks and scales part, and what they stand for."""
    config = InternVLChatConfig.from_pretrained(SOURCE)
    llm = dataclasses.replace(config.llm_config, hidden_size=64, intermediate_size=32)
    config = dataclasses.replace(config, llm_config=llm)
    folder = tmp_path / "chat"
    model = InternVLChatModel(config)
    model.save_pretrained(str(folder))
    for path in SOURCE.iterdir():
        if path.name != "config.json" and not path.name.startswith("model"):
            shutil.copy(path, folder)
    with open_weight_file(str(folder / "model.safetensors")) as stored:
        tensors = {k: convert_dtype(t.read(0, t.shape[0]), t.dtype, "float32") for k, t in stored.items()}
    rng, expected = np.random.default_rng(1), {}
    for name in [name for name in tensors if name.endswith((".gate_up_proj", ".down_proj")) and ".experts." in name]:
        experts, size_in, size_out = tensors.pop(name).shape
        tensors[f"{name}_blocks"] = rng.integers(0, 256, [experts, size_out, size_in // 32, 16], dtype=np.uint8)
        tensors[f"{name}_scales"] = rng.integers(118, 124, [experts, size_out, size_in // 32], dtype=np.uint8)
        expected[name] = by_the_formula(tensors[f"{name}_blocks"], tensors[f"{name}_scales"])
    files = {name: f"model-0000{1 + name.endswith('_scales')}-of-00002.safetensors" for name in tensors}
    (folder / "model.safetensors").unlink()
    for file in set(files.values()):
        save_file({name: tensors[name] for name in tensors if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    values = json.loads((folder / "config.json").read_text())
    values["llm_config"]["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.embed_tokens"]}
    (folder / "config.json").write_text(json.dumps(values))
    return folder, expected, tensors


def check(model, expected):
    parameters = model.state_dict()
    for name, values in expected.items():
        layer, kind = name.rsplit(".", 1)
        for i, value in enumerate(values):
            assert np.array_equal(parameters[f"{layer}.{i}.{kind}.weight"].astype("float32").numpy(), value), name


def test_a_chat_model_is_read_from_them(packed):
    folder, expected, _ = packed
    model = InternVLChatModel.from_pretrained(str(folder), dtype="float32", engine="eager")
    check(model, expected)
    assert "quantization_config" not in model.config.llm_config.to_dict()


@pytest.mark.parametrize("layout", ["torch", "hf"])
def test_conversion_writes_them_unpacked(packed, tmp_path, layout):
    folder, expected, _ = packed
    convert(str(folder), str(tmp_path / "new"), layout)
    assert "mxfp4" not in (tmp_path / "new" / "config.json").read_text()
    with open_weight_file(str(tmp_path / "new" / "model.safetensors")) as stored:
        for name, values in expected.items():
            assert stored[name].dtype == "bfloat16"
            assert np.array_equal(convert_dtype(stored[name].read(0, len(values)), "bfloat16", "float32"), values)
    check(InternVLChatModel.from_pretrained(str(tmp_path / "new"), dtype="float32", engine="eager"), expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_is_put_together_from_the_language_model_alone(packed, tmp_path, dtype):
    folder, expected, tensors = packed
    config = json.loads((folder / "config.json").read_text())
    for part, prefix in (("vision", "vision_model."), ("llm", "language_model.")):
        (tmp_path / part).mkdir()
        own = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        save_file(own, tmp_path / part / "model.safetensors")
        (tmp_path / part / "config.json").write_text(json.dumps(config[{"llm": "llm_config"}.get(part, "vision_config")]))
    for path in SOURCE.iterdir():
        if path.name.startswith(("tokenizer", "vocab", "merges", "added", "special")):
            shutil.copy(path, tmp_path / "llm")
    model_args = ModelArguments(vision_path=str(tmp_path / "vision"), llm_path=str(tmp_path / "llm"))
    model, tokenizer = assemble(
        model_args, DataTrainingArguments(), dtype, lambda config: lambda name: "experts.0." not in name
    )
    assert {str(p.dtype) for p in model.parameters()} == {f"paddle.{dtype}"}
    assert len(tokenizer) == len(load_tokenizer(str(folder)))
    assert not model.language_model.model.layers[0].mlp.experts[0].down_proj.weight._is_initialized()
    whole, _ = assemble(model_args, DataTrainingArguments(), dtype)
    check(whole, expected)
    # A plan counts what is read, not what is stored.
    assert read_config(model_args).llm_config.experts == model.config.llm_config.experts


@pytest.mark.parametrize(
    "change, message", [("lost", "has no .*_scales beside it"), ("cut", r"is \[.*MXFP4 has \[experts, rows")]
)
def test_halves_that_do_not_fit_are_named(packed, change, message):
    folder, expected, tensors = packed
    name = f"{next(iter(expected))}_scales"
    scales = {k: v for k, v in tensors.items() if k.endswith("_scales")}
    others = json.loads((folder / "model.safetensors.index.json").read_text())
    if change == "lost":
        scales.pop(name), others["weight_map"].pop(name)
        (folder / "model.safetensors.index.json").write_text(json.dumps(others))
    else:
        scales[name] = np.ascontiguousarray(scales[name][:, :-1])
    save_file(scales, folder / "model-00002-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=message):
        InternVLChatModel.from_pretrained(str(folder), dtype="float32")
