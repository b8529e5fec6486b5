"""Products and attention with gradients on CPU, against Paddle's own operators in float32."""

import numpy as np
import paddle
import pytest

from paddlemix.kernels import gemm
from paddlemix.models.blocks.layers import AttentionMask, Linear, attention

pytestmark = pytest.mark.skipif(gemm._library() is None, reason="Paddle ships no oneDNN here")


def normal(seed, *shape, learns=True):
    values = np.random.default_rng(seed).standard_normal(shape, np.float32)
    return paddle.to_tensor(values, stop_gradient=not learns)


@pytest.fixture
def compare(monkeypatch):
    """Checks that a computation and its gradients are the same with and without this module, and that it is used."""

    def check(compute, *tensors, used, tolerance=2e-6):
        found, calls = [], []
        original = getattr(gemm, used)
        monkeypatch.setattr(gemm, used, lambda *args, **options: calls.append(1) or original(*args, **options))
        for smallest in (0, 10**12):
            monkeypatch.setattr(gemm, "_SMALL", smallest)
            for tensor in tensors:
                tensor.clear_gradient(False)
            result = compute()
            (result * normal(9, *result.shape, learns=False)).sum().backward()
            found.append([result.numpy(), *(t.grad.numpy() for t in tensors)])
        assert len(calls) == 1
        for ours, plain in zip(*found):
            assert np.abs(ours - plain).max() < tolerance * np.abs(plain).max()

    return check


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 70), (2, 50, 70), (3, 1, 5, 70)])
def test_linear(compare, shape, bias):
    layer, x = Linear(70, 30, bias=bias), normal(0, *shape)
    if bias:
        layer.bias.set_value(normal(1, 30))
    compare(lambda: layer(x), x, *layer.parameters(), used="linear")


def test_linear_of_slices_and_transposes(compare):
    layer, x = Linear(16, 24, bias=False), normal(0, 16, 40, 4)
    compare(lambda: layer(x.transpose([2, 1, 0])[1:3]), x, layer.weight, used="linear")


def test_frozen_weights_and_inputs_get_no_gradients(monkeypatch):
    monkeypatch.setattr(gemm, "_SMALL", 0)
    layer, x = Linear(8, 8), normal(0, 4, 8)
    layer.weight.stop_gradient = True
    layer(x).sum().backward()
    assert layer.weight.grad is None and layer.bias.grad is not None
    assert np.allclose(x.grad.numpy(), np.tile(layer.weight.numpy().sum(1), (4, 1)), atol=1e-6)
    with paddle.no_grad():
        assert layer(x).stop_gradient


@pytest.mark.parametrize("shape", [(3,), (5, 7, 4096)])
def test_gelu_of_frozen_layers(monkeypatch, shape):
    x = normal(0, *shape, learns=False)
    assert np.array_equal(gemm.gelu(x).numpy(), paddle.nn.functional.gelu(x).numpy())
    monkeypatch.setattr(gemm, "_SMALL", 0)
    layer, calls = Linear(shape[-1], 8), []
    original = gemm.gelu
    monkeypatch.setattr(gemm, "gelu", lambda x: calls.append(1) or original(x))
    with paddle.no_grad():
        frozen = layer(x, gelu=True)
    assert calls == [1] and np.array_equal(frozen.numpy(), layer(x, gelu=True).numpy())
    assert calls == [1]  # gradients go through Paddle's


SEGMENTS = np.repeat([[1, 2, 3], [1, 1, 0]], [130, 70, 100], axis=1)
MASKS = {
    "full": None,
    "causal": AttentionMask(),
    "packed": AttentionMask(None, SEGMENTS),
}


@pytest.mark.parametrize("kv_heads", [6, 2, 1])
@pytest.mark.parametrize("mask", MASKS)
def test_attention(compare, mask, kv_heads):
    q, k, v = normal(0, 2, 300, 6, 16), normal(1, 2, 300, kv_heads, 16), normal(2, 2, 300, kv_heads, 16)
    compare(lambda: attention(q, k, v, MASKS[mask]), q, k, v, used="attention")


def test_attention_of_rows_with_padding_on_the_left(compare):
    q, k, v = normal(0, 2, 200, 4, 16), normal(1, 2, 200, 2, 16), normal(2, 2, 200, 2, 16)
    tokens = (np.arange(200) >= np.array([[0], [150]])).astype("float32")[..., None]
    mask = AttentionMask.from_padding(tokens[..., 0])
    compare(lambda: attention(q, k, v, mask) * paddle.to_tensor(tokens), q, k, v, used="attention")


def test_attention_of_large_scores_stays_finite(compare):
    q, k, v = normal(0, 1, 150, 2, 16), normal(1, 1, 150, 2, 16), normal(2, 1, 150, 2, 16)
    big = 40.0  # logits of hundreds
    compare(lambda: attention(q * big, k, v, AttentionMask()), v, used="attention", tolerance=2e-5)


def test_a_number_that_is_none_is_not_hidden(monkeypatch):
    monkeypatch.setattr(gemm, "_SMALL", 0)
    q, k, v = (normal(seed, 1, 20, 2, 16, learns=False) for seed in range(3))
    q[0, 3] = float("nan")
    out = attention(q, k, v, AttentionMask()).numpy()
    assert np.isnan(out[0, 3]).all() and np.isfinite(out[0, :3]).all() and np.isfinite(out[0, 4:]).all()


def test_it_can_be_turned_off(monkeypatch):
    x = normal(0, 2, 2)
    assert gemm.suits(10**9, x) and not gemm.suits(10, x) and not gemm.suits(10**9, x.astype("float64"))
    monkeypatch.setenv("PADDLEMIX_KERNELS", "plain")
    assert not gemm.suits(10**9, x)


def test_sum_of_squares(monkeypatch):
    monkeypatch.setattr(gemm, "_SMALL", 1000)
    x = np.random.default_rng(0).standard_normal([3, 1_200_001]).astype("float32")
    assert float(gemm.square(paddle.to_tensor(x))) == pytest.approx((x.astype("float64") ** 2).sum(), rel=1e-6)
    x[1, 7] = np.inf
    assert float(gemm.square(paddle.to_tensor(x))) == np.inf
    x[2, 7] = np.nan
    assert np.isnan(float(gemm.square(paddle.to_tensor(x))))
