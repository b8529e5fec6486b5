"""Fused inference kernels for x86 CPUs: linear, MLP, attention, norms and rotary positions.

Paddle's eager mode has no bfloat16 arithmetic on CPU, and neither fuses attention nor threads softmax. These functions
take and return ordinary float32 Paddle tensors and compute inside in the dtype the weights were packed in, so that a
model needs no dtype plumbing to run in bfloat16. Matrix products come from the oneDNN that Paddle ships, everything else from
``cpu.cc``, which is compiled by the machine's ``g++`` on first use and kept in the user's cache folder. Nothing here
records gradients.

Ask :func:`available` first; it is False without a compiler, on other processors, or if a kernel fails its self-check,
and then plain Paddle has to do. More than 500 lines, since how the library is built, found, opened and called changes together.
"""

import contextlib
import ctypes
import functools
import hashlib
import math
import os
import platform
import re
import shutil
import subprocess
import tempfile
import threading
import time
import warnings
import weakref
from pathlib import Path

import numpy as np
import paddle

from paddlemix.files import user_cache

__all__ = [
    "Norm", "PackedLinear", "Room", "attention", "available", "compiled", "mlp", "num_threads", "rotate_and_cache",
    "set_num_threads", "timed",
]  # fmt: skip

SOURCES = [Path(__file__).with_name(name) for name in ("cpu.cc", "quantised.cc", "decoder.cc")]
HEADERS = sorted(Path(__file__).parent.glob("*.h"))
FLAGS = "-std=c++17 -O3 -mprefer-vector-width=512 -fno-math-errno -fno-trapping-math -fopenmp -fPIC".split()
# PADDLEMIX_CPU=avx2 leaves out what newer processors have, to see what older ones would do.
AVX2_ONLY = os.environ.get("PADDLEMIX_CPU", "").lower() == "avx2"
if AVX2_ONLY:
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX2")  # read by oneDNN when it first computes
DTYPES = {"bfloat16": 2, "float32": 3}  # dnnl_data_type_t
ACTIVATIONS = {None: 0, "gelu_tanh": 43, "silu": 44, "gelu": 49}  # dnnl_alg_kind_t

_pointer, _int, _long, _float = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float
_SIGNATURES = {
    "linear_create": [_pointer, _int, *[_long] * 4, _pointer, _int, _long, ctypes.POINTER(_pointer), ctypes.c_char_p],
    "linear_fill_run": [_pointer, _pointer, _int, _long, _long],
    "linear_run": [_pointer, _pointer, _long, _pointer, _pointer, _float, _int, _pointer, _pointer],
    "linear_few_run": [_pointer, _pointer, _long, _pointer, _pointer, _float, _int, _pointer, _pointer],
    "mlp_run": [*[_pointer] * 4, _long, _pointer, _pointer, _float, _int, _pointer, _pointer],
    "norm_run": [_pointer, *[_long] * 3, _pointer, _pointer, _float, _pointer],
    "attention_run": [_pointer, _int, _int],
    "decoder_run": [_pointer, _long, _pointer, _pointer, _long, _pointer, _pointer],
    "quantised_linear_run": [_pointer, _pointer, _long, _pointer, _pointer, _float, _int, _pointer, _pointer],
    "quantised_mlp_run": [*[_pointer] * 4, _long, _pointer, _pointer, _float, _int, _pointer, _pointer],
    "quantise_run": [_pointer, _int, *[_long] * 4, *[_pointer] * 4],
    "rotate_run": [*[_pointer] * 3, *[_long] * 8, _int, _pointer, _pointer, _float, *[_pointer] * 3],
}
_threads = 0
_times = None  # of calls, by kernel, within timed()


