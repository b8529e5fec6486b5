"""Fused kernels of GPUs and of the Ascend plug-in behind attention, RMSNorm, rotary positions and products with a bias.

:func:`choose` names the kernel for a function and dtype on the device in use; the tables below call it. Each computes what
the plain composition in ``models/blocks/layers.py`` does, which stays the reference and the way out:
``PADDLEMIX_KERNELS=plain`` for all, or ``PADDLEMIX_KERNELS=attention=plain,norm=plain`` for some, turns them off, and
``PADDLEMIX_LOG=debug`` tells which are in use.

Tensor shapes: B batch, N queries, S keys, H query heads, K key/value heads, D head width.
"""

import functools
import logging
import os

import numpy as np
import paddle
from paddle import _C_ops
from paddle.nn import functional as F

from paddlemix import device
from paddlemix.errors import DeviceError

FUNCTIONS = ("attention", "norm", "add_norm", "rope", "linear", "int8", "int4")

_log = logging.getLogger(__name__)
_chosen = {}


def choose(function, dtype):
    """``"plain"``, or the name of the fused kernel to use.

    Args:
        function: one of :data:`FUNCTIONS`.
        dtype: dtype of the tensors.

    Raises:
        DeviceError: PADDLEMIX_KERNELS cannot be read.
    """
    key = function, dtype, device.current()
    if key not in _chosen:
        _chosen[key] = _choose(*key)
    return _chosen[key]


def _choose(function, dtype, kind):
    name = device.fused_kernel(function, dtype)
    if _switched_off(function):
        name, reason = "plain", "by PADDLEMIX_KERNELS"
    elif name is None:
        name, reason = "plain", "nothing else for this dtype here"
    elif (probe := _PROBES.get(name) or _PROBES.get((name, function))) and not probe():
        name, reason = "plain", f"{name} is not offered by {_OFFERED_BY.get(kind, 'the plug-in')}"
    else:
        reason = "the fastest here"
    _log.debug("%s in %s on %s: %s (%s)", function, str(dtype).split(".")[-1], kind, name, reason)
    return name


def _switched_off(function):
    setting = os.environ.get("PADDLEMIX_KERNELS") or "auto"
    if setting in ("auto", "plain"):
        return setting == "plain"
    switches = dict(part.strip().partition("=")[::2] for part in setting.split(","))
    if set(switches) - set(FUNCTIONS) or set(switches.values()) - {"auto", "plain"}:
        raise DeviceError(
            f"PADDLEMIX_KERNELS='{setting}' cannot be read: use plain, or a list such as attention=plain,norm=plain "
            f"({', '.join(FUNCTIONS)}; auto or plain)"
        )
    return switches.get(function) == "plain"


# ---------------------------------------------------------------------- custom operators of the Ascend plug-in


def _offered(call, name, *arguments):
    """Whether a custom operator exists and takes these arguments."""
    try:
        call(*arguments)
    except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        _log.debug("%s does not run: %s", name, lines[-1] if lines else type(error).__name__)
        return False
    return True


def _flash_npu_13(q, k, v, hidden):
    """From the plug-in of January 2025 on: seed, mask, two lengths of packed rows; ...; packed rows or not."""
    return _C_ops._run_custom_op(
        "flash_attention_npu", q, k, v, None, hidden, None, None, 0.0, False, True, False, False, False
    )[0]


def _flash_npu_10(q, k, v, hidden):
    """Before: seed, mask; dropout, causal, return the softmax, inference, mask is a triangle."""
    return _C_ops._run_custom_op("flash_attention_npu", q, k, v, None, hidden, 0.0, False, True, False, False)[0]


@functools.cache
def _flash_npu():
    """The call shape of flash_attention_npu that the plug-in takes; None if neither."""
    x = paddle.zeros([1, 16, 1, 64], "bfloat16")
    hidden = paddle.zeros([1, 1, 16, 16], "bool")
    return next((call for call in (_flash_npu_13, _flash_npu_10) if _offered(call, call.__name__, x, x, x, hidden)), None)


def _attention_npu(q, k, v, mask, length):
    # The operator's own causal mask is square and wrong with a KV cache: the mask is always written out.
    return _flash_npu()(q, k, v, None if mask is None else mask.hidden(q.shape[1], length, room=k.shape[1]))


def _norm_npu(x, weight, eps):
    return _C_ops._run_custom_op("rms_norm_npu", x, weight, eps)[0]


