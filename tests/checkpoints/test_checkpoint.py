"""Weights into a model and out of it, against files read by the safetensors library and tensors put together by hand."""

import copy
import json
import math
import os
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import paddle
import pytest
import safetensors

from paddlemix.checkpoints import OutgoingTensor, convert_dtype, parse_size
from paddlemix.checkpoints import write_safetensors as write_files
from paddlemix.models.internvl2 import InternVLChatConfig, InternVLChatModel
from paddlemix.models.internvl2.checkpoint import (
    load_checkpoint,
    parameter_shapes,
    save_checkpoint,
)
from tests.checkpoints.helpers import (
    DEMO,
    config_of,
    equal,
    expected_parameters,
    loaded,
    message_of,
    read_all,
    read_published,
    widen,
    write_safetensors,
)
from tests.conftest import FAMILIES, REFERENCE

# ---------------------------------------------------------------------- names, shapes, values


def variants():
    for family in FAMILIES:
        yield pytest.param(config_of(family), id=family)
    biased = copy.deepcopy(config_of("internlm2"))
    biased.llm_config.extra["bias"] = True
    yield pytest.param(biased, id="internlm2-bias")
    biased = copy.deepcopy(config_of("llama_vit6b"))
    biased.llm_config.extra["attention_bias"] = True
    yield pytest.param(biased, id="llama-bias")


@pytest.mark.parametrize("config", variants())
def test_shapes_are_those_of_the_model(config):
    with paddle.LazyGuard():
        model = InternVLChatModel(config)
    assert {name: tuple(p.shape) for name, p in model.state_dict().items()} == parameter_shapes(config)


@pytest.mark.parametrize("family", FAMILIES)
def test_values_are_the_published_ones(family):
    expected = expected_parameters(REFERENCE / family / "checkpoint", config_of(family))
    assert equal(loaded(family), expected)
    wide = loaded(family, "float32")
    assert all(np.array_equal(wide[name], widen(bits)) for name, bits in expected.items())
    assert len({value.tobytes() for value in expected.values() if value.ndim == 2}) > 20  # the comparison can fail


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_model_takes_values_and_dtype(family, dtype):
    config = config_of(family)
    with paddle.LazyGuard():
        model = InternVLChatModel(config)
    load_checkpoint(model, str(REFERENCE / family / "checkpoint"), dtype)
    expected = loaded(family, dtype)
    for name, parameter in model.state_dict().items():
        assert str(parameter.dtype) == f"paddle.{dtype}" and not parameter.stop_gradient
        assert np.array_equal(parameter.numpy(), expected[name]), name


def test_loaded_parameters_can_be_trained():
    with paddle.LazyGuard():
        model = InternVLChatModel(config_of("qwen2"))
    load_checkpoint(model, str(REFERENCE / "qwen2" / "checkpoint"), "float32")
    before = {name: p.numpy().copy() for name, p in model.mlp1.state_dict().items()}
    optimizer = paddle.optimizer.SGD(0.5, parameters=model.mlp1.parameters())
    x = paddle.randn([3, before["0.weight"].shape[0]])
    model.mlp1(x).square().sum().backward()
    gradients = {name: p.grad.numpy().copy() for name, p in model.mlp1.state_dict().items()}
    optimizer.step()
    for name, parameter in model.mlp1.state_dict().items():
        np.testing.assert_allclose(parameter.numpy(), before[name] - 0.5 * gradients[name], rtol=1e-5, atol=1e-7)
        assert np.abs(gradients[name]).max() > 0


def test_loading_replaces_what_an_initialised_model_has():
    model = InternVLChatModel(config_of("phi3"))
    load_checkpoint(model, str(REFERENCE / "phi3" / "checkpoint"), "float32")
    expected = loaded("phi3", "float32")
    assert all(np.array_equal(p.numpy(), expected[name]) for name, p in model.state_dict().items())


def test_dtype_conversion_agrees_with_paddle():
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.standard_normal(50000) * 10.0 ** rng.integers(-6, 4, 50000), [0.0, -0.0, 1e-40, 65280]])
    values = values.astype("float32")
    halfway = ((rng.integers(0x3F00, 0x4100, 1000).astype("u4") << 16) | 0x8000).view("f4")  # ties go to even
    values = np.concatenate([values, halfway])
    held = {"float32": values}
    for dtype in ("bfloat16", "float16"):
        held[dtype] = paddle.to_tensor(values).astype(dtype).numpy()
        assert np.array_equal(convert_dtype(values, "float32", dtype), held[dtype]), dtype
    for source in ("bfloat16", "float16"):
        for target in ("float32", "bfloat16", "float16"):
            expected = paddle.to_tensor(held[source]).astype("float32").astype(target).numpy()
            assert np.array_equal(convert_dtype(held[source], source, target), expected), (source, target)
    special = np.array([np.inf, -np.inf, np.nan], "f4")
    special = np.append(special, np.array([0x7F800001, 0xFFFFFFFF], "u4").view("f4"))  # NaNs that rounding could lose
    back = convert_dtype(convert_dtype(special, "float32", "bfloat16"), "bfloat16", "float32")
    assert back[0] == np.inf and back[1] == -np.inf and np.isnan(back[2:]).all()


