"""Weights: every way in and out, against files read by the safetensors library and tensors put together by hand."""

import copy
import dataclasses
import json
import math
import os
import pickle
import pickletools
import shutil
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import paddle
import pytest
import safetensors

from paddlemix.checkpoints import OutgoingTensor, convert_dtype, parse_size
from paddlemix.checkpoints import write_safetensors as write_files
from paddlemix.errors import CheckpointError
from paddlemix.models.internvl2 import InternVLChatConfig, InternVLChatModel
from paddlemix.models.internvl2.checkpoint import (
    Checkpoint,
    load_checkpoint,
    parameter_shapes,
    read_parameters,
    save_checkpoint,
)
from tests.conftest import FAMILIES, REFERENCE

DEMO = Path(__file__).parents[2] / "paddlemix" / "demo_model"


# ---------------------------------------------------------------------- a second source of truth


def read_published(directory):
    """Tensors of a directory by name: ``(dtype tag, array of bits)``, through the safetensors library or pickletools."""
    tensors = {}
    for path in sorted(Path(directory).glob("*.safetensors")):
        for name, entry in safetensors.deserialize(path.read_bytes()):
            bits = np.frombuffer(entry["data"], {"F32": "u4", "BF16": "u2", "F16": "u2", "U16": "u2"}[entry["dtype"]])
            tensors[name] = entry["dtype"], bits.reshape(entry["shape"])
    for path in Path(directory).glob("pytorch_model*.bin"):
        tensors |= read_contiguous_bin(path)
    return tensors


def read_contiguous_bin(path):
    """Contiguous bfloat16 tensors of a PyTorch file, by following its opcodes and never unpickling."""
    tensors = {}
    with zipfile.ZipFile(path) as archive:
        root = archive.namelist()[0].split("/")[0]
        stack = []
        for opcode, value, _ in pickletools.genops(archive.read(f"{root}/data.pkl")):
            if opcode.name in ("BINUNICODE", "BININT", "BININT1", "BININT2"):
                stack.append(value)
            elif opcode.name == "NEWFALSE":  # requires_grad: all of a tensor has been seen
                texts = [text for text in stack if isinstance(text, str)]
                name = next(text for text in texts if text.startswith(("vision_model.", "mlp1.", "language_model.")))
                key = next(text for text in texts if text.isdigit())
                tensors[name] = "BF16", np.frombuffer(archive.read(f"{root}/data/{key}"), "u2")
                stack = []
    return tensors