def _rope_npu(q, k, cos, sin):
    return [_C_ops._run_custom_op("fused_rope", x, cos, sin)[0] for x in (q, k) if x is not None]


@functools.cache
def _norm_npu_offered():
    return _offered(_norm_npu, "rms_norm_npu", paddle.ones([1, 64], "bfloat16"), paddle.ones([64], "bfloat16"), 1e-6)


@functools.cache
def _rope_npu_offered():
    x = paddle.ones([1, 16, 1, 64])
    return _offered(_rope_npu, "fused_rope", x, None, x, x)


# ---------------------------------------------------------------------- Paddle's own kernels


def _attention_gpu(q, k, v, mask, length):
    if mask is None or mask.is_plain_causal:
        return F.flash_attention.flash_attention(q, k, v, causal=mask is not None)[0]
    return F.flashmask_attention(q, k, v, mask.first_hidden(length), causal=True)


def _norm_gpu(x, weight, eps):
    return F.rms_norm(x, [x.shape[-1]], weight, eps)[0]


def _add_norm_gpu(x, residual, weight, eps):
    last = len(x.shape) - 1
    out = paddle.incubate.nn.functional.fused_rms_norm(x, weight, None, eps, begin_norm_axis=last, residual=residual)
    return out[1], out[0]


def _rope_gpu(q, k, cos, sin):
    rotate = paddle.incubate.nn.functional.fused_rotary_position_embedding
    return rotate(q, k, sin=sin, cos=cos, use_neox_rotary_style=False)[: 1 if k is None else 2]


def _linear(x, weight, bias):
    return paddle.incubate.nn.functional.fused_linear(x, weight, bias)


def _agrees(name, call, expected, *arrays):
    """Whether a kernel runs here, and computes in half precision what it should."""
    arguments = [paddle.to_tensor(x).astype("bfloat16" if device.supports_bfloat16() else "float16") for x in arrays]
    if not _offered(call, name, *arguments):
        return False
    outputs = call(*arguments)
    outputs = outputs if isinstance(outputs, (list, tuple)) else [outputs]
    if all(np.allclose(y.astype("float32").numpy(), e, atol=0.05) for y, e in zip(outputs, expected, strict=True)):
        return True
    _log.debug("%s computes something else", name)
    return False


@functools.cache
def _linear_offered():
    # Of Ascend's it is not known whether it takes more than two axes.
    x, weight, bias = np.linspace(-1, 1, 2 * 3 * 64, dtype="float32").reshape(2, 3, 64), np.eye(64, 32) / 2, np.arange(32) / 32
    weight, bias = weight.astype("float32"), bias.astype("float32")
    return _agrees("fused_linear", _linear, [x @ weight + bias], x, weight, bias)


@functools.cache
def _add_norm_offered():
    x, weight = np.linspace(-1, 1, 2 * 3 * 64, dtype="float32").reshape(2, 3, 64), np.linspace(0, 1, 64, dtype="float32")
    total = x + x[::-1]
    normed = total / np.sqrt((total**2).mean(-1, keepdims=True) + 1e-6) * weight
    return _agrees(
        "fused_rms_norm", lambda x, other, weight: _add_norm_gpu(x, other, weight, 1e-6), [total, normed], x, x[::-1], weight
    )


def _weight_only_gpu(x, codes, scales, bits, group, bias):
    return paddle.nn.quant.weight_only_linear(
        x, codes, bias=bias, weight_scale=scales, weight_dtype=f"int{bits}", arch=device.architecture(), group_size=group
    )


def _weight_only_npu(x, codes, scales, bits, group, bias):
    # It has two axes, no bias and one scale an output.
    y = _C_ops._run_custom_op("weight_only_linear_npu", x.reshape([-1, x.shape[-1]]), codes, scales)[0]
    y = y if bias is None else y + bias
    return y.reshape([*x.shape[:-1], codes.shape[1]])


def weight_quantize(weight, bits, group):
    """Codes, in the layout of the GPU in use, and scales of ``weight [in, out]`` in half precision; all axes multiples of 64.

    Others crash the process.
    """
    return paddle.nn.quant.weight_quantize(weight, algo=f"weight_only_int{bits}", arch=device.architecture(), group_size=group)


