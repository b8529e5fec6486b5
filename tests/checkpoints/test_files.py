"""Every form of weight files, and what is wrong in them."""

import copy
import json
import pickle
import shutil
import struct
import zipfile

import numpy as np
import paddle
import pytest

from paddlemix.errors import CheckpointError
from paddlemix.models.internvl2 import InternVLChatConfig, InternVLChatModel
from paddlemix.models.internvl2.checkpoint import (
    Checkpoint,
)
from tests.checkpoints.helpers import (
    Call,
    Global,
    config_of,
    equal,
    loaded,
    message_of,
    read_all,
    row_major,
    torch_tensor,
    widen,
    write_bin,
    write_published_bin,
    write_safetensors,
)
from tests.conftest import REFERENCE

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


@pytest.mark.parametrize("sign", ["config", "part", "tensor"])
def test_quantised_checkpoints_are_named(tmp_path, sign):
    """Also where the names and shapes of what is in them fit."""
    folder = tmp_path / "few_bits"
    shutil.copytree(REFERENCE / "qwen2" / "checkpoint", folder)
    config = json.loads((folder / "config.json").read_text())
    told = "quantization_config of method bitsandbytes"
    if sign == "tensor":
        from safetensors.numpy import save_file

        weights = {"language_model.model.layers.0.mlp.up_proj.SCB": np.zeros([4, 4], "float32")}
        save_file(weights, folder / "model.safetensors")
        told = "it has language_model.model.layers.0.mlp.up_proj.SCB"
    else:
        (config if sign == "config" else config["llm_config"])["quantization_config"] = {"quant_method": "bitsandbytes"}
        (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"quantised checkpoint.*{told}.*original"):
        InternVLChatModel.from_pretrained(str(folder))
