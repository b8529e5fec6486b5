"""A model that was packed once is mapped the next time, and is the same model."""

import json
import threading

import numpy as np
import paddle
import pytest

from paddlemix.checkpoints import cache
from paddlemix.kernels import cpu as kernels
from paddlemix.models.internvl2 import InternVLChatModel
from tests.conftest import FAMILIES, assert_close, load_reference

pytestmark = pytest.mark.skipif(not kernels.available("float32"), reason="the CPU kernels cannot be built here")


@pytest.fixture
def kept(monkeypatch, tmp_path):
    """A cache of its own, which keeps small models too."""
    monkeypatch.setattr(cache, "folder", lambda: tmp_path)
    monkeypatch.setattr(cache, "WORTHWHILE", 0)
    return tmp_path


def load(family, **options):
    """The model, after what it writes is there; and whether it was mapped."""
    path = str(load_reference(family).path)
    model = InternVLChatModel.from_pretrained(path, dtype="float32", engine="inference", **options)
    for thread in threading.enumerate():
        if thread.name == "cache":
            thread.join()
    return model, hasattr(model.vision_model.encoder.layers[0].qkv, "_mapped")


def outputs(model, family):
    arrays = load_reference(family).arrays
    with paddle.no_grad():
        return model.extract_feature(arrays["pixel_values"]).numpy(), model(input_ids=arrays["lm_input_ids"]).logits.numpy()


@pytest.mark.parametrize("options", [{}, {"weight_dtype": "int8"}, {"weight_dtype": "int4", "quantize_parts": "language"}])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_mapped_model_is_the_same(kept, family, options):
    first, mapped = load(family, **options)
    assert not mapped
    again, mapped = load(family, **options)
    assert mapped
    for mine, other in zip(outputs(again, family), outputs(first, family)):
        assert np.array_equal(mine, other)
    if not options:
        assert_close(outputs(again, family)[0], load_reference(family).arrays["image_features"])


def test_what_was_packed_otherwise_is_not_taken(kept, monkeypatch):
    load("qwen2")
    monkeypatch.setattr(kernels, "identity", lambda: "another processor")
    assert not load("qwen2")[1]
    assert load("qwen2")[1]
    monkeypatch.setenv("PADDLEMIX_CACHE", "off")
    assert not load("qwen2")[1]


@pytest.mark.parametrize("damage", ["short", "changed", "sizes", "no sizes"])
def test_a_damaged_entry_is_made_anew(kept, damage):
    first, _ = load("qwen2")
    (entry,) = [path for path in kept.iterdir() if (path / "weights.bin").exists()]
    content, known = (entry / "weights.bin").read_bytes(), json.loads((entry / "entry.json").read_text())
    if damage == "short":
        (entry / "weights.bin").write_bytes(content[:-4096])
    elif damage == "changed":
        (entry / "weights.bin").write_bytes(bytes(1024) + content[1024:])
    else:
        known["sizes"] = [known["sizes"][0] + 8192, *known["sizes"][1:]] if damage == "sizes" else {"a": 1}
        (entry / "entry.json").write_text(json.dumps(known))
    again, mapped = load("qwen2")
    assert not mapped
    for mine, other in zip(outputs(again, "qwen2"), outputs(first, "qwen2")):
        assert np.array_equal(mine, other)
    assert (entry / "weights.bin").read_bytes() == content


def test_packed_weights_are_checked():
    layer = kernels.PackedLinear(paddle.rand([64, 96]), None, "float32")
    buffer = np.zeros(layer.packed.nbytes + 128, np.uint8)
    start = -buffer.ctypes.data % 64
    copy = buffer[start : start + layer.packed.nbytes]
    copy[:] = layer.packed
    x = paddle.rand([3, 64])
    assert np.array_equal(kernels.PackedLinear.mapped(copy, (64, 96), None, "float32")(x).numpy(), layer(x).numpy())
    with pytest.raises(ValueError, match="another size"):
        kernels.PackedLinear.mapped(copy[:-64], (64, 96), None, "float32")
    with pytest.raises(ValueError, match="multiple of 64"):
        kernels.PackedLinear.mapped(copy[4:], (64, 96), None, "float32")
