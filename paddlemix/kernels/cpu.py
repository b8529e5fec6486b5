"""Fused inference kernels for x86 CPUs: linear, MLP, attention, norms and rotary positions.

Paddle's eager mode has no bfloat16 arithmetic on CPU, and neither fuses attention nor threads softmax. These functions
take and return ordinary float32 Paddle tensors and compute inside in the dtype the weights were packed in, so that a
model needs no dtype plumbing to run in bfloat16. Matrix products come from the oneDNN that Paddle ships, everything else from
``cpu.cc``, which is compiled by the machine's ``g++`` on first use and kept in the user's cache folder. Nothing here
records gradients.

Ask :func:`available` first; it is False without a compiler, on other processors, or if a kernel fails its self-check,
and then plain Paddle has to do.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

import numpy as np
import paddle

__all__ = ["Norm", "PackedLinear", "attention", "available", "mlp", "rotate_and_cache", "set_num_threads"]

SOURCE = Path(__file__).with_name("cpu.cc")
FLAGS = "-std=c++17 -O3 -march=native -mprefer-vector-width=512 -fno-math-errno -fno-trapping-math -fopenmp -fPIC".split()
DTYPES = {"bfloat16": 2, "float32": 3}  # dnnl_data_type_t
ACTIVATIONS = {None: 0, "gelu_tanh": 43, "silu": 44, "gelu": 49}  # dnnl_alg_kind_t

_pointer, _int, _long, _float = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float
_SIGNATURES = {
    "linear_create": [_pointer, _int, *[_long] * 4, _pointer, _int, ctypes.POINTER(_pointer), ctypes.c_char_p],
    "linear_run": [_pointer, _pointer, _long, _pointer, _pointer, _float, _int, _pointer, _pointer],
    "mlp_run": [*[_pointer] * 4, _long, _pointer, _pointer, _float, _int, _pointer, _pointer],
    "norm_run": [_pointer, *[_long] * 3, _pointer, _pointer, _float, _pointer],
    "attention_run": [_pointer, _int, _int],
    "rotate_run": [*[_pointer] * 3, *[_long] * 8, _int, *[_pointer] * 3],
}
_threads = 0


def set_num_threads(count):
    """Number of threads of every kernel here; 0 for the default, ``OMP_NUM_THREADS`` if above 1, else all usable cores.

    Paddle sets ``OMP_NUM_THREADS`` to 1 where it is unset, so that a 1 says nothing about the user's wish.
    """
    global _threads
    _threads = count or (lambda n: n if n > 1 else len(os.sched_getaffinity(0)))(int(os.environ.get("OMP_NUM_THREADS", 1)))


class _Unavailable(Exception):
    """Why the kernels cannot be used here."""


def _build():
    """Path of the compiled library, from the cache where this source was compiled for this machine before."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    libraries = [Path(paddle.__file__).parent / "libs" / name for name in ("libdnnl.so.3", "libiomp5.so")]
    if platform.machine() != "x86_64" or not all(path.exists() for path in libraries):
        raise _Unavailable("they need an x86-64 CPU and a Paddle wheel that ships libdnnl.so.3 and libiomp5.so")
    if compiler is None:
        raise _Unavailable("there is no C++ compiler: install g++, or set CXX")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    cpu = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    key = "\n".join([SOURCE.read_text(), version, cpu, paddle.__version__, *FLAGS])
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "paddlemix"
    target = cache / f"cpu-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            module, built = Path(folder, "cpu.o"), Path(folder, "cpu.so")
            for command in (
                [compiler, *FLAGS, "-c", SOURCE, "-o", module],
                # Without -fopenmp: it would add libgomp, a second set of threads beside the libiomp5 that Paddle runs on.
                [compiler, "-shared", module, "-o", built, *libraries],
            ):
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    raise _Unavailable(f"{compiler} failed: {done.stderr.strip().splitlines()[0]}")
            built.replace(target)
    return target


@functools.cache
def _library():
    library = ctypes.CDLL(str(_build()))
    for name, arguments in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = [_int, *arguments], ctypes.c_char_p
    library.linear_destroy.argtypes, library.linear_destroy.restype = [_pointer], None
    if not _threads:
        set_num_threads(0)
    return library


