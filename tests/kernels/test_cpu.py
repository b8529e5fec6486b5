"""The CPU kernels against NumPy in float64.

Tolerances are relative to the largest expected value: 2e-6 for float32; 1e-2 for bfloat16, whose unit roundoff is 2^-8
and whose products here round each operand once or twice.
"""

import math
import os
import subprocess
import sys
import warnings

import numpy as np
import paddle
import pytest

from paddlemix.kernels import cpu
from paddlemix.quantised import rounded_activations

TOLERANCE = {"bfloat16": 1e-2, "float32": 2e-6}


@pytest.fixture(params=["bfloat16", "float32"])
def dtype(request):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if not cpu.available(request.param):
            pytest.skip(str(caught[-1].message) if caught else f"no CPU kernels in {request.param} here")
    return request.param


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def normal(rng, *shape):
    return rng.standard_normal(shape, dtype=np.float32)


def assert_close(got, expected, dtype):
    error = np.abs(got.numpy().astype("float64") - expected).max() / np.abs(expected).max()
    assert error < TOLERANCE[dtype]


ACTIVATIONS = {
    None: lambda x: x,
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: x * np.vectorize(lambda t: (1 + math.erf(t / math.sqrt(2))) / 2)(x),
    "gelu_tanh": lambda x: x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
}


@pytest.mark.parametrize("rows", [1, 3, 512, 641, 1025])  # around the size of a chunk of rows
@pytest.mark.parametrize("inner, outer", [(64, 48), (588, 129)])
def test_linear(rng, dtype, rows, inner, outer):
    x, weight, bias, residual = (normal(rng, *s) for s in ((rows, inner), (inner, outer), (outer,), (rows, outer)))
    linear = cpu.PackedLinear(paddle.to_tensor(weight), paddle.to_tensor(bias), dtype)
    got = linear(paddle.to_tensor(x), residual=paddle.to_tensor(residual))
    assert got.dtype == paddle.float32
    assert_close(got, x.astype("float64") @ weight + bias + residual, dtype)


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("inner, outer", [(64, 48), (589, 1291)])
def test_a_few_rows_are_each_computed_alone(rng, activation, inner, outer):
    x, weight, bias, residual = (normal(rng, *s) for s in ((64, inner), (inner, outer), (outer,), (64, outer)))
    linear = cpu.PackedLinear(paddle.to_tensor(weight), paddle.to_tensor(bias), "float32")
    if not linear.alone:
        pytest.skip("oneDNN has another layout for weights here")
    linear.few, norm = True, cpu.Norm(paddle.to_tensor(bias[:inner] if inner <= outer else normal(rng, inner)), None, 1e-6)

    def rows(first, last):
        few, rest = (paddle.to_tensor(array[first:last]) for array in (x, residual))
        return linear(few, norm=norm, activation=activation, residual=rest)

    scale = 1 / np.sqrt((x.astype("float64") ** 2).mean(-1, keepdims=True) + 1e-6)
    expected = ACTIVATIONS[activation](x * scale * norm.weight.numpy() @ weight.astype("float64") + bias) + residual
    whole = rows(0, 64)
    assert_close(whole, expected, "float32")
    for first, last in ((5, 6), (0, 2), (9, 12), (16, 32), (7, 64)):
        np.testing.assert_array_equal(rows(first, last).numpy(), whole[first:last].numpy())


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_linear_activation_comes_before_the_residual(rng, dtype, activation):
    x, weight, residual = normal(rng, 2, 9, 32), normal(rng, 32, 16), normal(rng, 2, 9, 16)
    linear = cpu.PackedLinear(paddle.to_tensor(weight), dtype=dtype)
    got = linear(paddle.to_tensor(x), activation=activation, residual=paddle.to_tensor(residual))
    assert_close(got, ACTIVATIONS[activation](x.astype("float64") @ weight) + residual, dtype)


def test_transposed_and_bfloat16_weights_pack_alike(rng, dtype):
    weight = paddle.to_tensor(normal(rng, 64, 40)).astype("bfloat16")
    x = paddle.to_tensor(normal(rng, 5, 64))
    expected = cpu.PackedLinear(weight.astype("float32"), dtype=dtype)(x).numpy()
    transposed = paddle.to_tensor(weight.astype("float32").numpy().T).astype("bfloat16")
    assert np.array_equal(cpu.PackedLinear(weight, dtype=dtype)(x).numpy(), expected)
    assert np.array_equal(cpu.PackedLinear(transposed, dtype=dtype, transposed=True)(x).numpy(), expected)


