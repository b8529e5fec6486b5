"""Whether the kernels of :mod:`~.cpu` compute on this machine what they should."""

import numpy as np
import paddle

from paddlemix import quantised
from paddlemix.quantised import rounded_activations

from .cpu import Norm, PackedLinear, Unavailable, attention, has_bfloat16, mlp, rotate_and_cache


def self_check(dtype):
    """Compare every kernel with NumPy on small shapes that reach all its branches.

    Raises:
        Unavailable: the machine lacks something, or a result is wrong.
        MemoryError: there is no room for the check.
    """
    from .quantised import QuantisedLinear, quantise  # which ask this module's kernels

    bytearray(64 << 20)  # NumPy's OpenBLAS tries for ever to get its 32 MB where there are none: MemoryError here instead
    if dtype == "bfloat16" and not has_bfloat16():
        raise Unavailable("this CPU has no bfloat16 instructions")
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.standard_normal(shape, dtype=np.float32)

    def check(name, got, expected, allowed=0):
        error = np.abs(got.numpy() - expected).max() / np.abs(expected).max()
        if not error < max(allowed, {"bfloat16": 0.015, "float32": 1e-4}[dtype]):  # also when it is not a number
            raise Unavailable(f"{name} is off by {error:.1e}, which would give wrong answers")

    def silu(x):
        return x / (1 + np.exp(-x))

    width, hidden, heads, kv_heads, head_dim = 96, 160, 4, 2, 64
    shapes = {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
    weights = {name: normal(*shape) / np.float32(shape[0] ** 0.5) for name, shape in shapes.items()}
    packed = {name: PackedLinear(paddle.to_tensor(w), dtype=dtype) for name, w in weights.items()}
    scale, shift, bias = 1 + normal(width) / 4, normal(width) / 4, normal(hidden)
    layer_norm = Norm(paddle.to_tensor(scale), paddle.to_tensor(shift), 1e-6)
    rms_norm = Norm(paddle.to_tensor(scale), None, 1e-6)
    with_bias = PackedLinear(paddle.to_tensor(weights["up"].T), paddle.to_tensor(bias), dtype, transposed=True)
    for rows in (1, 700):
        x, residual = normal(rows, width), normal(rows, hidden)
        tensor = paddle.to_tensor(x)
        centred = x - x.mean(-1, keepdims=True)
        layer_normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * scale + shift
        rms_normed = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale
        check("layer norm", layer_norm(tensor), layer_normed)
        linear = silu(layer_normed @ weights["up"] + bias) + residual
        check("linear", with_bias(tensor, layer_norm, "silu", paddle.to_tensor(residual)), linear)
        gated = x + (silu(rms_normed @ weights["gate"]) * (rms_normed @ weights["up"])) @ weights["down"]
        check("gated MLP", mlp(tensor, packed["up"], packed["down"], packed["gate"], rms_norm, "silu", tensor), gated)

    for bits in (8, 4):
        kinds = {name: quantise(np.ascontiguousarray(w.T), bits) for name, w in weights.items()}
        gate, up, down = (kinds[name].dequantised().T for name in ("gate", "up", "down"))
        for rows, activations in ((3, None), (3, "int8"), (40, None), (40, "int8")):
            layers = {name: QuantisedLinear(weight, None, dtype, activations) for name, weight in kinds.items()}
            x = normal(rows, width)
            seen = rounded_activations(x, quantised.BLOCK) if activations else x
            hidden_rows = silu(seen @ gate) * (seen @ up)
            seen = rounded_activations(hidden_rows, quantised.BLOCK) if activations else hidden_rows
            got = mlp(paddle.to_tensor(x), layers["up"], layers["down"], layers["gate"], None, "silu")
            # A number on the border between two may be rounded to either.
            check("MLP in few bits", got, seen @ down, 0.01 if activations else 0)

    for tokens, length, causal in ((700, 700, False), (300, 820, True), (1, 70, True)):
        capacity, start = 840, length // 8
        qkv = normal(1, tokens, (heads + 2 * kv_heads) * head_dim)
        angles = rng.uniform(0, 6, (1, tokens, head_dim // 2)).astype("float32")
        cos, sin = np.concatenate([np.cos(angles)] * 2, -1), np.concatenate([-np.sin(angles), np.sin(angles)], -1)
        k, v = (normal(1, capacity, kv_heads, head_dim) for _ in "kv")
        k_cache, v_cache = paddle.to_tensor(k).astype(dtype), paddle.to_tensor(v).astype(dtype)
        rotated = rotate_and_cache(*map(paddle.to_tensor, (qkv, cos, sin)), heads, k_cache, v_cache, length - tokens)
        x = qkv.reshape(1, tokens, -1, head_dim)
        swapped = np.concatenate([x[..., head_dim // 2 :], x[..., : head_dim // 2]], -1)
        turned = x * cos[:, :, None] + swapped * sin[:, :, None]
        k[:, length - tokens : length] = turned[:, :, heads:-kv_heads]
        v[:, length - tokens : length] = x[:, :, -kv_heads:]
        check("rotary positions", rotated, turned[:, :, :heads])
        check("key cache", k_cache.astype("float32"), k)
        check("value cache", v_cache.astype("float32"), v)
        query, key = length - tokens + np.arange(tokens), np.arange(length)
        for window, sinks in ((None, None), (100, normal(heads))) if causal else ((None, None),):
            got = attention(
                rotated, k_cache, v_cache, causal=causal, length=length, starts=[start], dtype=dtype, window=window,
                sinks=None if sinks is None else paddle.to_tensor(sinks),
            )  # fmt: skip
            seen = (key >= start) & ((key <= query[:, None]) | (not causal)) & (key > query[:, None] - (window or length))
            expected = []
            for head in range(heads):
                scores = turned[0, :, head] @ k[0, :length, head * kv_heads // heads].T / np.sqrt(head_dim)
                peak = scores.max(-1, keepdims=True)
                weight = np.where(seen, np.exp(scores - peak), 0)
                total = weight.sum(-1, keepdims=True) + (0 if sinks is None else np.exp(sinks[head] - peak))
                expected.append(weight / total @ v[0, :length, head * kv_heads // heads])
            check("attention", got.reshape([tokens, heads, head_dim]), np.stack(expected, 1))
