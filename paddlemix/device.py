"""The only file that tells devices apart.

Everything else asks here: where to run (:func:`set_device`), in which dtype (:func:`resolve_dtype`), with which fused
kernels (:func:`attention_kernel`), and how much memory was used (:func:`peak_memory`). The rules and the traps behind
them are listed in ``docs/npu.md``.
"""

import os
import resource

import paddle

from paddlemix.errors import DeviceError

DTYPES = ("float32", "bfloat16", "float16")


def set_device(name="auto"):
    """Select the device of all further work and return its kind: ``"cpu"``, ``"gpu"``, ``"npu"`` or a plugin's name.

    Args:
        name: ``auto`` (the first that exists of a Paddle plug-in device, a GPU, the CPU), ``cpu``, ``gpu``, ``npu`` or
            the name of any other Paddle custom device, each with an optional index such as ``gpu:1``.

    Raises:
        DeviceError: the device does not exist, or this build of Paddle does not support it.
    """
    custom = paddle.device.get_all_custom_device_type() or []
    if name == "auto":
        if custom:
            name = custom[0]
        elif paddle.device.is_compiled_with_cuda() and paddle.device.cuda.device_count() > 0:
            name = "gpu"
        else:
            name = "cpu"
    asked = name.split(":")[0]
    if asked == "gpu":
        if not paddle.device.is_compiled_with_cuda():
            raise DeviceError(
                f"device '{name}' needs the GPU build of Paddle, but {paddle.__version__} here is a CPU build: "
                "run `make install DEVICE=gpu`, or use --device cpu"
            )
        if paddle.device.cuda.device_count() == 0:
            raise DeviceError(f"device '{name}' was asked for, but no GPU is visible: check nvidia-smi, or use --device cpu")
    elif asked != "cpu" and asked not in custom:
        found = f"found only {', '.join(custom)}" if custom else "found none"
        raise DeviceError(
            f"device '{name}' needs a Paddle plug-in of that name, but Paddle {found}: "
            "see docs/npu.md for Ascend, or use --device cpu"
        )
    if asked in custom and os.environ.get("FLAGS_use_stride_kernel", "1").lower() not in ("0", "false"):
        raise DeviceError(
            f"device '{name}' needs FLAGS_use_stride_kernel=0 in the environment before Paddle starts: "
            "run `source tools/npu/env.sh` first"
        )
    paddle.set_device(name)
    return asked


def current():
    """Kind of the device in use: ``"cpu"``, ``"gpu"``, ``"npu"`` or a plug-in's name."""
    return paddle.device.get_device().split(":")[0]


def supports_bfloat16():
    """Whether matrix products in bfloat16 run on the device in use.

    Paddle's own answer is not used: it is True on CPU, where eager mode has no bfloat16 arithmetic, and False or an error
    on plug-in devices that do have it.
    """
    kind = current()
    if kind == "cpu":
        return False
    if kind == "gpu":
        return paddle.device.cuda.get_device_capability()[0] >= 8
    return True


def resolve_dtype(dtype="auto"):
    """Dtype to hold weights and to compute in on the device in use.

    ``auto``: bfloat16 where the device has it, float16 on older GPUs (V100), float32 on CPU.

    Raises:
        DeviceError: the device cannot compute in the dtype asked for.
    """
    if dtype == "auto":
        if supports_bfloat16():
            return "bfloat16"
        return "float16" if current() == "gpu" else "float32"
    if dtype not in DTYPES:
        raise DeviceError(f"dtype '{dtype}' is not known: use auto, {', '.join(DTYPES)}")
    if current() == "cpu" and dtype != "float32":
        raise DeviceError(f"Paddle's eager mode has no {dtype} arithmetic on CPU: use --dtype float32 or --engine inference")
    if dtype == "bfloat16" and not supports_bfloat16():
        raise DeviceError("this GPU has no bfloat16 (compute capability below 8.0): use --dtype float16 or float32")
    return dtype


def attention_kernel(dtype, masked):
    """Name of the attention kernel for tensors of ``dtype``: ``"flash"`` (GPU), ``"npu"`` or ``"plain"``.

    Args:
        dtype: dtype of queries, keys and values.
        masked: whether an explicit mask is needed, rather than full or causal attention.

    Flash kernels exist for half precision only; plug-in devices reject ``is_causal`` and every fused kernel of Paddle's own.
    """
    kind = current()
    half = dtype in (paddle.bfloat16, paddle.float16)
    if kind == "gpu" and half and not masked and paddle.device.cuda.get_device_capability()[0] >= 8:
        return "flash"
    return "plain"


def synchronize():
    """Wait until all work queued on the device is done."""
    if current() != "cpu":
        paddle.device.synchronize()


def peak_memory():
    """Largest amount of memory used so far, in bytes: of the device, or of the process where that is the CPU."""
    if current() == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return paddle.device.max_memory_allocated()
