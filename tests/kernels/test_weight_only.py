"""Products with weights in few bits on devices, whose operators are played by ``fakes.py``."""

import logging

import numpy as np
import paddle
import pytest

from paddlemix import device, quantised
from paddlemix.kernels import fused
from paddlemix.kernels.weight_only import DeviceWeight, _cut, told
from paddlemix.models.blocks.layers import Linear
from paddlemix.models.blocks.quantising import QuantisedLinear, quantise_model
from paddlemix.models.internvl2 import InternVLChatModel

from . import fakes

ERRORS = {8: 0.01, 4: 0.12}  # of weights, relative to their size: normal numbers, a scale for 64 or for all


@pytest.fixture(autouse=True)
def fresh():
    fakes.clear()
    yield
    fakes.clear()


def weight_of(out, inputs, seed=0):
    return np.random.default_rng(seed).standard_normal([out, inputs]).astype("float32") / 8


def relative(found, expected):
    return np.sqrt(np.square(found - expected).mean() / np.square(expected).mean())


def layer_of(values, bits, dtype, bias):
    base = Linear(values.shape[1], values.shape[0])
    base.bias.set_value(bias)
    base.to(dtype=dtype)
    layer = QuantisedLinear(base, bits)
    layer.answers_in = getattr(paddle, dtype)
    return layer


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("out", [128, 100])
@pytest.mark.parametrize("kind", fakes.PLAYED)
def test_a_layer_goes_to_the_operator_of_the_device(kind, out, bits):
    """Outputs are filled up for it, and in 4 bits Ascend has 8."""
    values, bias = weight_of(out, 192), weight_of(1, out, 1)[0]
    x = weight_of(6, 192, 2)
    expected = x @ values.T + bias
    with fakes.playing(kind) as calls:
        layer = layer_of(values, bits, "float64", bias)
        layer.take(values)
        calls.clear()
        y = layer(paddle.to_tensor(x).reshape([2, 3, 192]).astype("float64"))
    assert calls == [{"gpu": "weight_only_linear", "npu": "weight_only_linear_npu"}[kind]]
    assert y.shape == [2, 3, out] and y.dtype == paddle.float64
    assert 1e-4 < relative(y.numpy().reshape(expected.shape), expected) < ERRORS[8 if kind == "npu" else bits]
    assert layer.quantised is None
    full = -(-out // 64) * 64 if kind == "gpu" else out
    codes = full * 192 * (4 if (bits, kind) == (4, "gpu") else 8) // 8
    assert codes < layer.nbytes < 1.4 * codes


@pytest.mark.parametrize("kind", fakes.PLAYED)
@pytest.mark.parametrize("bits", [8, 4])
def test_weights_that_are_in_few_bits_in_the_files_keep_their_values(kind, bits):
    """Codes with zeros of their own are no codes of the operators: what they stand for goes there, in 8 bits."""
    given = quantised.quantise(weight_of(128, 192), bits)
    with fakes.playing(kind):
        layer = layer_of(given.dequantised(), bits, "float64", np.zeros(128, "float32"))
        layer.take(given)
        x = weight_of(6, 192, 2)
        found = layer(paddle.to_tensor(x).astype("float64")).numpy()
    assert relative(found, x @ given.dequantised().T) < ERRORS[8]


def test_four_bits_are_fitted_by_error():
    """What is cut off makes the error of the operator's own rounding smaller, and is kept by it."""
    values = weight_of(64, 256)

    def rounded(weight):
        groups = weight.reshape([-1, 64, 64])
        scale = np.abs(groups).max(1, keepdims=True) / 7
        return (np.rint(groups / scale) * scale).reshape(weight.shape)

    plain, cut = (rounded(weight) for weight in (values.T, _cut(paddle.to_tensor(values.T)).numpy()))
    errors = [np.square(found - values.T).reshape([-1, 64, 64]).sum(1) for found in (plain, cut)]
    assert (errors[1] <= errors[0] * (1 + 1e-5)).all() and errors[1].mean() < 0.95 * errors[0].mean()


def test_a_group_of_nothing_is_nothing():
    values = np.concatenate([np.zeros([64, 64], "float32"), weight_of(64, 64)], axis=1)
    for kind in fakes.PLAYED:
        with fakes.playing(kind):
            weight = DeviceWeight.of(values, 4, paddle.float64)
            y = weight.product(paddle.ones([1, 128], "float64")).numpy()
        assert np.isfinite(y).all() and relative(y[0], values.sum(1)) < 0.2


@pytest.mark.parametrize("kind", fakes.PLAYED)
@pytest.mark.parametrize("weight_dtype", ["int8", "int4"])
def test_models_with_weights_in_few_bits(kind, weight_dtype):
    """Every product but the tower's, as with all bits up to the rounding; no more operators on GPU."""
    model = fakes.small_model("300M")
    ids = paddle.arange(24).reshape([1, 24])
    expected = model(input_ids=ids).logits.numpy()
    with fakes.playing(kind) as calls:
        quantise_model(model, weight_dtype, dtype="float64")
        calls.clear()
        with paddle.no_grad():
            found = model(input_ids=ids).logits.numpy()
        product = {"gpu": "weight_only_linear", "npu": "weight_only_linear_npu"}[kind]
        assert calls.count(product) == 2 * 4 + 1
        if kind == "gpu":
            for step, blocks in list(fakes.steps(model, "float64").values())[1:]:
                assert fakes.of_a_block(step, blocks, calls)[0] <= fakes.MOST
    most = 0.03 if weight_dtype == "int8" or kind == "npu" else 0.3
    assert 1e-4 < relative(found, expected) < most


def test_what_a_device_does_not_offer_is_plain_and_said(monkeypatch, caplog):
    assert told(8, paddle.bfloat16) is None  # CPU, which has kernels of its own
    fakes.play_ascend(monkeypatch)
    assert told(8, paddle.bfloat16) is None
    assert told(4, paddle.bfloat16) == "weights in 4 bits take 8 on npu, whose operator has no fewer"
    assert "weights in 8 bits save memory but no time on npu" in told(8, paddle.float32)
    assert DeviceWeight.bits_for(8, 100, paddle.bfloat16) is None
    fakes.clear()
    fakes.play_ascend(monkeypatch, names=fakes.ASCEND[:3])
    assert "plain operators" in told(4, paddle.bfloat16)
    monkeypatch.undo()
    fakes.clear()
    fakes.play_gpu(monkeypatch, architecture=61)
    assert fused.choose("int8", paddle.float16) == "plain"
    fakes.clear()
    monkeypatch.undo()
    fakes.play_gpu(monkeypatch, architecture=90)
    assert [fused.choose(f"int{bits}", paddle.float16) for bits in (8, 4)] == ["weight_only_linear"] * 2
    fakes.clear()
    monkeypatch.setenv("PADDLEMIX_KERNELS", "int4=plain")
    assert DeviceWeight.bits_for(4, 64, paddle.float16) == 8
    model = fakes.small_model("300M")
    monkeypatch.setenv("PADDLEMIX_KERNELS", "plain")
    fakes.clear()
    monkeypatch.setattr(device, "_HALF", (*device._HALF, paddle.float64))
    with caplog.at_level(logging.WARNING, "paddlemix"):
        quantise_model(model, "int4", dtype="float64")
    assert [record.getMessage().split(" on ")[0] for record in caplog.records] == [
        "weights in 4 bits save memory but no time",
        "weights in 8 bits save memory but no time",
    ]
    assert all(layer.quantised is not None for layer in model.quantised_layers.values())


def test_an_operator_that_computes_something_else_is_not_used(monkeypatch):
    fakes.play_gpu(monkeypatch)
    real = paddle.nn.quant.weight_only_linear
    monkeypatch.setattr(paddle.nn.quant, "weight_only_linear", lambda *args, **named: real(*args, **named) * 2)
    assert fused.choose("int8", paddle.bfloat16) == "plain"


@pytest.mark.parametrize("weight_dtype", ["int8", "int4"])
def test_loading_rounds_on_the_device(tmp_path, monkeypatch, weight_dtype):
    """What is read goes there at once, and nothing of it into the cache of weights on disk."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = fakes.small_model("300M")
    model.to(dtype="float32")
    model.save_pretrained(str(tmp_path / "model"))
    calls = fakes.play_gpu(monkeypatch)
    loaded = InternVLChatModel.from_pretrained(str(tmp_path / "model"), dtype="bfloat16", weight_dtype=weight_dtype)
    layers = loaded.quantised_layers
    assert "language_model.lm_head.weight" in layers and not any("embed_tokens" in name for name in layers)
    assert calls.count("weight_quantize") >= len(layers) > 8
    bits = {name: layer._there.bits for name, layer in layers.items() if layer.quantised is None}
    assert bits.keys() == layers.keys()
    assert set(bits.values()) == ({8} if weight_dtype == "int8" else {8, 4})
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    x = weight_of(3, 128)
    given = model.state_dict()["language_model.model.layers.0.mlp.down_proj.weight"].numpy()
    found = layers["language_model.model.layers.0.mlp.down_proj.weight"](paddle.to_tensor(x).astype("bfloat16"))
    assert relative(found.astype("float32").numpy(), x @ given) < ERRORS[8 if weight_dtype == "int8" else 4] + 0.01
