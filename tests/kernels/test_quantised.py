"""Products with weights in 8 and 4 bits against NumPy in float64, and rounding against what it is meant to leave."""

import os
import subprocess
import sys

import numpy as np
import paddle
import pytest
from paddle.nn import functional as F

from paddlemix import quantised
from paddlemix.kernels import cpu
from paddlemix.kernels import quantised as kernels

pytestmark = pytest.mark.skipif(not cpu.available("float32"), reason="the CPU kernels cannot be built here (see the warning)")


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def awkward(out, inputs):
    """Weights with a row of zeros, of one value, of tiny, of large and of positive ones alone."""
    weight = normal(out, inputs) * np.float32(0.02)
    weight[0], weight[1], weight[4] = 0, 0.3, 1 + weight[4]
    weight[2] *= 1e-9
    weight[3] *= 1e9
    return weight


@pytest.mark.parametrize("bits", [8, 4])
def test_codes_survive_packing_in_the_described_places(bits):
    codes = np.random.default_rng(0).integers(*((-127, 128) if bits == 8 else (0, 16)), [3, 192])
    packed = quantised.pack(codes, bits)
    np.testing.assert_array_equal(quantised.unpack(packed, bits), codes)
    numbers = packed.view("<u2")
    if bits == 4:  # number j of the second block: inputs 64 + j, 80 + j, 96 + j, 112 + j
        shifts = [codes[1, 64 + 5 + 16 * t] << 4 * t for t in range(4)]
        assert numbers[1, 16 + 5] == sum(shifts)
    else:
        assert numbers[1, 16 + 5] == (codes[1, 32 + 5] & 255) | (codes[1, 48 + 5] & 255) << 8


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group", quantised.GROUPS)
@pytest.mark.parametrize("inputs", [96, 200])
def test_rounding_is_as_close_as_the_bits_allow(bits, group, inputs):
    weight = awkward(37, inputs)
    plain, fast = quantised.quantise(weight, bits, group), kernels.quantise(weight, bits, group)
    for found in (plain, fast):
        groups = [slice(at, at + group) for at in range(0, inputs, group)]
        values = found.dequantised()
        for part in groups:
            span = np.ptp(weight[:, part], axis=1) if bits == 4 else 2 * np.abs(weight[:, part]).max(1)
            # Half a step of a grid over the whole range, and what float16 of scale and zero costs; a grid that was fitted has
            # less error over all, but not at every value.
            step = span / (15 if bits == 4 else 254)
            error = np.sqrt(((values[:, part] - weight[:, part]) ** 2).mean(1))
            assert (error <= 0.5 * step + 1e-3 * np.abs(weight[:, part]).max(1) + 1e-12).all()
    assert (quantised.unpack(plain.codes, bits) != quantised.unpack(fast.codes, bits)).mean() < 1e-3


def test_fitting_leaves_less_error_than_minimum_and_maximum():
    weight = normal(64, 512) ** 3  # long tails
    low, high = (reduce(weight.reshape([64, -1, 64]), -1, keepdims=True) for reduce in (np.min, np.max))
    step = (high - low) / 15
    by_range = np.rint((weight.reshape([64, -1, 64]) - low) / step) * step + low
    fitted = kernels.quantise(weight, 4).dequantised()
    errors = [((values.reshape(weight.shape) - weight) ** 2).mean() for values in (by_range, fitted)]
    assert errors[1] < 0.9 * errors[0]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("rows", [1, 2, 5, 32, 33, 700])  # on both sides of the change to oneDNN
@pytest.mark.parametrize("group, inputs, outputs", [(32, 96, 19), (64, 896, 130), (128, 200, 33), (256, 512, 70)])
def test_linear(bits, rows, group, inputs, outputs):
    order = np.random.default_rng(3).permutation(inputs).astype(np.int32) if rows in (2, 33) else None
    weight = quantised.replace(kernels.quantise(normal(outputs, inputs), bits, group), order=order)
    x, bias, residual = normal(rows, inputs, seed=1), normal(outputs, seed=2), normal(rows, outputs, seed=3)
    linear = kernels.QuantisedLinear(weight, bias)
    values = weight.dequantised().astype("float64")
    expected = x @ values.T + bias
    got = linear(paddle.to_tensor(x), activation="silu", residual=paddle.to_tensor(residual)).numpy()
    expected = expected / (1 + np.exp(-expected)) + residual
    # 16 bits for the largest of a group's activations: far below bfloat16's 4e-3.
    assert np.abs(got - expected).max() < 5e-5 * np.abs(expected).max()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("rows", [1, 3, 100])
