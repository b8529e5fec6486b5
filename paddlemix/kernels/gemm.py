"""Linear layers and attention in float32 on x86 CPUs, with gradients, for training and for frozen parts beside it.

Paddle's products on CPU are MKL's, which takes its slowest path on AMD: five times slower than the oneDNN that Paddle
ships too, whose ``sgemm`` is called here. Attention never holds its scores: they are computed block by block, and again for
gradients (arXiv 2205.14135, 2307.08691), and what the causal order hides is not computed at all. Heads are shared among
threads.

``PADDLEMIX_KERNELS=plain`` turns all of it off. Tensor shapes: B batch, N positions, H query heads, K key/value heads,
D head width.
"""

import ctypes
import functools
import math
import os
import platform
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import paddle
from paddle.nn import functional as F

from paddlemix import device

from .cpu import num_threads

__all__ = ["Products", "attention", "gelu", "linear", "linear_for", "outer", "plain", "square", "suits"]

active = None  # a Bfloat16Products, within its context

# Below so many multiplications a call costs more than it saves.
_SMALL = 4_000_000
_BLOCK = 128  # queries at a time: their scores stay in the cache
_SLICE = 2**16  # values at a time


@functools.cache
def _library():
    """oneDNN and its OpenMP; None where Paddle ships none."""
    paths = [Path(paddle.__file__).parent / "libs" / name for name in ("libdnnl.so.3", "libiomp5.so")]
    if platform.machine() != "x86_64" or not all(path.exists() for path in paths):
        return None
    dnnl, openmp = map(ctypes.CDLL, paths)
    size, number, address = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
    dnnl.dnnl_sgemm.argtypes = [*[ctypes.c_char] * 2, *[size] * 3, number, address, size, address, size, number, address, size]
    return dnnl, openmp


def suits(multiplications, *tensors):
    """Whether a computation of so many multiplications with ``tensors`` is one for this module."""
    return (
        multiplications >= _SMALL
        and paddle.in_dynamic_mode()
        and all(tensor.dtype == paddle.float32 for tensor in tensors)
        and device.is_cpu()
        and os.environ.get("PADDLEMIX_KERNELS") != "plain"
        and _library() is not None
    )


def _array(tensor):
    """The memory of a contiguous tensor as an array, which does not keep the tensor alive."""
    buffer = (ctypes.c_float * tensor.size).from_address(tensor.data_ptr())
    return np.frombuffer(buffer, np.float32).reshape(tensor.shape)