def _call(name, *arguments):
    error = getattr(_library(), name)(_threads, *arguments)
    if error:
        raise RuntimeError(f"CPU kernel {name}: {error.decode()}")


@functools.cache
def available(dtype="bfloat16"):
    """Whether the kernels work here with products in ``dtype``; compiles and checks them the first time.

    bfloat16 needs a CPU with bfloat16 instructions (AVX512-bf16 or AMX). Says why not in a warning.
    """
    try:
        _self_check(dtype)
    except (_Unavailable, OSError, subprocess.SubprocessError, RuntimeError) as error:
        warnings.warn(f"CPU kernels in {dtype} are off: {error}", RuntimeWarning, stacklevel=2)
        return False
    return True


def _address(tensor):
    return None if tensor is None else tensor.data_ptr()


def _float32(tensor, name):
    """``tensor`` laid out row by row, for access by address."""
    if tensor.dtype != paddle.float32:
        raise TypeError(f"{name} must be float32, not {tensor.dtype}")
    return tensor if tensor.is_contiguous() else tensor.contiguous()


class Norm:
    """Layer norm over the last axis, or root-mean-square norm if ``bias`` is None.

    Call it, or hand it to :class:`PackedLinear` or :func:`mlp`, which then normalise their input on the fly.

    Args:
        weight, bias: ``[width]`` float32.
        eps: added to the variance or mean square.
    """

    def __init__(self, weight, bias, eps):
        self.weight, self.bias = _float32(weight, "weight"), None if bias is None else _float32(bias, "bias")
        self.arguments = (_address(self.weight), _address(self.bias), eps)

    def __call__(self, x):
        """``x [..., width]`` float32 -> the same shape."""
        x = _float32(x, "x")
        out = paddle.empty(x.shape, "float32")
        width = x.shape[-1]
        _call("norm_run", x.data_ptr(), x.size // width, width, width, *self.arguments, out.data_ptr())
        return out


_NO_NORM = (None, None, 0.0)


class PackedLinear:
    """``residual + activation(norm(x) @ weight + bias)`` with weights held in oneDNN's own layout.

    The weights are copied; the tensors given can be freed. A factor for each output channel, such as layer scale,
    belongs into ``weight`` and ``bias``.

    Args:
        weight: ``[in, out]``, or ``[out, in]`` with ``transposed``; float32 or bfloat16.
        bias: ``[out]`` float32, or None.
        dtype: dtype of weights and products, ``bfloat16`` or ``float32``; sums are float32 in both.
    """

    def __init__(self, weight, bias=None, dtype="bfloat16", transposed=False):
        weight = weight.contiguous()
        source = {paddle.bfloat16: 2, paddle.float32: 3}[weight.dtype]
        rows, columns = weight.shape
        shape, strides = ((columns, rows), (1, columns)) if transposed else ((rows, columns), (columns, 1))
        self.in_features, self.out_features = shape
        self.handle, name = _pointer(), ctypes.create_string_buffer(64)
        bias = None if bias is None else _float32(bias, "bias")
        _call(
            "linear_create", weight.data_ptr(), source, *shape, *strides, _address(bias), DTYPES[dtype],
            ctypes.byref(self.handle), name,
        )  # fmt: skip
        self.implementation = name.value.decode()

    def __del__(self):
        if getattr(self, "handle", None):
            _library().linear_destroy(self.handle)

    def __call__(self, x, norm=None, activation=None, residual=None):
        """Apply to ``x [..., in]`` float32.

        Args:
            norm: :class:`Norm` to apply to ``x`` first.
            activation: ``gelu``, ``gelu_tanh``, ``silu`` or None.
            residual: ``[..., out]`` float32 to add last.

        Returns:
            ``[..., out]`` float32.
        """
        x = _float32(x, "x")
        residual = None if residual is None else _float32(residual, "residual")
        *leading, width = x.shape
        _check_width(width, self.in_features)
        out = paddle.empty([*leading, self.out_features], "float32")
        _call(
            "linear_run", self.handle, x.data_ptr(), x.size // width, *(norm.arguments if norm else _NO_NORM),
            ACTIVATIONS[activation], _address(residual), out.data_ptr(),
        )  # fmt: skip
        return out


def _check_width(width, expected):
    if width != expected:
        raise ValueError(f"x has width {width}, the weights take {expected}")


def mlp(x, up, down, gate=None, norm=None, activation="gelu", residual=None):
    """``residual + down(activation(up(norm(x))))``, or with a gate ``down(activation(gate(norm(x))) * up(norm(x)))``.

    The hidden rows stay in cache and in the dtype of the weights.

    Args:
        x: ``[..., in]`` float32.
        up, gate, down: :class:`PackedLinear` of one dtype, ``in -> hidden``, ``in -> hidden``, ``hidden -> out``.
        norm: :class:`Norm` to apply to ``x`` first.
        activation: ``gelu``, ``gelu_tanh``, ``silu`` or None.
        residual: ``[..., out]`` float32 to add last.

    Returns:
        ``[..., out]`` float32.
    """
    x = _float32(x, "x")
    residual = None if residual is None else _float32(residual, "residual")
    *leading, width = x.shape
    _check_width(width, up.in_features)
    out = paddle.empty([*leading, down.out_features], "float32")
    _call(
        "mlp_run", gate.handle if gate else None, up.handle, down.handle, x.data_ptr(), x.size // width,
        *(norm.arguments if norm else _NO_NORM), ACTIVATIONS[activation], _address(residual), out.data_ptr(),
    )  # fmt: skip
    return out


class _Attention(ctypes.Structure):
    _fields_ = [
        *((name, _long) for name in ("batch", "queries", "heads", "keys", "kv_heads", "width", "length")),
        *((name, _long * 3) for name in ("q_stride", "k_stride", "v_stride")),
        *((name, _pointer) for name in ("q", "k", "v", "out", "starts")),
        ("causal", _long),
        ("scale", _float),
    ]


def attention(q, k, v, *, causal, length=None, starts=None, scale=None, dtype="bfloat16"):
    """Scaled dot-product attention with grouped queries; scores never leave the cache (arXiv 2205.14135).

    Args:
        q: ``[B, N, H, D]`` float32; any strides with the last axis dense, such as a slice of a fused product.
        k, v: ``[B, S, K, D]``, ``H`` a multiple of ``K``; float32, or bfloat16 if ``dtype`` is. Positions from ``length``
            on are ignored but must hold finite numbers.
        causal: whether a query sees only keys up to its own position; queries are the last ``N`` of ``length`` positions.
        length: positions in use, at most and by default ``S``.
        starts: first visible key of each row, ``[B]`` int64 array, for left-padded batches. Queries before it give zeros.
        scale: factor on the scores, ``D ** -0.5`` by default.
        dtype: dtype of the products' operands; scores, softmax and sums are float32.

    Returns:
        ``[B, N, H * D]`` float32.
    """
    batch, queries, heads, width = q.shape
    keys, kv_heads = k.shape[1:3]
    q, k, v = (x if x.strides[-1] == 1 else x.contiguous() for x in (q, k, v))
    out = paddle.empty([batch, queries, heads * width], "float32")
    starts = None if starts is None else np.ascontiguousarray(starts, dtype=np.int64)
    shapes = _Attention(
        batch, queries, heads, keys, kv_heads, width, keys if length is None else length,
        tuple(q.strides[:3]), tuple(k.strides[:3]), tuple(v.strides[:3]),
        q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), None if starts is None else starts.ctypes.data,
        causal, width**-0.5 if scale is None else scale,
    )  # fmt: skip
    _call("attention_run", ctypes.byref(shapes), DTYPES["bfloat16" if k.dtype == paddle.bfloat16 else "float32"], DTYPES[dtype])
    return out


