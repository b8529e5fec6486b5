"""The only file that tells devices apart.

Everything else asks here: where to run (:func:`set_device`), in which dtype (:func:`resolve_dtype`), which fused kernel
there may be (:func:`fused_kernel`), and about memory and time. The rules and the traps behind them are in ``docs/npu.md``.
"""

import contextlib
import logging
import os
import resource

import paddle

from paddlemix.errors import DeviceError

DTYPES = ("float32", "bfloat16", "float16")
_HALF = (paddle.bfloat16, paddle.float16)

# The kind that the published training settings are for.
PUBLISHED = "gpu"

# What the Ascend plug-in reads from the environment when Paddle is imported; tools/npu/env.sh says why.
_NPU_FLAGS = ("FLAGS_npu_storage_format", "FLAGS_npu_jit_compile", "FLAGS_npu_scale_aclnn", "FLAGS_npu_split_aclnn")

# Fused kernels by kind of device, then by function: Paddle's own for GPU, custom operators of the Ascend plug-in. The
# functions that use them, and check that the plug-in has them, are in kernels/fused.py.
_FUSED = {
    "gpu": {
        "attention": "flash_attention",
        "norm": "rms_norm",
        "add_norm": "fused_rms_norm",
        "rope": "fused_rotary_position_embedding",
        "linear": "fused_linear",
        "int8": "weight_only_linear",
        "int4": "weight_only_linear",
    },
    "npu": {
        "attention": "flash_attention_npu",
        "norm": "rms_norm_npu",
        "rope": "fused_rope",
        "linear": "fused_linear",
        "int8": "weight_only_linear_npu",
    },
}
# Compute capabilities that Paddle's products with weights in few bits were written for.
_WEIGHT_ONLY = (70, 75, 80, 86, 89, 90, 100)

# Where users say which devices a program may see.
_VISIBLE = {"gpu": "CUDA_VISIBLE_DEVICES", "npu": "NPU_VISIBLE_DEVICES"}

_log = logging.getLogger(__name__)


def plugins():
    """Kinds of the plug-in devices that Paddle found, such as ``["npu"]``."""
    return paddle.device.get_all_custom_device_type() or []


def count(kind):
    """How many devices of a kind are visible; CPU counts as one."""
    if kind == "cpu":
        return 1
    if kind == "gpu":
        return paddle.device.cuda.device_count() if paddle.device.is_compiled_with_cuda() else 0
    return sum(name.split(":")[0] == kind for name in paddle.device.get_available_custom_device() or [])


def launch_numbers(kind, wanted):
    """The first ``wanted`` devices of a kind by the numbers that Paddle's launcher knows them by, as text.

    Where a variable such as ``CUDA_VISIBLE_DEVICES`` hides some, those are the numbers in it.

    Raises:
        DeviceError: there are fewer.
    """
    visible = os.environ.get(_VISIBLE.get(kind, ""), "")
    numbers = [number.strip() for number in visible.split(",")] if visible else [str(i) for i in range(count(kind))]
    if len(numbers) < wanted:
        raise DeviceError(f"{wanted} devices of kind {kind} were asked for, but {len(numbers)} are visible: ask for fewer")
    return numbers[:wanted]


def set_device(name="auto"):
    """Select the device of all further work and return its kind: ``"cpu"``, ``"gpu"``, ``"npu"`` or a plug-in's name.

    Args:
        name: ``auto`` (the first that exists of a Paddle plug-in device, a GPU, the CPU), ``cpu``, ``gpu``, ``npu`` or
            the name of any other Paddle custom device, each with an optional index such as ``gpu:1``.

    Raises:
        DeviceError: the device does not exist, this build of Paddle does not support it, or Paddle was started without the
            settings that it needs.
    """
    custom = plugins()
    if name == "auto":
        name = custom[0] if custom else "gpu" if count("gpu") else "cpu"
    kind, _, index = name.partition(":")
    if kind == "gpu":
        if not paddle.device.is_compiled_with_cuda():
            raise DeviceError(
                f"device '{name}' needs the GPU build of Paddle, but {paddle.__version__} here is a CPU build: "
                "run `make install DEVICE=gpu`, or use --device cpu"
            )
        if count(kind) == 0:
            raise DeviceError(f"device '{name}' was asked for, but no GPU is visible: check nvidia-smi, or use --device cpu")
    elif kind != "cpu" and kind not in custom:
        found = f"found only {', '.join(custom)}" if custom else "found none"
        raise DeviceError(
            f"device '{name}' needs a Paddle plug-in of that name, but Paddle {found}: "
            "see docs/npu.md for Ascend, or use --device cpu"
        )
    if index and not (index.isdigit() and int(index) < count(kind)):
        raise DeviceError(f"device '{name}' does not exist: {count(kind)} of kind {kind} are visible, numbered from 0")
    if kind in custom:
        # Read from Paddle rather than from the environment, where a value that came too late would look right.
        if paddle.get_flags("FLAGS_use_stride_kernel")["FLAGS_use_stride_kernel"]:
            raise DeviceError(
                f"device '{name}' needs FLAGS_use_stride_kernel=0 in the environment before Paddle starts: "
                "run `source tools/npu/env.sh` first"
            )
        unset = [flag for flag in _NPU_FLAGS if flag not in os.environ]
        if kind == "npu" and unset:
            _log.warning("%s not set: run `source tools/npu/env.sh` before Python for the settings of Ascend", ", ".join(unset))
    paddle.set_device(name)
    return kind