@pytest.mark.parametrize("gated", [True, False])
def test_mlp(bits, rows, gated):
    width, hidden = 96, 160
    parts = {name: kernels.quantise(normal(*shape, seed=i) / 10, bits) for i, (name, shape) in enumerate(
        {"gate": (hidden, width), "up": (hidden, width), "down": (width, hidden)}.items())}  # fmt: skip
    layers = {name: kernels.QuantisedLinear(weight) for name, weight in parts.items()}
    x, scale = normal(rows, width, seed=7), 1 + normal(width, seed=8) / 4
    norm = cpu.Norm(paddle.to_tensor(scale), None, 1e-6)
    gate = layers["gate"] if gated else None
    got = cpu.mlp(paddle.to_tensor(x), layers["up"], layers["down"], gate, norm, "silu", paddle.to_tensor(x)).numpy()
    values = {name: weight.dequantised().astype("float64") for name, weight in parts.items()}
    normed = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale
    up = normed @ values["up"].T
    active = normed @ values["gate"].T if gated else up
    active = active / (1 + np.exp(-active)) * (up if gated else 1)
    expected = x + active @ values["down"].T
    assert np.abs(got - expected).max() < 5e-5 * np.abs(expected).max()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("rows", [1, 2, 7, 32, 33, 700])
@pytest.mark.parametrize("group, inputs, outputs", [(32, 96, 19), (64, 896, 530), (128, 200, 33), (256, 512, 70)])
def test_linear_with_activations_in_8_bits(bits, rows, group, inputs, outputs):
    order = np.random.default_rng(3).permutation(inputs).astype(np.int32) if rows in (2, 33) else None
    weight = quantised.replace(kernels.quantise(normal(outputs, inputs), bits, group), order=order)
    x, bias, residual = normal(rows, inputs, seed=1), normal(outputs, seed=2), normal(rows, outputs, seed=3)
    x[:, 3] *= 50  # one that is far from the others takes their bits
    linear = kernels.QuantisedLinear(weight, bias, activations="int8")
    values, seen = weight.dequantised().astype("float64"), x
    if quantised.rounds_activations(bits, group):
        sorted_rows = x if order is None else x[:, order]
        rounded = quantised.rounded_activations(sorted_rows, group)
        seen = rounded if order is None else np.empty_like(rounded)
        if order is not None:
            seen[:, order] = rounded
        assert np.abs(seen - x).max() > 0.05  # they are rounded indeed
    expected = seen @ values.T + bias + residual
    got = linear(paddle.to_tensor(x), residual=paddle.to_tensor(residual)).numpy()
    error = np.abs(got - expected).max(1) / np.abs(expected).max()
    # A number on the border between two may be rounded to either, which changes all outputs of its row.
    assert np.sort(error)[int(0.99 * rows) - 1] < 5e-5 and error.max() < 1e-3


@pytest.mark.parametrize("group", [64, 256])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("hidden", [512, 300])  # whole groups, and less
def test_mlp_with_activations_in_8_bits(group, gated, hidden):
    """What lies between the two layers is rounded in the groups of the second."""
    width = 256
    weights = [
        kernels.quantise(normal(*shape, seed=i) / 10, 8, group)
        for i, shape in enumerate(((hidden, width), (hidden, width), (width, hidden)))
    ]
    up, gate, down = (kernels.QuantisedLinear(weight, activations="int8") for weight in weights)
    x = normal(100, width, seed=7)
    got = cpu.mlp(paddle.to_tensor(x), up, down, gate if gated else None, None, "silu", paddle.to_tensor(x)).numpy()
    seen = quantised.rounded_activations(x, group)
    first, second, last = (weight.dequantised().astype("float64") for weight in weights)
    active = seen @ (second if gated else first).T
    active = active / (1 + np.exp(-active)) * (seen @ first.T if gated else 1)
    expected = x + quantised.rounded_activations(active.astype("float32"), group) @ last.T
    # A number on the border between two may be rounded to either.
    assert np.abs(got - expected).max() < 2e-3 * np.abs(expected).max()
    assert np.sqrt(((got - expected) ** 2).mean()) < 2e-4 * np.abs(expected).max()