def rotate_and_cache(qkv, cos, sin, heads, k_cache, v_cache, offset):
    """Apply rotary positions (arXiv 2104.09864, halves swapped) and put keys and values where they belong.

    Args:
        qkv: ``[B, N, (H + 2 K) * D]`` float32: queries, keys, values.
        cos, sin: ``[B or 1, N, ..., D]`` float32; the first half of ``sin`` is negated.
        heads: ``H``.
        k_cache, v_cache: contiguous ``[B, capacity, K, D]``, float32 or bfloat16; positions from ``offset`` on are written.
        offset: first position to write.

    Returns:
        Rotated queries ``[B, N, H, D]`` float32.
    """
    qkv, cos, sin = _float32(qkv, "qkv"), _float32(cos, "cos"), _float32(sin, "sin")
    batch, tokens = qkv.shape[:2]
    capacity, kv_heads, width = k_cache.shape[-3:]
    if offset + tokens > capacity:
        raise ValueError(f"the cache holds {capacity} positions; {offset + tokens} were asked for")
    q = paddle.empty([batch, tokens, heads, width], "float32")
    _call(
        "rotate_run", qkv.data_ptr(), cos.data_ptr(), sin.data_ptr(), cos.shape[0], batch, tokens, heads, kv_heads, width,
        offset, capacity, DTYPES["bfloat16" if k_cache.dtype == paddle.bfloat16 else "float32"],
        q.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(),
    )  # fmt: skip
    return q