def set_num_threads(count):
    """Number of threads of every kernel here; 0 for the default, ``OMP_NUM_THREADS`` if above 1, else all usable cores.

    Paddle sets ``OMP_NUM_THREADS`` to 1 where it is unset, so that a 1 says nothing about the user's wish. Processes that
    a launcher started on one machine share its cores.
    """
    global _threads
    count = count or int(os.environ.get("PADDLEMIX_THREADS") or 0)  # of --threads
    numbers = (re.match(r"\d*", os.environ.get(name, ""))[0] for name in ("OMP_NUM_THREADS", "PADDLE_LOCAL_SIZE"))
    wished, processes = (int(number or 1) or 1 for number in numbers)  # OpenMP takes "4,2" for levels: the first is ours
    _threads = count or (wished if wished > 1 else max(1, len(os.sched_getaffinity(0)) // processes))


def num_threads():
    """Number of threads of every kernel."""
    if not _threads:
        set_num_threads(0)
    return _threads


@contextlib.contextmanager
def timed():
    """Within the block, note the seconds of each call in the dictionary that this gives: ``{kernel: [seconds, ...]}``."""
    global _times
    _times = {}
    try:
        yield _times
    finally:
        _times = None


class Unavailable(Exception):
    """Why the kernels cannot be used here."""


class _NoLibrary(Unavailable):
    """Why there is no compiled library."""


@functools.cache
def _cpu_flags():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    flags = frozenset(next((line for line in lines if line.startswith("flags")), "").split())
    return frozenset(flag for flag in flags if not flag.startswith(("avx512", "amx", "avx_vnni"))) if AVX2_ONLY else flags


def _flags():
    return [*FLAGS, *(["-march=x86-64-v3"] if AVX2_ONLY else ["-march=native"])]


def _target():
    """The compiler, the libraries to link with, and the path of the compiled library: one for each source and machine."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    libraries = [Path(paddle.__file__).parent / "libs" / name for name in ("libdnnl.so.3", "libiomp5.so")]
    if platform.machine() != "x86_64" or not all(path.exists() for path in libraries):
        raise Unavailable("they need an x86-64 CPU and a Paddle wheel that ships libdnnl.so.3 and libiomp5.so")
    if compiler is None:
        raise Unavailable("there is no C++ compiler: install g++, or set CXX")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    sources = [path.read_text() for path in (*SOURCES, *HEADERS)]
    key = "\n".join([*sources, version, *sorted(_cpu_flags()), paddle.__version__, *_flags()])
    return compiler, libraries, user_cache() / f"cpu-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"


def identity():
    """What decides how weights are packed, beside their shape: library, processor and threads, as a text."""
    return f"{_target()[2].stem} {num_threads()}"


def compiled():
    """Whether the library is there already, so that :func:`available` takes a tenth of a second instead of some seconds."""
    try:
        return _intact(_target()[2])
    except (Unavailable, OSError, RuntimeError, subprocess.SubprocessError):  # RuntimeError: nobody knows the home folder
        return False


def _intact(path):
    """Whether the compiled library is there, and as it was written: half of one can crash whoever loads it."""
    try:
        content = path.read_bytes()
    except OSError:
        return False
    size = hashlib.sha256().digest_size
    return hashlib.sha256(content[:-size]).digest() == content[-size:]


def _build(compiler, libraries, target):
    """Compile the library. The file gets its digest as its last bytes, and its name when it is whole."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        modules, built = [Path(folder, source.stem + ".o") for source in SOURCES], Path(folder, "cpu.so")
        _run_all([compiler, *_flags(), "-c", source, "-o", module] for source, module in zip(SOURCES, modules))
        # Without -fopenmp: it would add libgomp, a second set of threads beside the libiomp5 that Paddle runs on.
        _run_all([[compiler, "-shared", *modules, "-o", built, *libraries]])
        content = built.read_bytes()
        built.write_bytes(content + hashlib.sha256(content).digest())
        built.replace(target)  # who builds at the same time has a folder of its own, and puts the same file there


def _run_all(commands):
    """Run commands of a compiler at once.

    Raises:
        Unavailable: one fails, with what it says first.
    """
    options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "errors": "replace"}
    running = [subprocess.Popen(command, **options) for command in commands]
    for process, said in [(process, process.communicate()[1]) for process in running]:
        if process.returncode:
            first = said.strip().splitlines() or [f"exit code {process.returncode}"]
            raise Unavailable(f"{process.args[0]} failed: {first[0]}")


@functools.cache
def _loaded():
    """The library, or else the reason why there is none: a second try would only take as long and say the same."""
    try:
        compiler, libraries, target = _target()
        fresh = not _intact(target)
        if fresh:
            _build(compiler, libraries, target)
        try:
            return _open(target)
        except (OSError, AttributeError):  # whole, but of no use here: of another system that shares the folder
            if fresh:
                raise
            _build(compiler, libraries, target)
            return _open(target)
    except OSError as error:
        if error.filename is None:
            return _NoLibrary(str(error))
        return _NoLibrary(f"{error.filename} cannot be used ({error.strerror}): make room, or set XDG_CACHE_HOME")
    except (Unavailable, AttributeError, RuntimeError, subprocess.SubprocessError) as error:
        return _NoLibrary(str(error))


def _open(path):
    library = ctypes.CDLL(str(path))
    for name, arguments in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = [_int, *arguments], ctypes.c_char_p
    library.linear_destroy.argtypes, library.linear_destroy.restype = [_pointer], None
    library.linear_few.argtypes, library.linear_few.restype = [_pointer], _int
    library.scratch_memory.argtypes, library.scratch_memory.restype = [], _long
    library.linear_memory.argtypes, library.linear_memory.restype = [_pointer, *[ctypes.POINTER(_pointer)], _pointer], None
    return library


def _library():
    loaded = _loaded()
    if isinstance(loaded, _NoLibrary):
        raise loaded
    return loaded


def _call(name, *arguments):
    start = time.perf_counter() if _times is not None else 0
    error = getattr(_library(), name)(num_threads(), *arguments)
    if _times is not None:
        _times.setdefault(name.removesuffix("_run"), []).append(time.perf_counter() - start)
    if error:
        raise RuntimeError(f"CPU kernel {name}: {error.decode()}")


@functools.cache
def available(dtype="bfloat16"):
    """Whether the kernels work here with products in ``dtype``; compiles and checks them the first time.

    bfloat16 needs a CPU with bfloat16 instructions (:func:`has_bfloat16`). Says why not in a warning.
    """
    from .self_check import self_check  # needs this module

    try:
        self_check(dtype)
    except _NoLibrary as error:
        _warn_once(f"CPU kernels are off, so answers are slower: {error}")
        return False
    except (Unavailable, OSError, RuntimeError) as error:
        warnings.warn(f"CPU kernels in {dtype} are off: {error}", RuntimeWarning, stacklevel=2)
        return False
    return True


@functools.cache
def _warn_once(message):
    warnings.warn(message, RuntimeWarning, stacklevel=3)


def scratch_memory():
    """Bytes that the kernels' threads keep for what is between their products."""
    return _library().scratch_memory()


def has_bfloat16():
    """Whether this CPU has bfloat16 instructions: AVX512-bf16 or AMX."""
    return bool({"avx512_bf16", "amx_bf16"} & _cpu_flags())


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
        _call("norm_run", x.data_ptr(), math.prod(x.shape[:-1]), width, width, *self.arguments, out.data_ptr())
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
        outputs: a slice of those that the layer has; None for all. Not with ``transposed``.
    """

    few = False  # whether up to 64 rows go the way of decoding, which reads weights once and computes each row alone

    def __init__(self, weight, bias=None, dtype="bfloat16", transposed=False, outputs=None):
        weight = weight.contiguous()
        source = {paddle.bfloat16: 2, paddle.float32: 3}[weight.dtype]
        rows, columns = weight.shape
        shape, strides, first = ((columns, rows), (1, columns), 0) if transposed else ((rows, columns), (columns, 1), 0)
        if outputs is not None:
            first, stop, step = outputs.indices(columns)
            shape, strides = (rows, len(range(first, stop, step))), (columns, step)
        self._create(weight.data_ptr() + first * weight.element_size(), source, shape, strides, bias, dtype)

    def fill(self, weight, transposed=False):
        """Put other weights of the same shape in the place of these; not of a :meth:`mapped` layer."""
        weight = weight.contiguous()
        shape = weight.shape[::-1] if transposed else weight.shape
        if shape != [self.in_features, self.out_features]:
            raise ValueError(
                f"weights {weight.shape} are not of a layer of {self.in_features} inputs and {self.out_features} outputs"
            )
        source = {paddle.bfloat16: 2, paddle.float32: 3}[weight.dtype]
        strides = (1, weight.shape[1]) if transposed else (weight.shape[1], 1)
        _call("linear_fill_run", self.handle, weight.data_ptr(), source, *strides)

    @classmethod
    def mapped(cls, packed, shape, bias=None, dtype="bfloat16"):
        """A layer whose weights are packed already: a copy of another's :attr:`packed`, which is used where it is.

        Args:
            packed: ``[bytes]`` uint8 array, at a multiple of 64 bytes, of a layer of this shape and dtype that the same library
                made for as many threads on a processor with the same instructions.
            shape: ``(in, out)``.
            bias, dtype: as above.

        Raises:
            ValueError: it cannot be of such a layer.
        """
        if packed.dtype != np.uint8 or packed.ctypes.data % 64 or not packed.size:
            raise ValueError("packed weights must be bytes at a multiple of 64")
        layer = cls.__new__(cls)
        try:
            layer._create(packed.ctypes.data, DTYPES[dtype], shape, (shape[1], 1), bias, dtype, packed.size)
        except RuntimeError as error:
            raise ValueError(str(error)) from None
        layer._mapped = packed  # keeps the memory
        return layer

    def _create(self, address, source, shape, strides, bias, dtype, packed=0):
        self.in_features, self.out_features, self.dtype = *shape, dtype
        self.handle, name = _pointer(), ctypes.create_string_buffer(64)
        bias = None if bias is None else _float32(bias, "bias")
        _call(
            "linear_create", address, source, *shape, *strides, _address(bias), DTYPES[dtype], packed,
            ctypes.byref(self.handle), name,
        )  # fmt: skip
        self.implementation = name.value.decode()
        weakref.finalize(self, _library().linear_destroy, self.handle)

    @property
    def alone(self):
        """Whether each row of a step of decoding, and of :attr:`few`, is computed alone, whatever their number."""
        return bool(_library().linear_few(self.handle))

    @property
    def packed(self):
        """The weights as the kernels have them, ``[bytes]`` uint8; valid as long as the layer is."""
        address, size = _pointer(), _long()
        _library().linear_memory(self.handle, ctypes.byref(address), ctypes.byref(size))
        return np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(ctypes.c_uint8)), [size.value])

    def __call__(self, x, norm=None, activation=None, residual=None, out=None):
        """Apply to ``x [..., in]`` float32.

        Args:
            norm: :class:`Norm` to apply to ``x`` first.
            activation: ``gelu``, ``gelu_tanh``, ``silu`` or None.
            residual: ``[..., out]`` float32 to add last.
            out: where the result goes, of which x and residual are no part; None for new memory.

        Returns:
            ``[..., out]`` float32.
        """
        x, residual, rows, out = _prepare(x, self.in_features, self.out_features, residual, out)
        name = "linear_few_run" if self.few else "linear_run"
        _call(
            name, self.handle, x.data_ptr(), rows, *(norm.arguments if norm else _NO_NORM),
            ACTIVATIONS[activation], _address(residual), out.data_ptr(),
        )  # fmt: skip
        return out


class Room:
    """Memory for results that are needed only until the next of their name, as those within a block: mapping new pages for them
    took a twentieth of a vision tower's time."""

    def __init__(self):
        self._of_thread = threading.local()

    def __call__(self, name, shape):
        """A float32 tensor with anything in it; the last of that name in this thread if that has the shape."""
        found = getattr(self._of_thread, name, None)
        if found is None or found.shape != shape:
            found = paddle.empty(shape, "float32")
            setattr(self._of_thread, name, found)
        return found


def _result(shape, out):
    if out is None:
        return paddle.empty(shape, "float32")
    if _float32(out, "out").shape != shape or not out.is_contiguous():
        raise ValueError(f"out has shape {out.shape}, the result {shape}")
    return out


def _prepare(x, width, out_width, residual, out=None):
    """Checked ``x`` and ``residual``, the number of rows, and room for the result."""
    x = _float32(x, "x")
    *leading, got = x.shape
    if got != width:
        raise ValueError(f"x has width {got}, the weights take {width}")
    out = _result([*leading, out_width], out)
    if residual is not None:
        residual = _float32(residual, "residual")
        if residual.shape != out.shape:
            raise ValueError(f"residual has shape {residual.shape}, the result {out.shape}")
    return x, residual, math.prod(leading), out  # not x.size, which is a hundred times as slow


def mlp(x, up, down, gate=None, norm=None, activation="gelu", residual=None, out=None):
    """``residual + down(activation(up(norm(x))))``, or with a gate ``down(activation(gate(norm(x))) * up(norm(x)))``.

    The hidden rows stay in cache and in the dtype of the weights.

    Args:
        x: ``[..., in]`` float32.
        up, gate, down: :class:`PackedLinear` of one dtype, or :class:`~.quantised.QuantisedLinear`, ``in -> hidden``,
            ``in -> hidden``, ``hidden -> out``.
        norm: :class:`Norm` to apply to ``x`` first.
        activation: ``gelu``, ``gelu_tanh``, ``silu`` or None.
        residual: ``[..., out]`` float32 to add last.
        out: where the result goes, of which x and residual are no part; None for new memory.

    Returns:
        ``[..., out]`` float32.
    """
    if not isinstance(down, PackedLinear):
        from .quantised import mlp as quantised_mlp  # needs this module

        return quantised_mlp(x, up, down, gate, norm, activation, residual, out)
    x, residual, rows, out = _prepare(x, up.in_features, down.out_features, residual, out)
    expected = (up.in_features, down.in_features, down.dtype)
    if any((part.in_features, part.out_features, part.dtype) != expected for part in (up, gate or up)):
        raise ValueError("up, gate and down do not fit each other in shape or dtype")
    _call(
        "mlp_run", gate.handle if gate else None, up.handle, down.handle, x.data_ptr(), rows,
        *(norm.arguments if norm else _NO_NORM), ACTIVATIONS[activation], _address(residual), out.data_ptr(),
    )  # fmt: skip
    return out


class _Attention(ctypes.Structure):
    _fields_ = [
        *((name, _long) for name in ("batch", "queries", "heads", "keys", "kv_heads", "width", "length")),
        *((name, _long * 3) for name in ("q_stride", "k_stride", "v_stride")),
        *((name, _pointer) for name in ("q", "k", "v", "out", "starts", "sinks")),
        ("window", _long),
        ("causal", _long),
        ("rounded", _long),
        ("scale", _float),
    ]


def attention(
    q, k, v, *, causal, length=None, starts=None, scale=None, dtype="bfloat16", window=None, sinks=None, rounded=False, out=None
):
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
        window: how many keys, that of its own position included, a query sees, if ``causal``; None for all.
        sinks: ``[H]`` float32, one more logit in each head's softmax that no value belongs to; None for none.
        rounded: whether queries and keys, float32, may be rounded to 8 bits, each token's of a head by the largest of them:
            where that is faster, with many queries, bfloat16, and VNNI of 512 bits.
        out: where the result goes; None for new memory.

    Returns:
        ``[B, N, H * D]`` float32.
    """
    batch, queries, heads, width = q.shape
    _, keys, kv_heads, _ = k.shape
    length = keys if length is None else length
    if q.dtype != paddle.float32 or k.dtype != v.dtype or k.dtype not in (paddle.float32, getattr(paddle, dtype)):
        raise TypeError(f"q must be float32, k and v float32 or {dtype}; not {q.dtype}, {k.dtype} and {v.dtype}")
    if k.shape != [batch, keys, kv_heads, width] or v.shape != k.shape or heads % kv_heads:
        raise ValueError(f"q {q.shape}, k {k.shape} and v {v.shape} do not fit each other")
    if not queries <= length <= keys:
        raise ValueError(f"length {length} must be between the number of queries, {queries}, and of keys, {keys}")
    if sinks is not None and _float32(sinks, "sinks").shape != [heads]:
        raise ValueError(f"sinks {sinks.shape} must be one for each of {heads} heads")
    if window is not None and (window < 1 or not causal):
        raise ValueError(f"a window of {window} must be positive, and attention causal")
    q, k, v = (x if x.strides[-1] == 1 else x.contiguous() for x in (q, k, v))
    out = _result([batch, queries, heads * width], out)
    if starts is not None:
        starts = np.ascontiguousarray(starts, dtype=np.int64)
        if starts.shape != (batch,) or starts.min() < 0:
            raise ValueError(f"starts must be one position for each of {batch} rows")
    shapes = _Attention(
        batch, queries, heads, keys, kv_heads, width, length,
        tuple(q.strides[:3]), tuple(k.strides[:3]), tuple(v.strides[:3]),
        q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), None if starts is None else starts.ctypes.data,
        _address(sinks), window or 0, causal, rounded, width**-0.5 if scale is None else scale,
    )  # fmt: skip
    _call("attention_run", ctypes.byref(shapes), DTYPES["bfloat16" if k.dtype == paddle.bfloat16 else "float32"], DTYPES[dtype])
    return out


def rotate_and_cache(qkv, cos, sin, heads, k_cache, v_cache, offset, norms=None):
    """Apply rotary positions (arXiv 2104.09864, halves swapped) and put keys and values where they belong.

    Args:
        qkv: ``[B, N, (H + 2 K) * D]`` float32: queries, keys, values.
        cos, sin: ``[B or 1, N, ..., D]`` float32; the first half of ``sin`` is negated.
        heads: ``H``.
        k_cache, v_cache: contiguous ``[B, capacity, K, D]``, float32 or bfloat16; positions from ``offset`` on are written.
        offset: first position to write.
        norms: for queries and keys, two root-mean-square :class:`Norm` of width ``D`` that each head goes through first.

    Returns:
        Rotated queries ``[B, N, H, D]`` float32.
    """
    qkv, cos, sin = _float32(qkv, "qkv"), _float32(cos, "cos"), _float32(sin, "sin")
    batch, tokens = qkv.shape[:2]
    capacity, kv_heads, width = k_cache.shape[-3:]
    if k_cache.dtype != v_cache.dtype or k_cache.dtype not in (paddle.float32, paddle.bfloat16):
        raise TypeError(f"the caches must both be float32 or both bfloat16, not {k_cache.dtype} and {v_cache.dtype}")
    if qkv.shape[-1] != (heads + 2 * kv_heads) * width or v_cache.shape != k_cache.shape:
        raise ValueError(f"qkv {qkv.shape} does not fit caches {k_cache.shape} and {v_cache.shape} with {heads} query heads")
    if {math.prod(cos.shape), math.prod(sin.shape)} != {cos.shape[0] * tokens * width} or cos.shape[0] not in (1, batch):
        raise ValueError(f"cos {cos.shape} and sin {sin.shape} must be [1 or {batch}, {tokens}, ..., {width}]")
    if not 0 <= offset <= capacity - tokens:
        raise ValueError(f"the cache holds {capacity} positions; {offset + tokens} were asked for")
    q = paddle.empty([batch, tokens, heads, width], "float32")
    (q_norm, _, eps), (k_norm, _, _) = (norm.arguments for norm in norms) if norms else (_NO_NORM, _NO_NORM)
    _call(
        "rotate_run", qkv.data_ptr(), cos.data_ptr(), sin.data_ptr(), cos.shape[0], batch, tokens, heads, kv_heads, width,
        offset, capacity, DTYPES["bfloat16" if k_cache.dtype == paddle.bfloat16 else "float32"], q_norm, k_norm, eps,
        q.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(),
    )  # fmt: skip
    return q