def _multiply(a, b, out, scale=1.0, add=False):
    """``out = scale * a @ b``, or added to it: arrays of two axes, one of which is dense; that of ``out`` is the last."""
    letters, strides = [], []
    for x in (a, b):
        rows, columns = (stride // 4 for stride in x.strides)
        plain = columns == 1
        letters.append(b"N" if plain else b"T")
        strides.append(max(rows if plain else columns, x.shape[1] if plain else x.shape[0]))
    (rows, inner), columns = a.shape, b.shape[1]
    status = _library()[0].dnnl_sgemm(
        *letters, rows, columns, inner, scale, a.ctypes.data, strides[0], b.ctypes.data, strides[1],
        float(add), out.ctypes.data, max(out.strides[0] // 4, columns),
    )  # fmt: skip
    if status:
        raise RuntimeError(f"oneDNN's sgemm failed with status {status}")


def _in_threads(function):
    """Call ``function`` with as many threads for its products as kernels have."""
    openmp = _library()[1]
    before = openmp.omp_get_max_threads()
    openmp.omp_set_num_threads(num_threads())
    try:
        return function()
    finally:
        openmp.omp_set_num_threads(before)


@functools.cache
def _pool(threads):
    # One thread for the products of each worker: OpenMP keeps that number by thread.
    return ThreadPoolExecutor(threads, initializer=_library()[1].omp_set_num_threads, initargs=(1,))


# ---------------------------------------------------------------------- linear


def linear_for(x, weight, turned=False):
    """What computes ``x @ weight + bias``, :meth:`Products.linear`; None where Paddle's own is as good.

    Args:
        x: ``[..., in]``.
        weight: ``[in, out]``, or ``[out, in]`` if ``turned``.
    """
    if active is not None and x.dtype == weight.dtype == paddle.float32:
        return active.linear
    outputs = weight.shape[0 if turned else 1]
    return linear if suits(math.prod(x.shape) * outputs, x, weight) else None


def linear(x, weight, bias=None, turned=False):
    """As :meth:`Products.linear`, in float32."""
    return _FLOAT32.linear(x, weight, bias, turned)


def plain(x, weight, bias=None, turned=False):
    """:func:`linear` without gradients."""
    x, weight = x.contiguous(), weight.contiguous()
    out = paddle.empty([*x.shape[:-1], weight.shape[0 if turned else 1]], "float32")
    rows, result = _array(x).reshape(-1, x.shape[-1]), _array(out).reshape(-1, out.shape[-1])
    if bias is not None:
        result[:] = _array(bias)
    matrix = _array(weight).T if turned else _array(weight)
    _in_threads(lambda: _multiply(rows, matrix, result, add=bias is not None))
    return out


def outer(x, y):
    """``x^T @ y`` of ``x [M, in]`` and ``y [M, out]`` without gradients."""
    x, y = x.contiguous(), y.contiguous()
    out = paddle.empty([x.shape[1], y.shape[1]], "float32")
    _in_threads(lambda: _multiply(_array(x).T, _array(y), _array(out)))
    return out


class Products:
    """The products of a linear layer, forward and backward, in float32; without gradients but for :meth:`linear`."""

    def times(self, x, weight, bias=None, turned=False):
        """:meth:`linear` without gradients."""
        return plain(x, weight, bias, turned)

    def outer(self, x, y):
        """``x^T @ y`` of ``x [M, in]`` and ``y [M, out]``, one of them as :meth:`kept`."""
        return outer(x, y)

    def kept(self, x):
        """``x`` in the form that is kept for gradients."""
        return x

    def linear(self, x, weight, bias=None, turned=False):
        """``x @ weight + bias``: ``x [..., in]``, ``weight [in, out]``, or ``[out, in]`` if ``turned``, ``bias [out]`` or None,
        all float32 -> ``[..., out]``."""
        if paddle.is_grad_enabled() and not all(t is None or t.stop_gradient for t in (x, weight, bias)):
            return _Linear.apply(x, weight, bias, self, turned)
        return self.times(x, weight, bias, turned)


_FLOAT32 = Products()


class _Linear(paddle.autograd.PyLayer):
    @staticmethod
    def forward(ctx, x, weight, bias, products, turned):
        ctx.products, ctx.turned, ctx.has_bias = products, turned, bias is not None
        ctx.learns = [t is not None and not t.stop_gradient for t in (x, weight, bias)]
        ctx.save_for_backward(products.kept(x) if ctx.learns[1] else None, weight)
        return products.times(x, weight, bias, turned)

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensor()
        products, gradient = ctx.products, gradient.contiguous()
        rows = gradient.reshape([-1, gradient.shape[-1]])
        of_x = of_weight = of_bias = None
        if ctx.learns[0]:
            of_x = products.times(gradient, weight, turned=not ctx.turned)
        if ctx.learns[1]:
            x = x.reshape([-1, x.shape[-1]])
            of_weight = products.outer(rows, x) if ctx.turned else products.outer(x, rows)
        if ctx.learns[2]:
            of_bias = rows.sum(axis=0)
        return (of_x, of_weight, of_bias) if ctx.has_bias else (of_x, of_weight)


def square(x):
    """Sum of the squares of ``x``, a scalar float32 tensor without gradients, in threads and without other memory."""
    if not suits(x.size, x):
        return x.square().sum()
    x = x.contiguous()
    numbers = _array(x).reshape(-1)

    step = 16 * _SLICE

    def work(start):
        part = numbers[start : start + step]
        return float(np.dot(part, part))

    return paddle.to_tensor(math.fsum(_pool(num_threads()).map(work, range(0, x.size, step))), "float32")


def gelu(x):
    """GELU of ``x`` without gradients: slices that stay in the cache, shared among threads, where Paddle uses one."""
    flat = x.contiguous().reshape([-1])
    out = paddle.empty(x.shape, "float32")
    result = _array(out).reshape(-1)

    def work(start):
        part = F.gelu(flat[start : start + _SLICE])
        result[start : start + _SLICE] = _array(part)

    list(_pool(num_threads()).map(work, range(0, x.size, _SLICE)))
    return out


# ---------------------------------------------------------------------- attention


def attention(q, k, v, spans, causal):
    """Scaled dot-product attention within spans of rows.

    Args:
        q: ``[B, N, H, D]`` float32.
        k, v: ``[B, N, K, D]``, ``H`` a multiple of ``K``.
        spans: ``(row, start, stop)`` each: these positions of a row see each other and nothing else.
        causal: whether only earlier ones and themselves.

    Returns:
        ``[B, N, H, D]``, zero outside of all spans.
    """
    if paddle.is_grad_enabled() and not all(t.stop_gradient for t in (q, k, v)):
        return _Attention.apply(q, k, v, spans, causal)
    return _attend(q, k, v, spans, causal)[0]


def _attend(q, k, v, spans, causal):
    """The result, and the logarithms of the softmax's sums, array ``[B, H, N]``."""
    q, k, v = (x.contiguous() for x in (q, k, v))
    out = paddle.zeros(q.shape, "float32")
    sums = np.zeros([q.shape[0], q.shape[2], q.shape[1]], np.float32)
    arrays = [_array(x) for x in (q, k, v, out)]
    group = q.shape[2] // k.shape[2]

    def work(task):
        (row, start, stop), head = task
        q, k, v, out = (x[row, start:stop, h] for x, h in zip(arrays, (head, head // group, head // group, head)))
        own_sums = sums[row, head, start:stop]
        for rows, seen, scores in _blocks(q, k, causal):
            largest = scores.max(1, keepdims=True)
            np.exp(np.subtract(scores, largest, out=scores), out=scores)
            total = scores.sum(1, keepdims=True)
            _multiply(scores, v[:seen], out[rows])
            out[rows] /= total
            own_sums[rows] = (largest + np.log(total))[:, 0]

    _for_all_heads(work, spans, q.shape[2])
    return out, sums


class _Attention(paddle.autograd.PyLayer):
    @staticmethod
    def forward(ctx, q, k, v, spans, causal):
        out, ctx.sums = _attend(q, k, v, spans, causal)
        ctx.spans, ctx.causal = spans, causal
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    def backward(ctx, gradient):
        tensors = [x.contiguous() for x in (*ctx.saved_tensor(), gradient)]
        arrays = [_array(x) for x in tensors]
        q, k = tensors[:2]
        heads, group = q.shape[2], q.shape[2] // k.shape[2]
        of_q = paddle.zeros(q.shape, "float32")
        # Heads that share keys are computed at the same time, so each has its own sums.
        of_k, of_v = (np.zeros([q.shape[0], heads, q.shape[1], q.shape[3]], np.float32) for _ in "kv")
        all_q = _array(of_q)
        scale = q.shape[3] ** -0.5

        def work(task):
            (row, start, stop), head = task
            places = (head, head // group, head // group, head, head)
            q, k, v, out, outer = (x[row, start:stop, h] for x, h in zip(arrays, places))
            q_sum, k_sum, v_sum = all_q[row, start:stop, head], of_k[row, head, start:stop], of_v[row, head, start:stop]
            sums = ctx.sums[row, head, start:stop, None]
            means = (out * outer).sum(1, keepdims=True)
            room = np.empty(min(_BLOCK, len(q)) * len(q), np.float32)
            for rows, seen, scores in _blocks(q, k, ctx.causal):
                shares = np.exp(np.subtract(scores, sums[rows], out=scores), out=scores)
                _multiply(shares.T, outer[rows], v_sum[:seen], add=True)
                changes = room[: shares.size].reshape(shares.shape)
                _multiply(outer[rows], v[:seen].T, changes)
                changes -= means[rows]
                changes *= shares
                _multiply(changes, k[:seen], q_sum[rows], scale)
                _multiply(changes.T, q[rows], k_sum[:seen], scale, add=True)

        _for_all_heads(work, ctx.spans, heads)
        batch, length, kv_heads, width = k.shape
        merged = (x.reshape(batch, kv_heads, group, length, width).sum(2).swapaxes(1, 2) for x in (of_k, of_v))
        return (of_q, *(paddle.to_tensor(np.ascontiguousarray(x)) for x in merged))


def _blocks(q, k, causal):
    """For some of the queries ``q [n, D]`` at a time: (slice of them, number of keys they may see, scaled scores)."""
    room = np.empty(min(_BLOCK, len(q)) * len(q), np.float32)
    hidden = _hidden()
    for start in range(0, len(q), _BLOCK):
        rows = slice(start, min(start + _BLOCK, len(q)))
        count = rows.stop - start
        seen = rows.stop if causal else len(q)
        scores = room[: count * seen].reshape(count, seen)
        _multiply(q[rows], k[:seen].T, scores, q.shape[1] ** -0.5)
        if causal:
            scores[:, start:] += hidden[:count, :count]
        yield rows, seen, scores


@functools.cache
def _hidden():
    """What to add to the scores of a block's own keys."""
    return np.triu(np.full([_BLOCK, _BLOCK], -np.inf, np.float32), 1)


def _for_all_heads(work, spans, heads):
    tasks = [(span, head) for span in spans for head in range(heads)]
    list(_pool(num_threads()).map(work, tasks))