def current():
    """Kind of the device in use: ``"cpu"``, ``"gpu"``, ``"npu"`` or a plug-in's name."""
    return paddle.device.get_device().split(":")[0]


def is_cpu(kind=None):
    """Whether the device in use, or a kind of device, is the CPU."""
    return (kind or current()) == "cpu"


def supports_bfloat16():
    """Whether matrix products in bfloat16 run on the device in use.

    Paddle's own answer is not used: it is True on CPU, where eager mode has no bfloat16 arithmetic, and False or an error
    on plug-in devices that do have it.
    """
    kind = current()
    if kind == "gpu":
        return paddle.device.cuda.get_device_capability()[0] >= 8
    return kind != "cpu"


def resolve_dtype(dtype="auto"):
    """Dtype to hold weights and to compute in on the device in use.

    ``auto``: bfloat16 where the device has it, float16 on older GPUs (V100), float32 on CPU.

    Raises:
        DeviceError: the device cannot compute in the dtype asked for.
    """
    if dtype == "auto":
        if supports_bfloat16():
            return "bfloat16"
        return "float32" if is_cpu() else "float16"
    if dtype not in DTYPES:
        raise DeviceError(f"dtype '{dtype}' is not known: use auto, {', '.join(DTYPES)}")
    if is_cpu() and dtype != "float32":
        raise DeviceError(f"Paddle's eager mode has no {dtype} arithmetic on CPU: use --dtype float32 or --engine inference")
    if dtype == "bfloat16" and not supports_bfloat16():
        raise DeviceError("this GPU has no bfloat16 (compute capability below 8.0): use --dtype float16 or float32")
    return dtype


def fused_kernel(function, dtype):
    """Name of the fused kernel that the device in use may have for a function of ``kernels/fused.py``; None for none.

    Attention kernels exist for half precision only, and on GPU from compute capability 8.0 (A100) on; those for weights in few
    bits, ``int8`` and ``int4``, for half precision and the cards that Paddle lists; a sum with its norm and a product with its
    bias are worth the trouble in half precision alone.
    """
    kind = current()
    name = _FUSED.get(kind, {}).get(function)
    if function in ("add_norm", "linear", "int8", "int4") and dtype not in _HALF:
        return None
    if name == "weight_only_linear" and architecture() not in _WEIGHT_ONLY:
        return None
    if function == "attention" and name:
        if dtype not in _HALF:
            return None
        if kind == "gpu" and not supports_bfloat16():
            return None
    return name


def architecture():
    """Compute capability of the GPU in use, 80 for 8.0; None on other devices."""
    if current() != "gpu":
        return None
    major, minor = paddle.device.cuda.get_device_capability()
    return 10 * major + minor


def never_holds_scores(kind, dtype):
    """Whether attention in ``dtype`` on a kind of device, which need not be here, can be counted on not to keep its scores.

    On GPU in bfloat16 alone: float16 is for cards that have no such kernel (V100), and whether the Ascend plug-in has its own
    shows only there.
    """
    return kind == "gpu" and dtype == "bfloat16"


def brought(tensor):
    """``tensor`` on the device in use: Paddle leaves the gradient of an embedding on CPU, where it had to be computed there."""
    return tensor.to(paddle.get_device()) if tensor.place.is_cpu_place() and not is_cpu() else tensor


def collectives():
    """What Paddle calls the library through which processes on the device in use talk to each other."""
    return {"cpu": "gloo", "gpu": "nccl"}.get(current(), "xccl")


def of_rank(rank):
    """Name of the device of number ``rank`` of the kind in use, counted from the one in use; all ranks share the CPU."""
    kind, _, index = paddle.device.get_device().partition(":")
    return kind if is_cpu(kind) else f"{kind}:{int(index or 0) + rank}"


@contextlib.contextmanager
def on_host():
    """Within the block new tensors are in the host's memory, and what has only such is computed there."""
    before = paddle.device.get_device()
    paddle.set_device("cpu")
    try:
        yield
    finally:
        paddle.set_device(before)


def synchronize():
    """Wait until all work queued on the device is done."""
    if not is_cpu():
        paddle.device.synchronize()


def peak_memory():
    """Largest amount of memory used so far, in bytes: of the device, or of the process where that is the CPU."""
    if is_cpu():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return paddle.device.max_memory_allocated()


def total_memory():
    """Memory of the device in use, in bytes: the machine's for CPU; None where the plug-in does not tell, as on Ascend."""
    if is_cpu():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return paddle.device.cuda.get_device_properties().total_memory if current() == "gpu" else None
