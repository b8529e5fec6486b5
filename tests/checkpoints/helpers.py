"""Weight files read and written by other means than the project's."""

import dataclasses
import json
import math
import pickletools
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors

from paddlemix.errors import CheckpointError
from paddlemix.models.internvl2 import InternVLChatConfig
from paddlemix.models.internvl2.checkpoint import (
    parameter_shapes,
    read_parameters,
)
from tests.conftest import REFERENCE

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