def _few_bits_offered(bits, ascend):
    # Codes of 4 bits that come out as they are: each output's and group's largest is the largest code.
    codes = np.resize(np.arange(-7, 8), [128, 64]).astype("float32")
    x = np.sin(np.arange(3 * 128, dtype="float32")).reshape(3, 128) / 8

    def call(x, values):
        if ascend:
            largest = np.full(64, 7 / 8 / 127, "float32")
            given = paddle.to_tensor(np.rint(codes / 7 * 127).astype("int8")), paddle.to_tensor(largest).astype(x.dtype)
            return _weight_only_npu(x, *given, bits, 64, None)
        return _weight_only_gpu(x, *weight_quantize(values, bits, 64), bits, 64, None)

    return _agrees(f"weights in {bits} bits", call, [x @ codes / 8], x, codes / 8)


_PROBES = {
    ("weight_only_linear", "int8"): functools.cache(lambda: _few_bits_offered(8, False)),
    ("weight_only_linear", "int4"): functools.cache(lambda: _few_bits_offered(4, False)),
    ("weight_only_linear_npu", "int8"): functools.cache(lambda: _few_bits_offered(8, True)),
    "flash_attention_npu": _flash_npu,
    "rms_norm_npu": _norm_npu_offered,
    "fused_rope": _rope_npu_offered,
    "fused_linear": _linear_offered,
    "fused_rms_norm": _add_norm_offered,
}
_OFFERED_BY = {device.PUBLISHED: "this build of Paddle"}

# ---------------------------------------------------------------------- by function

_ATTENTION = {"flash_attention": _attention_gpu, "flash_attention_npu": _attention_npu}
_NORM = {"rms_norm": _norm_gpu, "rms_norm_npu": _norm_npu}
_ADD_NORM = {"fused_rms_norm": _add_norm_gpu}
_WEIGHT_ONLY = {"weight_only_linear": _weight_only_gpu, "weight_only_linear_npu": _weight_only_npu}
_ROPE = {"fused_rotary_position_embedding": _rope_gpu, "fused_rope": _rope_npu}


def attention(kernel, q, k, v, mask, length):
    """``q [B, N, H, D]``, ``k, v [B, S, K, D]`` in half precision -> ``[B, N, H, D]``; ``mask`` None for full attention.

    ``length`` of the ``S`` positions count: all of them, but where :func:`takes_whole_caches`, with a mask.

    None where the kernel has no form for the mask: GPU kernels take queries and keys of the same positions only, or no mask.
    """
    if mask is not None and kernel == "flash_attention" and (q.shape[1] != k.shape[1] or not mask.is_spans):
        return None
    return _ATTENTION[kernel](q, k, v, mask, length)


def takes_whole_caches(dtype):
    """Whether the kernel of attention in ``dtype`` hides what of a cache is not filled, where a slice would be a copy."""
    return choose("attention", dtype) == "flash_attention_npu"


def rms_norm(kernel, x, weight, eps):
    """``x [..., D]``, ``weight [D]`` -> ``[..., D]``."""
    return _NORM[kernel](x, weight, eps)


def add_rms_norm(kernel, x, residual, weight, eps):
    """``residual + x`` and its norm, for ``x, residual [..., D]``; it has no gradients."""
    return _ADD_NORM[kernel](x, residual, weight, eps)


def linear(x, weight, bias):
    """``x [..., in] @ weight [in, out] + bias [out]`` in one operator. It could apply GELU as well, but by tanh alone."""
    return _linear(x, weight, bias)


def weight_only(kernel, x, codes, scales, bits, group, bias=None):
    """``x [..., in] @ weight + bias`` for a weight as :mod:`~.weight_only` made it, ``x`` in half precision."""
    return _WEIGHT_ONLY[kernel](x, codes, scales, bits, group, bias)


def rope_tables(cos, sin, dtype):
    """Tables as the kernels want them, from those of :func:`~paddlemix.models.blocks.layers.apply_rope`.

    ``sin`` has the sign of the formula, and both are in the dtype of what is rotated: cosines and sines of angles in float32,
    rounded as the original rounds them.
    """
    return cos.astype(dtype), (sin * _signs(sin.shape[-1], device.current())).astype(dtype)


def rope(kernel, q, k, tables):
    """``q [B, N, H, D]`` and ``k [B, N, K, D]`` or None, rotated, in a sequence; ``tables`` are those of :func:`rope_tables`,
    ``[1, N, 1, D]`` each."""
    return _ROPE[kernel](q, k, *tables)


@functools.cache
def _signs(width, _kind):
    return paddle.to_tensor(np.repeat(np.float32([-1, 1]), width // 2))
