"""Adapters that learn on weights in few bits compute what they would on the same weights in floating point."""

import shutil
import warnings

import numpy as np
import paddle
import pytest

from paddlemix import quantised
from paddlemix.errors import CheckpointError, ConfigError
from paddlemix.models.blocks.layers import Linear
from paddlemix.models.blocks.lora import LoRALinear, merge_lora, wrap_llm_lora
from paddlemix.models.blocks.quantising import QuantisedLinear, originals
from paddlemix.models.internvl2 import InternVLChatModel
from paddlemix.models.internvl2.convert import convert
from tests.conftest import FAMILIES, REFERENCE, tiles

INPUTS, OUTPUTS = 150, 40  # no multiple of a group


def small(bits, order=None, seed=0):
    """A layer in few bits and its weight ``[in, out]`` in floating point."""
    numbers = np.random.default_rng(seed)
    weight = quantised.quantise(numbers.normal(size=(OUTPUTS, INPUTS)).astype("float32"), bits, 32)
    if order:
        weight = quantised.replace(weight, order=numbers.permutation(INPUTS).astype("int32"))
    layer = QuantisedLinear(Linear(INPUTS, OUTPUTS), bits)
    layer.take(weight)
    layer.dtype = "float32"
    return layer, weight.dequantised().T


@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_products_and_gradients_are_those_of_the_values(bits, order):
    layer, weight = small(bits, order)
    x = paddle.randn([3, 5, INPUTS])
    x.stop_gradient = False
    y = layer(x)
    np.testing.assert_allclose(y.numpy(), x.numpy() @ weight + layer.bias.numpy(), rtol=0, atol=1e-4)
    seen = np.random.default_rng(1).normal(size=y.shape).astype("float32")
    y.backward(paddle.to_tensor(seen))
    np.testing.assert_allclose(x.grad.numpy(), seen @ weight.T, rtol=0, atol=1e-4)
    assert layer.plain().codes.numpy().nbytes == OUTPUTS * quantised.padded(INPUTS, 32) * bits // 8


def test_adapters_on_few_bits_have_the_parameters_of_those_on_all_and_are_not_merged():
    layer, _ = small(4)
    adapted = LoRALinear(layer, [10, 30], 4)
    plain = LoRALinear(Linear(INPUTS, OUTPUTS), [10, 30], 4)
    names = {name for name, _ in plain.named_parameters()}
    assert {name for name, _ in adapted.named_parameters()} == names - {"weight"}
    with pytest.raises(ConfigError, match="cannot be merged"):
        adapted.merged()


def learning(family, weight_dtype):
    """A model whose adapters are to learn, with ones that are not zero."""
    path = str((REFERENCE if family in FAMILIES else REFERENCE / "internvl3") / family / "checkpoint")
    model = InternVLChatModel.from_pretrained(path, dtype="float32", weight_dtype=weight_dtype, engine="eager", learning=True)
    paddle.seed(5)
    wrap_llm_lora(model, 4)
    for name, parameter in model.named_parameters():
        if ".lora_B" in name:
            parameter.set_value(np.random.default_rng(len(name)).normal(0, 0.05, parameter.shape).astype("float32"))
    model.eval()
    return model


@pytest.mark.parametrize("weight_dtype", ["int8", "int4"])
@pytest.mark.parametrize("family", [*FAMILIES, "qwen3_moe", "gpt_oss"])
def test_logits_and_gradients_are_those_of_a_plain_model_with_the_rounded_weights(family, weight_dtype):
    model, plain = learning(family, weight_dtype), learning(family, None)
    assert model.quantised_layers and all(".layers." in name for name in model.quantised_layers)
    parameters = dict(plain.named_parameters())
    assert parameters.keys() - dict(model.named_parameters()).keys() == model.quantised_layers.keys()
    for name, layer in model.quantised_layers.items():
        values = layer.plain().dequantised("float32").numpy().T
        error = np.abs(values - parameters[name].numpy()).max()
        assert 0 < error < (0.02 if weight_dtype == "int8" else 0.2) * np.abs(values).max()
        parameters[name].set_value(np.ascontiguousarray(values))
    ids = np.arange(5, 45).reshape(2, 20)
    found = []
    for one in (model, plain):
        one.language_model.model.training = True
        one(input_ids=ids, labels=ids).loss.backward()
        one.eval()
        with paddle.no_grad():
            logits = one(input_ids=ids).logits.numpy()
        found.append((logits, {n: p.grad.numpy() for n, p in one.named_parameters() if p.grad is not None}))
    (logits, gradients), (expected, others) = found
    assert gradients.keys() == others.keys() and any(".lora_A" in name for name in gradients)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    for name, gradient in gradients.items():
        np.testing.assert_allclose(gradient, others[name], rtol=0, atol=1e-4 * np.abs(others[name]).max() + 1e-7)


def test_what_is_saved_of_them_is_what_the_files_had(tmp_path):
    model = learning("qwen2", "int4")
    stored = InternVLChatModel.from_pretrained(str(REFERENCE / "qwen2" / "checkpoint"), dtype="float32", engine="eager")
    stored = stored.state_dict()
    with originals(model, "float32") as values:
        assert values.keys() == model.quantised_layers.keys()
        for name, value in values.items():
            assert np.array_equal(value.numpy(), stored[name].numpy())


def test_files_that_changed_meanwhile_cost_no_run(tmp_path):
    folder = tmp_path / "start"
    shutil.copytree(REFERENCE / "qwen2" / "checkpoint", folder)
    model = InternVLChatModel.from_pretrained(str(folder), dtype="float32", weight_dtype="int4", engine="eager", learning=True)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with originals(model, "float32") as values:
            for name, layer in model.quantised_layers.items():
                assert np.array_equal(values[name].numpy(), layer.plain().dequantised("float32").numpy().T)
                assert list(values[name].shape) == list(values[name].numpy().shape)
    assert "as they were rounded" in str(seen[0].message)


def test_a_whole_model_with_such_adapters_is_not_merged_nor_a_quantised_one_trained(tmp_path):
    model = learning("qwen2", "int8")
    with pytest.raises(ConfigError, match="cannot be merged"):
        merge_lora(model)
    folder = tmp_path / "int8"
    convert(str(REFERENCE / "qwen2" / "checkpoint"), str(folder), weight_dtype="int8")
    for weight_dtype in (None, "int4"):
        with pytest.raises(CheckpointError, match="can be asked but not trained"):
            InternVLChatModel.from_pretrained(
                str(folder), dtype="float32", weight_dtype=weight_dtype, engine="eager", learning=True
            )


def test_pictures_are_seen_as_ever():
    model = learning("qwen2", "int4")
    plain = InternVLChatModel.from_pretrained(str(REFERENCE / "qwen2" / "checkpoint"), dtype="float32", engine="eager")
    assert np.array_equal(model.extract_feature(tiles(0)).numpy(), plain.extract_feature(tiles(0)).numpy())