def expected_parameters(directory, config):
    """The model's parameters as bits, put together from the published tensors by the rules of the facts."""
    llm = config.llm_config
    published = {name: bits for name, (_, bits) in read_published(directory).items()}
    shapes = parameter_shapes(config)
    out = {}
    for name in shapes:
        layer, _, what = name.rpartition("layers.")
        prefix = layer + "layers." + what.split(".")[0] + "." if layer else ""
        kind = name.rsplit(".", 1)[-1]
        if llm.family == "Phi3ForCausalLM" or not name.startswith("language_model"):
            parts = [published[name]]
            if parts[0].ndim == 1 and len(shapes[name]) > 1:  # read from a .bin without shapes
                linear = len(shapes[name]) == 2 and "embed_tokens" not in name
                parts = [parts[0].reshape(shapes[name][::-1] if linear else shapes[name])]
        elif llm.family == "InternLM2ForCausalLM":
            if "qkv_proj" in name:
                w = published[f"{prefix}attention.wqkv.{kind}"]
                kv, head = llm.num_key_value_heads, llm.head_dim
                groups = w.reshape([kv, llm.num_attention_heads // kv + 2, head, *w.shape[1:]])
                parts = [groups[:, :-2], groups[:, -2], groups[:, -1]]
                parts = [part.reshape([-1, *w.shape[1:]]) for part in parts]
            elif "gate_up_proj" in name:
                parts = [published[f"{prefix}feed_forward.w1.weight"], published[f"{prefix}feed_forward.w3.weight"]]
            else:
                renamed = name
                for ours, theirs in {
                    "embed_tokens": "tok_embeddings",
                    "self_attn.o_proj": "attention.wo",
                    "mlp.down_proj": "feed_forward.w2",
                    "input_layernorm": "attention_norm",
                    "post_attention_layernorm": "ffn_norm",
                    "lm_head": "output",
                }.items():
                    renamed = renamed.replace(ours, theirs)
                parts = [published[renamed]]
        elif "qkv_proj" in name:
            parts = [published[f"{prefix}self_attn.{x}_proj.{kind}"] for x in "qkv"]
        elif "gate_up_proj" in name:
            parts = [published[f"{prefix}mlp.{x}_proj.weight"] for x in ("gate", "up")]
        else:
            parts = [published[name]]
        joined = np.concatenate(parts)
        out[name] = joined.T if joined.ndim == 2 and "embed_tokens" not in name else joined
    return out


def widen(bits):
    """bfloat16 bits as float32."""
    return (bits.astype("u4") << 16).view("f4")


def config_of(family):
    return InternVLChatConfig.from_pretrained(str(REFERENCE / family / "checkpoint"))


def loaded(family, dtype="bfloat16"):
    return dict(read_parameters(config_of(family), REFERENCE / family / "checkpoint", dtype))


def equal(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


# ---------------------------------------------------------------------- making files


def write_safetensors(path, tensors, extra=b"", metadata=None):
    """``tensors``: name to ``(dtype tag, array)``."""
    header, data = {"__metadata__": metadata or {"format": "pt"}}, b""
    for name, (tag, array) in tensors.items():
        blob = np.ascontiguousarray(array).tobytes()
        header[name] = {"dtype": tag, "shape": list(array.shape), "data_offsets": [len(data), len(data) + len(blob)]}
        data += blob
    encoded = json.dumps(header).encode()
    Path(path).write_bytes(struct.pack("<Q", len(encoded)) + encoded + data + extra)


@dataclasses.dataclass
class Global:
    name: str  # "module name"


@dataclasses.dataclass
class Call:
    function: object
    arguments: tuple
    state: object = None


@dataclasses.dataclass
class Persistent:
    reference: tuple


def assemble(value):
    """A pickle of ``value`` opcode by opcode, so that it can ask for globals that do not exist here."""
    if isinstance(value, Global):
        return b"c" + value.name.replace(" ", "\n").encode() + b"\n"
    if isinstance(value, Call):
        state = b"" if value.state is None else assemble(value.state) + b"b"
        return assemble(value.function) + assemble(value.arguments) + b"R" + state
    if isinstance(value, Persistent):
        return assemble(value.reference) + b"Q"
    if isinstance(value, dict):
        return b"}(" + b"".join(assemble(item) for pair in value.items() for item in pair) + b"u"
    if isinstance(value, tuple):
        return b"(" + b"".join(map(assemble, value)) + b"t"
    if isinstance(value, list):
        return b"](" + b"".join(map(assemble, value)) + b"e"
    if isinstance(value, bool):
        return b"\x88" if value else b"\x89"
    if value is None:
        return b"N"
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value)
    if isinstance(value, bytes):
        return b"B" + struct.pack("<I", len(value)) + value
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


REBUILD = Global("torch._utils _rebuild_tensor_v2")


def torch_tensor(key, count, shape, strides, offset=0, storage="BFloat16Storage", rebuild=REBUILD):
    reference = ("storage", Global(f"torch {storage}"), key, "cuda:0", count)
    hooks = Call(Global("collections OrderedDict"), ())
    return Call(rebuild, (Persistent(reference), offset, shape, strides, False, hooks))


def write_bin(path, value, storages=(), compression=zipfile.ZIP_STORED, byteorder=b"little"):
    """A file as torch.save makes it: ``storages`` maps keys to arrays."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + assemble(value) + b".", compression)
        archive.writestr("archive/byteorder", byteorder)
        for key, array in dict(storages).items():
            archive.writestr(f"archive/data/{key}", array.tobytes(), compression)


def row_major(shape):
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def write_published_bin(path, tensors):
    """Tensors as ``read_published`` returns them, each in a storage of its own."""
    items = list(tensors.items())
    value = {
        name: torch_tensor(str(i), bits.size, tuple(bits.shape), row_major(bits.shape))
        for i, (name, (_, bits)) in enumerate(items)
    }
    write_bin(path, value, {str(i): bits for i, (_, (_, bits)) in enumerate(items)})


def message_of(call, *arguments):
    with pytest.raises(CheckpointError) as caught:
        call(*arguments)
    return str(caught.value)


def read_all(config, directory, dtype="bfloat16"):
    return dict(read_parameters(config, directory, dtype))


@pytest.fixture
def qwen2(tmp_path):
    """Configuration, published tensors, and an empty directory for a broken copy of them."""
    return config_of("qwen2"), read_published(REFERENCE / "qwen2" / "checkpoint"), tmp_path


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


# ---------------------------------------------------------------------- other forms of files


def test_paddlenlp_tags_bfloat16_as_integers(qwen2):
    config, tensors, directory = qwen2
    turned = {k: ("U16", v.T if v.ndim == 2 and "embed" not in k else v) for k, (_, v) in tensors.items()}
    write_safetensors(directory / "model.safetensors", turned, metadata={"format": "np"})
    assert equal(read_all(config, directory), loaded("qwen2"))


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("sharded", [False, True])
def test_paddle_pickles(qwen2, protocol, sharded):
    config, tensors, directory = qwen2
    state = {}
    for i, (name, (_, bits)) in enumerate(tensors.items()):
        value = paddle.to_tensor(bits.T if bits.ndim == 2 and "embed" not in name else bits)
        assert value.dtype == paddle.bfloat16
        name = name.replace("language_model.model.", "language_model.qwen2.")  # what PaddleNLP calls it
        state[name] = value if i % 3 else value.astype("float32")
    names = list(state)
    groups = [names[:40], names[40:]] if sharded else [names]
    files = [f"model_state-{i + 1:05d}-of-00002.pdparams" for i in range(2)] if sharded else ["model_state.pdparams"]
    for file, group in zip(files, groups):
        paddle.save({name: state[name] for name in group}, str(directory / file), protocol=protocol)
    if sharded:
        weight_map = {name: file for file, group in zip(files, groups) for name in group}
        (directory / "model_state.pdparams.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert equal(read_all(config, directory), loaded("qwen2"))


def test_pickled_array_in_fortran_order(qwen2):
    config, tensors, directory = qwen2
    arrays = {k: widen(v) for k, (_, v) in tensors.items()}
    arrays["mlp1.1.weight"] = np.asfortranarray(arrays["mlp1.1.weight"])
    with open(directory / "model_state.pdparams", "wb") as file:
        pickle.dump(arrays, file, protocol=4)
    assert equal(read_all(config, directory), loaded("qwen2"))


def test_torch_pickle_in_shards(qwen2):
    config, tensors, directory = qwen2
    names = list(tensors)
    weight_map = {}
    for i, group in enumerate((names[:50], names[50:]), 1):
        file = f"pytorch_model-{i:05d}-of-00002.bin"
        write_published_bin(directory / file, {name: tensors[name] for name in group})
        weight_map |= dict.fromkeys(group, file)
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert equal(read_all(config, directory), loaded("qwen2"))


def test_torch_pickle_with_views_parameters_and_metadata(qwen2):
    """Tensors that share a storage, lie in it transposed or with gaps, or come wrapped as Parameter."""
    config, tensors, directory = qwen2
    a, b, c, d = "mlp1.1.weight", "mlp1.3.weight", "mlp1.1.bias", "language_model.model.embed_tokens.weight"
    bits = {name: tensors[name][1] for name in (a, b, c, d)}
    gaps = np.zeros((bits[c].size, 3), "u2")
    gaps[:, 1] = bits[c]
    storages = {"s0": np.concatenate([bits[a].T.ravel(), bits[b].ravel()]), "s1": gaps, "s2": widen(bits[d])}
    rows, columns = bits[a].shape
    value = {
        a: torch_tensor("s0", storages["s0"].size, (rows, columns), (1, rows)),
        b: torch_tensor("s0", storages["s0"].size, bits[b].shape, row_major(bits[b].shape), offset=bits[a].size),
        c: torch_tensor("s1", gaps.size, bits[c].shape, (3,), offset=1),
        d: torch_tensor("s2", bits[d].size, bits[d].shape, row_major(bits[d].shape), storage="FloatStorage"),
    }
    value[b] = Call(Global("torch._utils _rebuild_parameter"), (value[b], True, Call(Global("collections OrderedDict"), ())))
    for i, (name, (_, array)) in enumerate(tensors.items()):
        if name not in value:
            storages[str(i)] = array
            value[name] = torch_tensor(str(i), array.size, array.shape, row_major(array.shape))
    value["language_model.model.rotary_emb.inv_freq"] = torch_tensor("s2", bits[d].size, (2,), (1,), storage="FloatStorage")
    value["vision_model.embeddings.position_ids"] = torch_tensor("ids", 4, (4,), (1,), storage="LongStorage")
    storages["ids"] = np.arange(4)
    # A state_dict is an OrderedDict with notes on modules as an attribute.
    state = Call(Global("collections OrderedDict"), (list(value.items()),), {"_metadata": {"": {"version": 1}}})
    write_bin(directory / "pytorch_model.bin", state, storages)
    assert equal(read_all(config, directory), loaded("qwen2"))


def test_buffers_are_ignored_and_a_tied_head_is_the_embedding(qwen2):
    config, tensors, directory = qwen2
    tensors["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = "F32", np.ones(8, "f4")
    tensors["vision_model.embeddings.position_ids"] = "I64", np.arange(4)
    del tensors["language_model.lm_head.weight"]
    write_safetensors(directory / "model.safetensors", tensors)
    assert "language_model.lm_head.weight" in message_of(read_all, config, directory)
    tied = copy.deepcopy(config)
    tied.llm_config.tie_word_embeddings = True
    parameters = read_all(tied, directory)
    assert "language_model.lm_head.weight" not in parameters  # the head is the embedding, one parameter
    assert np.array_equal(
        parameters["language_model.model.embed_tokens.weight"], tensors["language_model.model.embed_tokens.weight"][1]
    )
    turned = {k: (tag, v.T if v.ndim == 2 and "embed" not in k else v) for k, (tag, v) in tensors.items()}
    write_safetensors(directory / "model.safetensors", turned)
    assert equal(read_all(tied, directory), parameters)


def test_safetensors_go_before_pickles(tmp_path):
    source = REFERENCE / "qwen2" / "checkpoint"
    shutil.copy(source / "model.safetensors", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"never opened")
    assert equal(read_all(config_of("qwen2"), tmp_path), loaded("qwen2"))


# ---------------------------------------------------------------------- bad input


def test_directory_without_weights(tmp_path):
    config = config_of("qwen2")
    message = message_of(read_all, config, tmp_path)
    assert all(name in message for name in ("model.safetensors", "pytorch_model.bin", "model_state.pdparams", str(tmp_path)))
    assert "not a directory" in message_of(read_all, config, tmp_path / "none")
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"")
    assert "no model.safetensors.index.json" in message_of(read_all, config, tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../etc/passwd"}}')
    assert "is not an index" in message_of(read_all, config, tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    assert "holds no JSON object" in message_of(read_all, config, tmp_path)


def test_missing_and_wrong_shards(tmp_path):
    config = config_of("internlm2")
    shutil.copytree(REFERENCE / "internlm2" / "checkpoint", tmp_path, dirs_exist_ok=True)
    first, second = sorted(tmp_path.glob("*.safetensors"))
    kept = second.read_bytes()
    second.unlink()
    assert second.name in (message := message_of(read_all, config, tmp_path)) and first.name not in message
    second.write_bytes(kept[:-1000])
    assert f"{second} is cut short: 1000 of {len(kept)} bytes" in message_of(read_all, config, tmp_path)
    second.write_bytes(kept[:100])
    assert "bytes of its header are missing" in message_of(read_all, config, tmp_path)
    second.write_bytes(kept[:5])
    assert "cut short" in message_of(read_all, config, tmp_path)
    second.write_bytes(kept + b"\0")
    assert "do not fill it exactly" in message_of(read_all, config, tmp_path)
    shutil.copy(first, second)
    assert "is both in" in message_of(read_all, config, tmp_path)
    write_safetensors(second, {"other": ("F32", np.ones(3, "f4"))})
    assert "index says are in it" in message_of(read_all, config, tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "cut short"),
        (b"\xff" * 100, "would be"),
        (struct.pack("<Q", 4) + b"{]]}", "header cannot be read"),
        (struct.pack("<Q", 2) + b"[]", "header cannot be read"),
        (struct.pack("<Q", 12) + b'{"a": "b"}  ', "header cannot be read"),
        (struct.pack("<Q", 25) + b'{"a": {"dtype": "F32"}}  ', "header cannot be read"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n", "git lfs pull"),
        (struct.pack("<Q", 200_000) + b'{"a":' * 40_000, "header cannot be read"),
        (b"<!DOCTYPE html><html></html>", "would be"),
    ],
)
def test_invalid_safetensors(content, words, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(content)
    message = message_of(read_all, config_of("qwen2"), tmp_path)
    assert words in message and "model.safetensors" in message


def test_headers_that_lie(tmp_path):
    def attempt(header, data=b"\0" * 8):
        encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
        (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)
        return message_of(read_all, config_of("qwen2"), tmp_path)

    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    assert "contradict" in attempt({"a": entry | {"shape": [3]}})
    assert "contradict" in attempt({"a": entry | {"dtype": "BF16"}})
    assert "do not fill" in attempt({"a": entry, "b": entry})
    assert "'a'.shape is [-1, -2]: it must be" in attempt({"a": entry | {"shape": [-1, -2]}})
    assert "'a'.data_offsets is [-8, 8]: it must be" in attempt(
        {"a": entry | {"data_offsets": [-8, 8], "shape": [4]}, "b": entry | {"data_offsets": [8, 0]}}
    )
    for key, values in {
        "shape": ("2", ["2"], [2.0], [True], [None], 2, [1 << 60], [1] * 17, {}),
        "dtype": (1, None, ["F32"], "F" * 30),
        "data_offsets": ("08", [0], [0, 8, 16], [0.0, 8.0], [False, 8], [0, 1 << 60], None),
    }.items():
        for value in values:
            assert f"'a'.{key} is " in attempt({"a": entry | {key: value}})
    # Each adds up to the file's size.
    assert "'b' overlaps" in attempt({"a": entry, "b": entry | {"data_offsets": [4, 12]}}, b"\0" * 12)
    assert "'b' leaves a hole" in attempt({"a": entry, "b": entry | {"data_offsets": [12, 20]}}, b"\0" * 20)
    assert "cut short" in attempt({"a": entry, "b": entry | {"data_offsets": [8, 1 << 40]}})
    assert "of dtype I8" in attempt({"a": entry | {"dtype": "I8"}})
    text = json.dumps(entry)
    assert "twice" in attempt(f'{{"a": {text}, "a": {text}}}'.encode())


@pytest.mark.parametrize(
    ("part", "key", "value", "words"),
    [
        ("llm_config", "num_hidden_layers", 1024, "llm_config.num_hidden_layers is 1024 but the files have 3 layers"),
        ("vision_config", "num_hidden_layers", 2, "vision_config.num_hidden_layers is 2 but the files have 3 layers"),
        ("llm_config", "vocab_size", 1 << 21, "llm_config.vocab_size is 2097152"),
        ("llm_config", "hidden_size", 1 << 16, "llm_config.hidden_size is 65536"),
        ("llm_config", "intermediate_size", 1 << 17, "llm_config.intermediate_size is 131072"),
        ("vision_config", "intermediate_size", 1 << 17, "vision_config.intermediate_size is 131072"),
        ("vision_config", "hidden_size", 1 << 17, "vision_config.hidden_size is 131072"),
    ],
)
def test_sizes_that_the_weights_contradict_are_named(part, key, value, words):
    """Before a model is built: this one would take terabytes."""
    values = config_of("qwen2").to_dict()
    values[part][key] = value
    config = InternVLChatConfig.from_dict(values)
    message = message_of(Checkpoint, REFERENCE / "qwen2" / "checkpoint", config)
    assert words in message and "config.json" in message


def test_tensors_that_do_not_fit_are_named(qwen2):
    config, tensors, directory = qwen2
    name = "vision_model.encoder.layers.1.mlp.fc1.weight"

    def attempt(changed):
        write_safetensors(directory / "model.safetensors", changed)
        return message_of(read_all, config, directory)

    message = attempt({k: v for k, v in tensors.items() if ".layers.2." not in k})
    lost = sum(".layers.2." in k for k in tensors)
    assert f"{lost} missing" in message and f"and {lost - 5} more" in message and "layers.2." in message
    assert "1 unexpected (mlp1.9.bias)" in attempt(tensors | {"mlp1.9.bias": tensors["mlp1.1.bias"]})
    message = attempt(tensors | {name: ("BF16", tensors[name][1][:-1])})
    assert f"{name} is [255, 64] instead of [256, 64]" in message
    message = attempt(tensors | {name: ("BF16", np.ascontiguousarray(tensors[name][1].T))})
    assert "mixes two layouts" in message and name in message
    message = attempt(tensors | {"language_model.model.layers.0.self_attn.q_proj.lora_A.weight": tensors["mlp1.1.bias"]})
    assert "merge the LoRA" in message
    for tag, dtype in (("I8", "i1"), ("I32", "i4"), ("F64", "f8")):
        assert "not supported" in attempt(tensors | {name: (tag, tensors[name][1].astype(dtype))})
    write_safetensors(directory / "model.safetensors", tensors)
    other = copy.deepcopy(config)
    other.llm_config.vocab_size += 1
    assert "lm_head.weight is [712, 64] instead of [713, 64]" in message_of(read_all, other, directory)
    assert "dtype is 'int8'" in message_of(read_all, config, directory, "int8")


def test_broken_torch_pickles(qwen2):
    config, tensors, directory = qwen2
    path = directory / "pytorch_model.bin"

    def attempt(value, *arguments, **options):
        write_bin(path, value, *arguments, **options)
        return message_of(read_all, config, directory)

    good = torch_tensor("0", 4, (2, 2), (2, 1))
    data = {"0": np.zeros(4, "u2")}
    assert "missing" in attempt({"a": good}, data)  # a readable file, though of no model
    assert "big-endian" in attempt({"a": good}, data, byteorder=b"big")
    assert "beyond its storage" in attempt({"a": torch_tensor("0", 4, (2, 2), (2, 1), offset=1)}, data)
    assert "beyond its storage" in attempt({"a": torch_tensor("0", 4, (2, 2), (3, 1))}, data)
    assert "impossible form" in attempt({"a": torch_tensor("0", 4, (2, 2), (-1, 1))}, data)
    assert "impossible form" in attempt({"a": torch_tensor("0", 5, (2, 2), (2, 1))}, data)
    assert "damaged" in attempt({"a": torch_tensor("1", 4, (2, 2), (2, 1))}, data)
    assert "damaged" in attempt({"a": torch_tensor("0", 4, (2, "x"), (2, 1))}, data)
    assert "impossible form" in attempt({"a": good}, data, zipfile.ZIP_DEFLATED)
    assert "entries that are no tensors (step)" in attempt({"step": 3})
    assert "entries that are no tensors (7)" in attempt({7: good}, data)
    assert "holds a list" in attempt([1, 2])
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme", "")
    assert "without PyTorch weights" in message_of(read_all, config, directory)
    path.write_bytes(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.rest of a file of torch 1.5")
    assert "before 1.6" in (message := message_of(read_all, config, directory)) and "save_file" in message
    path.write_bytes(b"anything")
    assert "not a PyTorch weight file" in message_of(read_all, config, directory)
    reference = (REFERENCE / "phi3/checkpoint/pytorch_model.bin").read_bytes()
    path.write_bytes(reference[:-5000])
    assert "cut short" in message_of(read_all, config, directory)


def test_broken_paddle_pickles(tmp_path):
    config, path = config_of("qwen2"), tmp_path / "model_state.pdparams"
    paddle.save({"a": paddle.ones([300, 300])}, str(path))
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    assert "damaged" in message_of(read_all, config, tmp_path)
    path.write_bytes(b"")
    assert "damaged" in message_of(read_all, config, tmp_path)
    path.write_bytes(pickle.dumps({"a": np.ones(3, ">f4")}))
    assert "little-endian" in message_of(read_all, config, tmp_path)
    path.write_bytes(pickle.dumps({"a": np.array(["object"], object)}))
    assert "dtype O8" in message_of(read_all, config, tmp_path)
    path.write_bytes(whole.replace(struct.pack("<I", 360000), struct.pack("<I", 359996)))
    assert "damaged" in message_of(read_all, config, tmp_path)


# ---------------------------------------------------------------------- pickles that want more than tensors


def gadgets(target):
    """Pickles, without frame and end, that would create the file ``target`` if they were loaded carelessly."""
    command = f"touch {target}"
    code = f"open({str(target)!r}, 'w')"
    calls = [
        ("os system", (command,)),
        ("posix system", (command,)),
        ("subprocess Popen", (["touch", str(target)],)),
        ("builtins eval", (code,)),
        ("builtins exec", (code,)),
        ("builtins open", (str(target), "w")),
        ("pathlib Path.touch", (str(target),)),
        ("numpy.testing._private.utils runstring", (code, {})),
        ("torch.serialization load", (str(target),)),
        ("collections OrderedDict.__init__.__globals__", ()),
    ]
    for name, arguments in calls:
        yield name, assemble({"a": Call(Global(name), arguments)})
        module, _, attribute = name.partition(" ")
        stack_global = b"\x80\x04" + assemble(module) + assemble(attribute) + b"\x93" + assemble(arguments) + b"R"
        yield name, stack_global
        yield name, b"\x80\x02" + assemble(Global(name)) + assemble(arguments) + b"\x81"  # NEWOBJ
        yield name, b"(" + b"".join(map(assemble, arguments)) + b"i" + f"{module}\n{attribute}\n".encode()  # INST
        yield name, b"(" + assemble(Global(name)) + b"".join(map(assemble, arguments)) + b"o"  # OBJ
    # Calls hidden in the state of something that is admitted, and in a tensor's backward hooks.
    hook = Call(Global("os system"), (command,))
    yield "os system", assemble({"a": Call(Global("collections OrderedDict"), (), {"b": hook})})
    yield "os system", assemble(hook)


@pytest.mark.parametrize("kind", ["bin", "pdparams"])
def test_pickles_run_nothing(kind, tmp_path):
    config, target = config_of("qwen2"), tmp_path / "proof"
    path = tmp_path / {"bin": "pytorch_model.bin", "pdparams": "model_state.pdparams"}[kind]
    for name, body in gadgets(target):
        if kind == "bin":
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("archive/data.pkl", body + b".")
        else:
            path.write_bytes(body + b".")
        message = message_of(read_all, config, tmp_path)
        assert f"'{name.replace(' ', '.')}'" in message and "nothing in it was run" in message, name
        assert not target.exists(), name


def test_the_gadgets_are_loaded_guns(tmp_path):
    """Or the test above would prove nothing."""
    target = tmp_path / "proof"
    name, body = next(gadgets(target))
    pickle.loads(body + b".")
    assert name == "os system" and target.exists()


def test_admitted_functions_cannot_be_tampered_with(qwen2):
    """A pickle can set attributes of what it is given; the next file must not see that."""
    config, tensors, directory = qwen2
    for name in ("torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter"):
        state = (None, {"__defaults__": (1, 2, 3, 4, 5, 6)})
        body = assemble(Global(name)) + assemble(state) + b"b."
        with zipfile.ZipFile(directory / "pytorch_model.bin", "w") as archive:
            archive.writestr("archive/data.pkl", body)
        assert "holds a function" in message_of(read_all, config, directory)
    write_published_bin(directory / "pytorch_model.bin", tensors)
    assert equal(read_all(config, directory), loaded("qwen2"))
    (directory / "pytorch_model.bin").unlink()
    body = assemble(Call(Global("collections OrderedDict"), ())) + assemble(Persistent(("storage", 1, "0", "cpu", 1))) + b"0."
    (directory / "model_state.pdparams").write_bytes(body)
    assert "data outside of itself" in message_of(read_all, config, directory)


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


@pytest.mark.parametrize("sign", ["config", "part", "tensor"])
def test_quantised_checkpoints_are_named(tmp_path, sign):
    """Also where the names and shapes of what is in them fit."""
    folder = tmp_path / "awq"
    shutil.copytree(REFERENCE / "qwen2" / "checkpoint", folder)
    config = json.loads((folder / "config.json").read_text())
    told = "quantization_config of method awq"
    if sign == "tensor":
        from safetensors.numpy import save_file

        weights = {"language_model.model.layers.0.mlp.up_proj.qweight": np.zeros([4, 4], "float32")}
        save_file(weights, folder / "model.safetensors")
        told = "it has language_model.model.layers.0.mlp.up_proj.qweight"
    else:
        (config if sign == "config" else config["llm_config"])["quantization_config"] = {"quant_method": "awq", "bits": 4}
        (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"quantised checkpoint.*{told}.*original"):
        InternVLChatModel.from_pretrained(str(folder))