def _self_check(dtype):
    """Compare each kernel with NumPy on a small case.

    Raises:
        _Unavailable: the processor has no instructions for ``dtype``, or a result is wrong.
    """
    flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")).split()
    needed = {"bfloat16": {"avx512_bf16", "amx_bf16"}, "float32": {"avx2", "avx512f"}}[dtype]
    if not needed & set(flags):
        raise _Unavailable(f"the processor has none of {', '.join(sorted(needed))}")
    tolerance = {"bfloat16": 3e-2, "float32": 1e-5}[dtype]
    random = np.random.default_rng(0)

    def make(*shape):
        return random.standard_normal(shape, dtype=np.float32)

    def check(name, result, expected):
        error = np.abs(result.numpy() - expected).max() / np.abs(expected).max()
        if not error < tolerance:
            raise _Unavailable(f"{name} is wrong by {error:.1e} on this processor")

    x, residual, scale = make(3, 5, 64), make(3, 5, 64), make(64)
    weights = {"up": make(64, 96), "gate": make(64, 96), "down": make(96, 64)}
    packed = {name: PackedLinear(paddle.to_tensor(weight), None, dtype) for name, weight in weights.items()}
    norm = Norm(paddle.to_tensor(scale), None, 1e-6)
    normed = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale
    check("norm", norm(paddle.to_tensor(x)), normed)
    check("linear", packed["up"](paddle.to_tensor(x), norm=norm), normed @ weights["up"])
    gate = normed @ weights["gate"]
    expected = residual + (gate / (1 + np.exp(-gate)) * (normed @ weights["up"])) @ weights["down"]
    tensors = paddle.to_tensor(x), packed["up"], packed["down"], packed["gate"]
    check("mlp", mlp(*tensors, norm=norm, activation="silu", residual=paddle.to_tensor(residual)), expected)

    q, k, v, starts = make(2, 3, 4, 64), make(2, 7, 2, 64), make(2, 7, 2, 64), np.array([0, 2])
    q_heads, k_heads, v_heads = (x.transpose(0, 2, 1, 3) for x in (q, k.repeat(2, 2), v.repeat(2, 2)))  # [B, H, S, D]
    place = np.arange(7)
    seen = (place <= place[-3:, None]) & (place >= starts[:, None, None])  # [B, N, S]
    odds = np.exp(np.where(seen[:, None], q_heads @ k_heads.transpose(0, 1, 3, 2) / 8, -np.inf))
    expected = (odds / odds.sum(-1, keepdims=True) @ v_heads).transpose(0, 2, 1, 3).reshape(2, 3, 256)
    out = attention(*map(paddle.to_tensor, (q, k, v)), causal=True, starts=starts, dtype=dtype)
    check("attention", out, expected)

    angle = make(1, 3, 1, 32)
    cos, sin = (np.concatenate(halves, -1) for halves in ([np.cos(angle)] * 2, [-np.sin(angle), np.sin(angle)]))
    stores = paddle.zeros([2, 4, 2, 64]), paddle.zeros([2, 4, 2, 64])
    fused = np.concatenate([q, k[:, :3], v[:, :3]], 2).reshape(2, 3, -1)
    rotated = rotate_and_cache(*map(paddle.to_tensor, (fused, cos, sin)), 4, *stores, 1)
    for name, result, rows in (("rotation", rotated, q), ("cached rotation", stores[0][:, 1:], k[:, :3])):
        check(name, result, rows * cos + np.concatenate([rows[..., 32:], rows[..., :32]], -1) * sin)
    check("caching", stores[1][:, 1:], v[:, :3])