def test_float16_overflow_is_an_error_with_the_tensor_name(qwen2):
    config, tensors, directory = qwen2
    bits = tensors["mlp1.1.bias"][1].copy()
    bits[3] = 0x7F00  # 1.7e38
    write_safetensors(directory / "model.safetensors", tensors | {"mlp1.1.bias": ("BF16", bits)})
    assert "mlp1.1.bias" in message_of(read_all, config, directory, "float16")
    assert read_all(config, directory, "float32")["mlp1.1.bias"][3] == widen(bits)[3]


# ---------------------------------------------------------------------- saving


@pytest.mark.parametrize("family", FAMILIES)
def test_torch_layout_comes_out_as_it_went_in(family, tmp_path):
    source = REFERENCE / family / "checkpoint"
    save_checkpoint(loaded(family), config_of(family), tmp_path)
    original, saved = read_published(source), read_published(tmp_path)
    assert saved.keys() == original.keys()
    for name, (tag, bits) in saved.items():
        assert tag == "BF16" and np.array_equal(bits.reshape(original[name][1].shape), original[name][1]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_paddle_layout_is_transposed_and_comes_back(family, tmp_path):
    config = config_of(family)
    save_checkpoint(loaded(family), config, tmp_path / "torch")
    save_checkpoint(loaded(family), config, tmp_path / "paddle", layout="paddle", max_shard_size="200KB")
    torch, paddle_ = read_published(tmp_path / "torch"), read_published(tmp_path / "paddle")
    assert torch.keys() == paddle_.keys()
    for name, (tag, bits) in paddle_.items():
        linear = bits.ndim == 2 and "embed" not in name
        assert tag == "BF16" and np.array_equal(bits, torch[name][1].T if linear else torch[name][1]), name
    assert equal(read_all(config, tmp_path / "paddle"), loaded(family))
    save_checkpoint(read_all(config, tmp_path / "paddle"), config, tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "torch/model.safetensors").read_bytes()


def test_a_model_is_saved_as_it_is_held(tmp_path):
    model = InternVLChatModel.from_pretrained(str(REFERENCE / "qwen2" / "checkpoint"), dtype="float32")
    save_checkpoint(model, model.config, tmp_path / "wide")
    save_checkpoint(model, model.config, tmp_path / "narrow", dtype="bfloat16")
    original = read_published(REFERENCE / "qwen2" / "checkpoint")
    wide, narrow = read_published(tmp_path / "wide"), read_published(tmp_path / "narrow")
    for name, (_, bits) in original.items():
        assert wide[name][0] == "F32" and np.array_equal(wide[name][1].view("f4"), widen(bits))
        assert narrow[name][0] == "BF16" and np.array_equal(narrow[name][1], bits)
    save_checkpoint(model, model.config, tmp_path / "half", dtype="float16")
    again = read_all(model.config, tmp_path / "half", "float16")
    save_checkpoint(again, model.config, tmp_path / "half_again")
    assert {tag for tag, _ in read_published(tmp_path / "half_again").values()} == {"F16"}
    assert (tmp_path / "half_again/model.safetensors").read_bytes() == (tmp_path / "half/model.safetensors").read_bytes()


@pytest.mark.parametrize(("layout", "form"), [("torch", "pt"), ("paddle", "np")])
def test_shards_keep_the_limit_and_the_index_is_right(layout, form, tmp_path):
    parameters = loaded("internlm2")
    save_checkpoint(parameters, config_of("internlm2"), tmp_path, layout=layout, max_shard_size="300KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in tmp_path.iterdir())
    shards = [name for name in files if name.endswith(".safetensors")]
    assert shards == [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    assert len(shards) > 3 and files == [*shards, "model.safetensors.index.json"]
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in parameters.values())
    for shard in shards:
        with safetensors.safe_open(str(tmp_path / shard), framework="np") as file:
            names = set(file.keys())
            assert file.metadata() == {"format": form}
        assert names == {name for name, place in index["weight_map"].items() if place == shard}
        assert sum(np.asarray(read_published(tmp_path)[name][1]).nbytes for name in names) <= 300_000


def test_mixed_dtypes_are_aligned(tmp_path):
    """Readers map tensors in place, so float32 must not start at an odd multiple of two bytes."""
    arrays = {"a": np.arange(3, dtype="u2"), "b": np.arange(4, dtype="f4"), "c": np.arange(5, dtype="f2")}
    dtypes = {"u2": "bfloat16", "f4": "float32", "f2": "float16"}
    tensors = [
        OutgoingTensor(name, dtypes[array.dtype.str[1:]], array.shape, lambda array=array: iter([array]))
        for name, array in arrays.items()
    ]
    write_files(tmp_path, tensors, {"format": "pt"})
    blob = (tmp_path / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", blob[:8])
    assert (8 + length + json.loads(blob[8 : 8 + length])["b"]["data_offsets"][0]) % 4 == 0
    read = read_published(tmp_path)
    assert {name: tag for name, (tag, _) in read.items()} == {"a": "BF16", "b": "F32", "c": "F16"}
    assert all(np.array_equal(bits.view(arrays[name].dtype), arrays[name]) for name, (_, bits) in read.items())


def test_an_interrupted_save_leaves_the_old_files(tmp_path):
    config, parameters = config_of("qwen2"), loaded("qwen2")
    save_checkpoint(parameters, config, tmp_path, max_shard_size="300KB")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    written = []

    def stop(count):
        written.append(count)
        if sum(written) > 400_000:
            raise KeyboardInterrupt

    zeros = {name: np.zeros_like(value) for name, value in parameters.items()}
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(zeros, config, tmp_path, max_shard_size="300KB", progress=stop)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    save_checkpoint(zeros, config, tmp_path)  # now in one file: no shard of the old ones may stay
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert not any(value.any() for value in read_all(config, tmp_path).values())


def test_saving_what_does_not_fit_is_refused(tmp_path):
    config, parameters = config_of("qwen2"), loaded("qwen2")
    lost = parameters.pop("mlp1.1.bias")
    assert "mlp1.1.bias" in message_of(save_checkpoint, parameters, config, tmp_path)
    assert "mlp1.1.bias" in message_of(save_checkpoint, parameters | {"mlp1.1.bias": lost[:-1]}, config, tmp_path)
    assert "lora_A" in message_of(save_checkpoint, parameters | {"mlp1.1.bias": lost, "lora_A": lost}, config, tmp_path)
    good = parameters | {"mlp1.1.bias": lost}
    assert "int8" in message_of(save_checkpoint, good | {"mlp1.1.bias": lost.astype("int8")}, config, tmp_path)
    assert "layout is 'onnx'" in message_of(save_checkpoint, good, config, tmp_path, "onnx")
    assert "dtype is 'int4'" in message_of(save_checkpoint, good, config, tmp_path, "torch", "5GB", "int4")
    assert "max_shard_size is 'big'" in message_of(save_checkpoint, good, config, tmp_path, "torch", "big")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    assert "cannot be written" in message_of(save_checkpoint, good, config, tmp_path / "file" / "below")


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("1.5 KiB", 1536), ("20kb", 20000), (123, 123), ("7", 7), ("2MiB", 2**21)]
)
def test_sizes(text, size):
    assert parse_size(text) == size


# ---------------------------------------------------------------------- memory


def test_reading_holds_little_beside_the_model():
    config = InternVLChatConfig.from_pretrained(str(DEMO))
    model = sum(math.prod(shape) for shape in parameter_shapes(config).values()) * 4
    tracemalloc.start()
    read_all(config, DEMO, "float32")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert model < peak < model + 3e6 < model + (DEMO / "model.safetensors").stat().st_size


def test_loading_peaks_below_the_model_and_one_shard(tmp_path):
    """Resident memory of a fresh process that loads 55 million parameters in float32 from bfloat16 shards."""
    config = copy.deepcopy(config_of("qwen2"))
    config.llm_config.hidden_size, config.llm_config.vocab_size, config.llm_config.intermediate_size = 1024, 16000, 2048
    shapes = parameter_shapes(config)
    rng = np.random.default_rng(0)
    save_checkpoint({k: rng.integers(0, 0x3F80, s, "u2") for k, s in shapes.items()}, config, tmp_path, max_shard_size="40MB")
    config.save(tmp_path)
    program = (
        "import re, sys, paddle\n"
        "from paddlemix.models.internvl2 import InternVLChatConfig, InternVLChatModel\n"
        "from paddlemix.models.internvl2.checkpoint import Checkpoint, load_checkpoint\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) * 1024\n"
        "config = InternVLChatConfig.from_pretrained(sys.argv[1])\n"
        "with paddle.LazyGuard(): model = InternVLChatModel(config)\n"
        "paddle.ones([1]).numpy(); before = peak()\n"
        "load_checkpoint(model, sys.argv[1], 'float32')\n"
        "print(peak() - before)\n"
    )
    root = Path(__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, cwd=root, env=os.environ
    )
    assert result.returncode == 0, result.stderr
    model = sum(math.prod(shape) for shape in shapes.values()) * 4
    assert 0.9 * model < int(result.stdout.split()[-1]) < model + 40e6