def test_packed_weights_do_not_alias_the_given_ones(rng, dtype):
    weight, bias = paddle.to_tensor(normal(rng, 16, 16)), paddle.to_tensor(normal(rng, 16))
    x = paddle.to_tensor(normal(rng, 4, 16))
    linear = cpu.PackedLinear(weight, bias, dtype)
    before = linear(x).numpy()
    weight.zero_()
    bias.zero_()
    assert np.array_equal(linear(x).numpy(), before)


def norm_reference(x, weight, bias, eps):
    x = x.astype("float64")
    if bias is not None:
        x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight
    return x if bias is None else x + bias


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_norm_alone_and_fused(rng, dtype, kind):
    x, weight, bias = 3 + normal(rng, 2, 7, 100), normal(rng, 100), normal(rng, 100) if kind == "layer" else None
    norm = cpu.Norm(paddle.to_tensor(weight), None if bias is None else paddle.to_tensor(bias), 1e-5)
    expected = norm_reference(x, weight, bias, 1e-5)
    assert_close(norm(paddle.to_tensor(x)), expected, "float32")
    matrix = normal(rng, 100, 30)
    assert_close(cpu.PackedLinear(paddle.to_tensor(matrix), dtype=dtype)(paddle.to_tensor(x), norm), expected @ matrix, dtype)


@pytest.mark.parametrize("rows", [1, 700])
@pytest.mark.parametrize("gated", [False, True])
def test_mlp(rng, dtype, rows, gated):
    x = normal(rng, rows, 64)
    w = {name: normal(rng, *shape) / 8 for name, shape in {"up": (64, 112), "gate": (64, 112), "down": (112, 64)}.items()}
    packed = {name: cpu.PackedLinear(paddle.to_tensor(weight), dtype=dtype) for name, weight in w.items()}
    scale = normal(rng, 64)
    h = norm_reference(x, scale, None, 1e-6)
    if gated:
        expected = x + (ACTIVATIONS["silu"](h @ w["gate"]) * (h @ w["up"])) @ w["down"]
    else:
        expected = x + ACTIVATIONS["gelu"](h @ w["up"]) @ w["down"]
    tensor = paddle.to_tensor(x)
    got = cpu.mlp(
        tensor, packed["up"], packed["down"], packed["gate"] if gated else None,
        cpu.Norm(paddle.to_tensor(scale), None, 1e-6), "silu" if gated else "gelu", tensor,
    )  # fmt: skip
    assert_close(got, expected, dtype)


@pytest.mark.parametrize("shape", [(34, 17), (896, 200), (130, 1000)])
@pytest.mark.parametrize("source", ["float32", "bfloat16"])
def test_other_weights_in_the_same_place(rng, dtype, shape, source):
    first, second, x = (paddle.to_tensor(normal(rng, *s)) for s in (shape, shape, (70, shape[0])))
    exact = second.astype(dtype).astype("float32") if source == "float32" else second.astype(source).astype("float32")
    expected = x.astype(dtype).astype("float32").numpy().astype("float64") @ exact.numpy()
    for turned in (False, True):
        given = [(w.transpose([1, 0]) if turned else w).contiguous().astype(source) for w in (first, second)]
        layer = cpu.PackedLinear(given[0], dtype=dtype, transposed=turned)
        layer.fill(given[1], transposed=turned)
        got = layer(x).numpy()
        assert np.abs(got - expected).max() < 1e-5 * np.abs(expected).max()
        assert np.array_equal(got, cpu.PackedLinear(given[1], dtype=dtype, transposed=turned)(x).numpy())
        with pytest.raises(ValueError, match="are not of a layer of"):
            layer.fill(given[1][:, 1:], transposed=turned)
    with pytest.raises(RuntimeError, match="cannot be replaced"):
        cpu.PackedLinear.mapped(_aligned(layer.packed), shape, dtype=dtype).fill(second)


def _aligned(packed):
    room = np.empty(packed.size + 64, np.uint8)
    start = -room.ctypes.data % 64
    room[start : start + packed.size] = packed
    return room[start : start + packed.size]