@pytest.mark.parametrize("bits", [8, 4])
def test_no_sum_of_bytes_overflows(bits):
    """The largest codes meet the largest activations, of one sign and of both."""
    most = 127 if bits == 8 else 15
    codes = np.full([6, 512], most)
    codes[1] = -most if bits == 8 else 0
    codes[2, ::2], codes[3, 1::2] = -codes[2, ::2] * (bits == 8), -codes[3, 1::2] * (bits == 8)
    codes[4] = -128 if bits == 8 else most  # nothing of ours writes -128, but a file can
    scales = np.full([6, 2], 1, np.float16)
    zeros = None if bits == 8 else np.zeros([6, 2], np.float16)
    weight = quantised.Quantised(bits, 512, 256, quantised.pack(codes, bits), scales, zeros, np.ones(6, np.float32))
    x = np.ones([9, 512], np.float32)
    x[1], x[2, ::2], x[3, 1::2] = -1, -1, -1
    got = kernels.QuantisedLinear(weight, activations="int8")(paddle.to_tensor(x)).numpy()
    np.testing.assert_allclose(got, x.astype("float64") @ codes.T, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
def test_activations_of_many_rows(activation):
    weight = quantised.quantise(np.eye(64, dtype=np.float32), 8)
    x = np.linspace(-12, 12, 64 * 200, dtype=np.float32).reshape([200, 64])
    got = kernels.QuantisedLinear(weight)(paddle.to_tensor(x[:8]), activation=activation).numpy()
    function = {"gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate=True), "silu": F.silu}[activation]
    seen = kernels.QuantisedLinear(weight)(paddle.to_tensor(x[:8]))
    np.testing.assert_allclose(got, function(seen).numpy(), atol=3e-6)
    many = kernels.QuantisedLinear(weight, activations="int8")
    np.testing.assert_allclose(
        many(paddle.to_tensor(x), activation=activation).numpy(), function(many(paddle.to_tensor(x))).numpy(), atol=3e-6
    )


@pytest.mark.parametrize("activations", [None, "int8"])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_row_does_not_depend_on_others(bits, activations):
    parts = [kernels.QuantisedLinear(kernels.quantise(normal(*shape), bits), None, "float32", activations)
             for shape in ((300, 192), (300, 192), (192, 300))]  # fmt: skip
    x = normal(70 if activations else 16, 192, seed=1)
    for run in (parts[0], lambda x: cpu.mlp(x, *parts[1:], parts[0], None, "silu", x)):
        few, many = (run(paddle.to_tensor(x[:count])).numpy() for count in (16, len(x)))
        for rows in (1, 3, 7):
            np.testing.assert_array_equal(run(paddle.to_tensor(x[:rows])).numpy(), few[:rows])
        if activations:  # many rows may be added in another order than few, but in one
            for rows in (33, 40, 66):
                np.testing.assert_array_equal(run(paddle.to_tensor(x[:rows])).numpy(), many[:rows])
            assert np.abs(many[:16] - few).max() < 0.01 * np.abs(few).max()  # what is rounded in between may fall either way


def test_arrays_that_do_not_fit_are_refused():
    weight = kernels.quantise(normal(8, 64), 4)
    for wrong in ({"codes": weight.codes[:, 1:]}, {"scales": weight.scales[1:]}, {"zeros": None}, {"group": 48}):
        with pytest.raises(ValueError):
            kernels.QuantisedLinear(quantised.replace(weight, **wrong))


def test_the_floor_of_avx2_computes_the_same():
    """PADDLEMIX_CPU=avx2 compiles without what newer processors have; this file's products hold there too."""
    if os.environ.get("PADDLEMIX_CPU") == "avx2":
        pytest.skip("this is that run")
    environment = {**os.environ, "PADDLEMIX_CPU": "avx2"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", __file__, "-k", "linear and 64-896 or mlp or overflows or depend"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.count(".") >= 42, done.stdout[-2000:]
