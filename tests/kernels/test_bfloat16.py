"""Products of training in bfloat16 on CPU, against NumPy in float64 with operands rounded by hand."""

import numpy as np
import paddle
import pytest

from paddlemix.kernels import bfloat16, cpu, gemm
from paddlemix.kernels.bfloat16 import Bfloat16Products
from paddlemix.models.blocks.language import TiedHead
from paddlemix.models.blocks.layers import Linear

# What packs weights where the processor has no bfloat16 packs rounded ones in float32: the same code.
PACKED = [
    None,
    *(dtype for dtype in ("float32", "bfloat16") if cpu.available("float32") and cpu.has_bfloat16() | (dtype != "bfloat16")),
]


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype("float32")


def rounded(x):
    """The nearest numbers of bfloat16, ties to even, in float64."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16).astype(np.uint32).view(np.float32).astype(np.float64)


def assert_near(found, expected):
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("shape", [(2, 5, 48), (3, 100, 192)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_and_its_gradients(monkeypatch, packed, shape, bias):
    """Every operand of the three products is rounded, and nothing else; small products too."""
    monkeypatch.setattr(gemm, "_SMALL", 1_000_000)
    inputs, out = shape[-1], 80
    layer = Linear(inputs, out, bias=bias)
    weight, x, outer = normal(inputs, out, seed=1), normal(*shape), normal(*shape[:-1], out, seed=2)
    layer.weight.set_value(weight)
    given = paddle.to_tensor(x, stop_gradient=False)
    with Bfloat16Products(packed):
        y = layer(given)
        y.backward(paddle.to_tensor(outer))
    x, outer = x.reshape(-1, inputs), outer.reshape(-1, out)
    assert_near(y.numpy().reshape(-1, out), rounded(x) @ rounded(weight))
    assert_near(given.grad.numpy().reshape(-1, inputs), rounded(outer) @ rounded(weight).T)
    assert_near(layer.weight.grad.numpy(), rounded(x).T @ rounded(outer))
    if bias:
        assert_near(layer.bias.grad.numpy(), outer.astype(np.float64).sum(0))
    exact = x.astype(np.float64) @ weight
    assert np.abs(y.numpy().reshape(-1, out) - exact).max() > 1e-4 * np.abs(exact).max()


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("frozen", ["weight", "input"])
def test_what_is_frozen_gets_no_gradient(packed, frozen):
    layer, x = Linear(64, 80), paddle.to_tensor(normal(7, 64), stop_gradient=frozen == "input")
    layer.weight.stop_gradient = frozen == "weight"
    with Bfloat16Products(packed):
        layer(x).sum().backward()
    assert (x.grad is None) == (frozen == "input") and (layer.weight.grad is None) == (frozen == "weight")


@pytest.mark.parametrize("active", [False, True])
@pytest.mark.parametrize("smallest", [0, 10**12])
def test_a_head_that_is_the_embedding(monkeypatch, active, smallest):
    """In float32 it goes through the same products, where Paddle's own would be slow."""
    monkeypatch.setattr(gemm, "_SMALL", smallest)
    embedding, hidden, outer = paddle.nn.Embedding(96, 32), normal(5, 32), normal(5, 96, seed=1)
    weight, x = embedding.weight.numpy(), paddle.to_tensor(hidden, stop_gradient=False)
    number = rounded if active else np.float64
    head = TiedHead(embedding)
    if active:
        with Bfloat16Products(None):
            y = head(x)
            y.backward(paddle.to_tensor(outer))
    else:
        y = head(x)
        y.backward(paddle.to_tensor(outer))
    assert_near(y.numpy(), number(hidden) @ number(weight).T)
    assert_near(x.grad.numpy(), number(outer) @ number(weight))
    assert_near(embedding.weight.grad.numpy(), number(outer).T @ number(hidden))


def test_other_computations_stay_in_float32():
    layer, x = Linear(48, 80, bias=False), paddle.to_tensor(normal(5, 48))
    before = layer(x).numpy()
    products = Bfloat16Products(None)
    with products, Bfloat16Products(None):
        inside = layer(x).numpy()
    assert gemm.active is None
    assert np.array_equal(layer(x).numpy(), before) and not np.array_equal(inside, before)


@pytest.mark.skipif(len(PACKED) == 1, reason="there are no CPU kernels here")
def test_weights_are_packed_once_a_step(monkeypatch):
    made = []

    class Packed(cpu.PackedLinear):
        def __init__(self, weight, *args, **named):
            made.append(weight.shape)
            super().__init__(weight, *args, **named)

        def fill(self, weight, *args, **named):
            made.append(weight.shape)
            super().fill(weight, *args, **named)

    monkeypatch.setattr(bfloat16.cpu, "PackedLinear", Packed)
    learned, frozen = Linear(64, 80, bias=False), Linear(64, 80, bias=False)
    frozen.weight.stop_gradient = True
    products, x = Bfloat16Products("float32"), paddle.to_tensor(normal(7, 64))
    counts = []
    for _ in range(2):  # steps, each of two batches
        for _ in range(2):
            with products:
                (learned(x) + frozen(x)).sum().backward()
        counts.append(made.count([64, 80]))
        learned.weight.set_value(learned.weight * 2)
        products.forget()
    assert counts == [2, 3]  # the frozen one for good
    with products, paddle.no_grad():
        assert_near(learned(x).numpy(), rounded(x.numpy()) @ rounded(learned.weight.numpy()))


def test_activations_are_kept_in_half_the_memory():
    layer, x = Linear(48, 80), paddle.to_tensor(normal(5, 48))
    kept = []
    with paddle.autograd.saved_tensors_hooks(lambda t: kept.append(t.dtype) or t, lambda t: t), Bfloat16Products(None):
        layer(x)
    assert paddle.bfloat16 in kept


def test_the_processor_decides_and_is_named(monkeypatch):
    for has in (True, False):
        monkeypatch.setattr(cpu, "has_bfloat16", lambda has=has: has)
        monkeypatch.setattr(cpu, "available", lambda dtype: True)
        products = Bfloat16Products()
        assert products.packed == ("bfloat16" if has else None)
        assert bool(products.note) == (not has)


@pytest.mark.skipif(len(PACKED) == 1, reason="the kernels do not work here")
def test_packs_follow_the_weights_and_go_when_nobody_asks(monkeypatch):
    monkeypatch.setattr(gemm, "_SMALL", 1000)
    layer, frozen, x = Linear(64, 80), Linear(64, 80), paddle.to_tensor(normal(7, 64))
    frozen.weight.stop_gradient = True
    products = Bfloat16Products(PACKED[-1])
    for seed in (1, 2):
        layer.weight.set_value(normal(64, 80, seed=seed))
        with products, paddle.no_grad():
            y, _ = layer(x), frozen(x)
        assert_near(y.numpy() - layer.bias.numpy(), rounded(normal(7, 64)) @ rounded(normal(64, 80, seed=seed)))
        assert len(products._packs) == 2  # the one that learns is in its old place
        products.forget()
    products.forget()
    assert [weight for weight, _ in products._packs.values()] == [frozen.weight]