def test_results_go_where_they_are_asked_for(rng, dtype):
    x, room = paddle.to_tensor(normal(rng, 2, 40, 64)), cpu.Room()
    up, down = (cpu.PackedLinear(paddle.to_tensor(normal(rng, *s)), dtype=dtype) for s in ((64, 192), (192, 64)))
    q, k, v = (up(x).reshape([2, 40, 3, 64])[:, :, i].reshape([2, 40, 1, 64]) for i in range(3))
    for name, width, call in (
        ("a", 192, lambda **out: up(x, **out)),
        ("b", 64, lambda **out: cpu.mlp(x, up, down, **out)),
        ("c", 64, lambda **out: cpu.attention(q, k, v, causal=False, dtype=dtype, **out)),
    ):
        place = room(name, [2, 40, width])
        place.fill_(7)
        assert call(out=place) is place and np.array_equal(place.numpy(), call().numpy())
        assert room(name, [2, 40, width]) is place and room(name, [1, 40, width]).shape == [1, 40, width]
        with pytest.raises(ValueError, match="out has shape"):
            call(out=paddle.empty([2, 40, width + 1]))


def attention_reference(q, k, v, causal, length, starts, window=None, sinks=None):
    batch, queries, heads, width = q.shape
    group = heads // k.shape[2]
    key, query = np.arange(length), length - queries + np.arange(queries)
    out = np.zeros(q.shape)
    for b in range(batch):
        seen = np.broadcast_to(key >= (starts[b] if starts else 0), (queries, length))
        seen = seen & (key <= query[:, None]) if causal else seen
        seen = seen & (key > query[:, None] - window) if window else seen
        for h in range(heads):
            scores = q[b, :, h].astype("float64") @ k[b, :length, h // group].T / math.sqrt(width)
            top = scores.max(-1, keepdims=True)
            weights = np.where(seen, np.exp(scores - top), 0)
            total = weights.sum(-1, keepdims=True) + (0 if sinks is None else np.exp(sinks[h] - top))
            out[b, :, h] = weights / np.maximum(total, 1e-300) @ v[b, :length, h // group]
    return out.reshape(batch, queries, heads * width)


ATTENTION = {
    "vision tile": dict(queries=1025, heads=2, kv_heads=2, width=64, keys=1025, causal=False),
    "wide heads": dict(queries=130, heads=2, kv_heads=2, width=128, keys=130, causal=False),
    "prefill": dict(queries=700, heads=6, kv_heads=2, width=64, keys=1000, causal=True, length=700),
    "second round": dict(queries=70, heads=4, kv_heads=2, width=80, keys=900, causal=True, length=811),
    "left-padded": dict(
        batch=3, queries=300, heads=2, kv_heads=1, width=96, keys=333, causal=True, length=300, starts=[0, 9, 290]
    ),
    "left-padded, heads of 64": dict(
        batch=3, queries=600, heads=3, kv_heads=1, width=64, keys=640, causal=True, length=601, starts=[0, 99, 590]
    ),
    "window": dict(batch=2, queries=650, heads=4, kv_heads=2, width=64, keys=1500, causal=True, length=1300, window=100),
    "window, left-padded": dict(
        batch=2, queries=90, heads=2, kv_heads=2, width=128, keys=700, causal=True, window=70, starts=[0, 666]
    ),
    "sinks": dict(queries=65, heads=8, kv_heads=2, width=64, keys=600, causal=True, length=577, window=33, sinks=True),
    "decode": dict(batch=2, queries=1, heads=14, kv_heads=2, width=64, keys=2048, causal=True, length=1833, starts=[0, 700]),
    "first token": dict(queries=1, heads=2, kv_heads=1, width=8, keys=5, causal=True, length=1),
}


@pytest.mark.parametrize("case", list(ATTENTION))
def test_attention(rng, dtype, case):
    c = {"batch": 1, "length": None, "starts": None, "window": None, "sinks": False, **ATTENTION[case]}
    q = 2 * normal(rng, c["batch"], c["queries"], c["heads"], c["width"])
    k, v = (normal(rng, c["batch"], c["keys"], c["kv_heads"], c["width"]) for _ in "kv")
    sinks = 3 * normal(rng, c["heads"]) if c["sinks"] else None
    expected = attention_reference(q, k, v, c["causal"], c["length"] or c["keys"], c["starts"], c["window"], sinks)
    options = {name: c[name] for name in ("causal", "length", "starts", "window")}
    options |= {"dtype": dtype, "sinks": None if sinks is None else paddle.to_tensor(sinks)}
    q, k, v = (paddle.to_tensor(x) for x in (q, k, v))
    assert_close(cpu.attention(q, k, v, **options), expected, dtype)
    assert_close(cpu.attention(q, k.astype(dtype), v.astype(dtype), **options), expected, dtype)  # a cache in dtype


@pytest.mark.parametrize("window", [None, 90])
def test_what_a_query_gives_depends_on_no_other(rng, dtype, window):
    q, k, v = (paddle.to_tensor(normal(rng, 1, n, h, 64)) for n, h in ((700, 3), (1000, 1), (1000, 1)))
    options = {"causal": True, "window": window, "dtype": dtype}
    alone = dtype == "bfloat16" and cpu.PackedLinear(paddle.ones([64, 64])).alone  # by the processor's pairs of bfloat16
    whole = cpu.attention(q, k, v, **options).numpy()
    for first, last in ((0, 40), (300, 411), (511, 700)):
        part = cpu.attention(q[:, first:last], k, v, length=300 + last, **options).numpy()
        assert np.abs(part - whole[:, first:last]).max() <= (0 if alone else 2e-2 * np.abs(whole).max())


@pytest.mark.parametrize(
    "tokens, heads, kv_heads, width", [(40, 2, 2, 64), (570, 1, 1, 64), (577, 3, 1, 64), (1025, 2, 2, 128)]
)
def test_queries_and_keys_in_8_bits(rng, dtype, tokens, heads, kv_heads, width):
    """Each token's of a head by themselves, where the processor has what makes that pay; elsewhere as they are."""
    q = 2 * normal(rng, 1, tokens, heads, width) * np.exp(normal(rng, 1, tokens, heads, 1))
    k, v = (normal(rng, 1, tokens, kv_heads, width) for _ in "kv")
    tensors = [paddle.to_tensor(x) for x in (q, k, v)]
    plain, got = (cpu.attention(*tensors, causal=False, dtype=dtype, rounded=rounded) for rounded in (False, True))
    if dtype == "float32" or not {"avx512_vnni", "avx512_bf16"} <= cpu._cpu_flags():
        assert np.array_equal(got.numpy(), plain.numpy())
        return
    assert not np.array_equal(got.numpy(), plain.numpy())
    seen = (rounded_activations(x, width) for x in (q, k))
    assert_close(got, attention_reference(*seen, v, False, tokens, None), dtype)
    part = cpu.attention(tensors[0][:, 3:39], *tensors[1:], causal=False, dtype=dtype, rounded=True).numpy()
    assert np.array_equal(part, got.numpy()[:, 3:39])  # whoever else asks


def test_attention_reads_slices_of_a_fused_product_in_place(rng, dtype):
    qkv = paddle.to_tensor(normal(rng, 2, 50, 12, 64))
    q, k, v = qkv[:, :, :4], qkv[:, :, 4:8], qkv[:, :, 8:]
    copies = (paddle.to_tensor(x.numpy()) for x in (q, k, v))
    got = cpu.attention(q, k, v, causal=False, dtype=dtype).numpy()
    assert np.array_equal(got, cpu.attention(*copies, causal=False, dtype=dtype).numpy())


def test_attention_ignores_what_the_cache_holds_beyond_the_length(rng, dtype):
    q, k, v = (paddle.to_tensor(normal(rng, 1, n, 2, 64)) for n in (3, 256, 256))
    before = cpu.attention(q, k, v, causal=True, length=100, dtype=dtype).numpy()
    k[:, 100:] = 1e4
    v[:, 100:] = -1e4
    assert np.array_equal(cpu.attention(q, k, v, causal=True, length=100, dtype=dtype).numpy(), before)


def test_attention_survives_scores_beyond_the_range_of_exp(rng, dtype):
    q, k, v = (normal(rng, 1, 200, 1, 64) for _ in range(3))
    q *= 100
    expected = attention_reference(q, k, v, False, 200, None)
    got = cpu.attention(*(paddle.to_tensor(x) for x in (q, k, v)), causal=False, dtype="float32")
    assert_close(got, expected, "bfloat16")  # exp amplifies the rounding of scores near 1000


@pytest.mark.parametrize("table_batch", [1, 2])
def test_rotate_and_cache(rng, dtype, table_batch):
    batch, tokens, heads, kv_heads, width, capacity, offset = 2, 19, 4, 2, 16, 32, 5
    qkv = normal(rng, batch, tokens, (heads + 2 * kv_heads) * width)
    angles = rng.uniform(0, 6, (table_batch, tokens, 1, width // 2)).astype("float32")
    cos = np.concatenate([np.cos(angles)] * 2, -1)
    sin = np.concatenate([-np.sin(angles), np.sin(angles)], -1)
    k_cache, v_cache = (paddle.full([batch, capacity, kv_heads, width], 7, dtype) for _ in "kv")
    q = cpu.rotate_and_cache(*(paddle.to_tensor(x) for x in (qkv, cos, sin)), heads, k_cache, v_cache, offset)
    x = qkv.reshape(batch, tokens, -1, width).astype("float64")
    pairs = x[..., : width // 2] + 1j * x[..., width // 2 :]
    turned = pairs * np.exp(1j * angles)
    turned = np.concatenate([turned.real, turned.imag], -1)
    assert_close(q, turned[:, :, :heads], "float32")
    for cache, new in ((k_cache, turned[:, :, heads:-kv_heads]), (v_cache, x[:, :, -kv_heads:])):
        cache = cache.astype("float32")
        assert_close(cache[:, offset : offset + tokens], new, dtype)
        assert (cache[:, :offset].numpy() == 7).all() and (cache[:, offset + tokens :].numpy() == 7).all()


def test_one_thread_gives_the_same_numbers_as_two(rng, dtype):
    q, k, v = (paddle.to_tensor(normal(rng, 1, 300, 4, 64)) for _ in range(3))
    linear = cpu.PackedLinear(paddle.to_tensor(normal(rng, 256, 300)), dtype=dtype)
    results = []
    try:
        for threads in (1, 2):
            cpu.set_num_threads(threads)
            out = linear(cpu.attention(q, k, v, causal=True, dtype=dtype))
            results.append(out.numpy())
    finally:
        cpu.set_num_threads(0)
    np.testing.assert_allclose(results[0], results[1], rtol=1e-5, atol=1e-4)


def test_wrong_input_is_named(rng, dtype):
    linear = cpu.PackedLinear(paddle.ones([16, 8]), dtype=dtype)
    x = paddle.ones([2, 16])
    with pytest.raises(ValueError, match="width 8, the weights take 16"):
        linear(paddle.ones([2, 8]))
    with pytest.raises(TypeError, match="x must be float32"):
        linear(x.astype("float64"))
    with pytest.raises(ValueError, match="residual has shape"):
        linear(x, residual=x)
    with pytest.raises(ValueError, match="do not fit each other"):
        cpu.mlp(x, linear, cpu.PackedLinear(paddle.ones([4, 16]), dtype=dtype))
    q, k = paddle.ones([1, 4, 2, 8]), paddle.ones([1, 6, 2, 8])
    with pytest.raises(ValueError, match="length 7"):
        cpu.attention(q, k, k, causal=True, length=7)
    with pytest.raises(ValueError, match="do not fit"):
        cpu.attention(q, k, k[:, :5], causal=True)
    with pytest.raises(TypeError, match="k and v float32 or float32"):
        cpu.attention(q, k.astype("bfloat16"), k.astype("bfloat16"), causal=True, dtype="float32")
    with pytest.raises(ValueError, match="holds 6 positions"):
        cpu.rotate_and_cache(paddle.ones([1, 4, 48]), paddle.ones([1, 4, 8]), paddle.ones([1, 4, 8]), 2, k, k.clone(), 3)


def test_without_a_compiler_the_kernels_are_off(tmp_path):
    script = "from paddlemix.kernels import cpu; print(cpu.available('float32'))"
    environment = {**os.environ, "CXX": "no-such-compiler", "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
    assert "CPU kernels are off, so answers are slower: there is no C++ compiler" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_result_turns_the_kernels_off(dtype, monkeypatch):
    monkeypatch.setitem(cpu.ACTIVATIONS, "silu", cpu.ACTIVATIONS["gelu"])
    with pytest.warns(RuntimeWarning, match="linear is off by"):
        assert not cpu.available.__wrapped__(dtype)
