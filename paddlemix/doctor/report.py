"""Say what runs on this machine, what does not, and what to install.

  paddlemix doctor                        processor, memory, disk, Paddle, kernels, devices, an answer, optional parts
  paddlemix doctor --device gpu           check a card operator by operator; npu for Ascend
  eval "$(paddlemix doctor --npu_env)"    the settings that Ascend needs, before Python starts

Each line is pass; slow, where it works and could be better; skip, where it is not here and not needed; or fail, and then the
exit code is 1. Nothing is fetched and nothing is sent.
"""

import argparse
import contextlib
import importlib
import importlib.util
import json
import os
import platform
import re
import resource
import shutil
import sys
import tempfile
import time
import warnings
from pathlib import Path

import paddlemix
from paddlemix.commands import Parser
from paddlemix.errors import command_main
from paddlemix.extras import extras, installed

PADDLE = "3.3.1"
PADDLE_INDEX = "https://www.paddlepaddle.org.cn/packages/stable"
# How each build of Paddle is installed; they exclude each other.
BUILDS = {
    "CPU": "pip install 'paddlemix[cpu]'",
    "NVIDIA GPU": f"pip install paddlepaddle-gpu=={PADDLE} -i {PADDLE_INDEX}/cu126/",
    "Ascend NPU": "pip install paddlepaddle==3.3.0 paddle-custom-npu==3.3.0 "
    f"--index-url {PADDLE_INDEX}/npu/ --extra-index-url {PADDLE_INDEX}/cpu/",
}
FEATURES = ("avx2", "fma", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_tile", "amx_bf16", "amx_int8")


def processor():
    """Name and those of :data:`FEATURES` that the kernels here know to use, with the number of usable cores."""
    name, flags = platform.processor() or platform.machine(), set()
    if os.path.exists("/proc/cpuinfo"):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            elif key.strip() == "flags":
                flags = set(value.split())
                break
    return name, [feature for feature in FEATURES if feature in flags], len(os.sched_getaffinity(0))


def memory():
    """``(all, free)`` memory in bytes that a process may use here: the machine's, a container's, or ``ulimit -v``'s."""
    page = os.sysconf("SC_PAGE_SIZE")
    total, free = page * os.sysconf("SC_PHYS_PAGES"), page * os.sysconf("SC_AVPHYS_PAGES")
    with contextlib.suppress(OSError, AttributeError, TypeError):  # what can be had again counts as free
        free = 1024 * int(re.search(r"^MemAvailable:\s*(\d+)", Path("/proc/meminfo").read_text(), re.MULTILINE)[1])
    bounds = [bound for bound in resource.getrlimit(resource.RLIMIT_AS) if bound != resource.RLIM_INFINITY]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            bounds.append(int((Path("/sys/fs/cgroup") / name).read_text()))
    total = min([total, *bounds])
    return total, min(total, free)


def folders():
    """``{what is kept there: folder}`` of the caches that commands write to."""
    home = Path(os.path.expanduser("~"))
    ours = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache") / "paddlemix"
    hub = Path(os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME") or home / ".cache" / "huggingface") / "hub")
    return {
        "downloaded models": Path(os.environ.get("PADDLEMIX_HOME") or hub).expanduser(),
        "compiled kernels": ours,
        "temporary files": Path(tempfile.gettempdir()),
    }


def _disk(folder, wanted):
    """(status, line) about a folder that may have to be made, in which ``wanted`` GB would be good to have."""
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(nearest).free / 1e9
    if not (nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)):
        return "slow", f"{folder} cannot be written: make it writable, or set another (docs/installation.md)"
    return ("pass" if free >= wanted else "slow"), f"{free:,.0f} GB free in {folder}"


def _paddle():
    """(status, line) about Paddle."""
    try:
        import paddle
    except ModuleNotFoundError as error:
        if error.name != "paddle":
            return "fail", f"cannot be imported: {error.name} is not installed"
        return "fail", "not installed: " + "; ".join(f"{build}: {line}" for build, line in BUILDS.items())
    except (ImportError, OSError) as error:  # a library of the system's that it wants
        return "fail", f"cannot be imported: {error}"
    same = paddle.__version__ == PADDLE
    return ("pass" if same else "slow"), paddle.__version__ + ("" if same else f": made and tested with {PADDLE}")


def _kernels():
    from paddlemix.kernels import cpu

    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler:
        yield "compiler", "pass", compiler
    else:
        yield "compiler", "slow", "none: install g++ for the CPU engine, which is several times as fast"
    for dtype in ("float32", "bfloat16"):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            works = cpu.available(dtype)
        reason = str(told[-1].message) if told else "plain Paddle is used"
        yield f"CPU engine, {dtype}", *(("pass", "works") if works else ("skip", reason))


def _devices():
    from paddlemix import device

    kinds = ["gpu", *device.plugins()]
    found = [f"{device.count(kind)} {kind}" for kind in kinds if device.count(kind)]
    if found:
        return "pass", f"{', '.join(found)}; paddlemix doctor --device {found[0].split()[1]} checks its operators"
    lines = [f"{build}: {line}" for build, line in BUILDS.items() if build != "CPU"]
    return "skip", "the CPU alone; with a card, in place of this Paddle: " + "; ".join(lines)


def _models(free):
    """Which published models fit into ``free`` bytes of memory, in the dtype that they are answered in here."""
    from paddlemix.kernels import cpu
    from paddlemix.models.blocks.flops import parameter_counts
    from paddlemix.training.published import PUBLISHED, published_config

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dtype, size = ("bfloat16", 2) if cpu.available("bfloat16") else ("float32", 4)
    needed = {name: size * sum(parameter_counts(published_config(name)).values()) for name in PUBLISHED}
    fitting = [name for name in PUBLISHED if 1.2 * needed[name] < free]  # a part more for activations and the KV cache
    if not fitting:
        return "slow", f"no published model fits into {free / 1e9:.1f} GB in {dtype}, the demo model does"
    return "pass", f"{', '.join(fitting)} fit into {free / 1e9:.1f} GB in {dtype}"


def _answer():
    """The demo model's answer to a question about a bundled picture: that the whole way works."""
    from paddlemix.examples.internvl2.chat_demo import DEMO_IMAGE, DEMO_TEXT, load_pictures
    from paddlemix.examples.internvl2.cli import DEMO_MODEL
    from paddlemix.models.internvl2 import InternVLChatModel, load_tokenizer

    started = time.perf_counter()
    model = InternVLChatModel.from_pretrained(str(DEMO_MODEL))
    marks, pixels, _ = load_pictures([str(DEMO_IMAGE)], model.config)
    answer = model.chat(load_tokenizer(str(DEMO_MODEL)), pixels, marks + DEMO_TEXT, {"max_new_tokens": 32})
    return "pass", f"'{DEMO_TEXT}' '{answer}' ({time.perf_counter() - started:.1f} s with loading the demo model)"


def lines():
    """Yield ``(name, status, detail)``: pass, slow (works, could be better), skip (not here, not needed) or fail."""
    version = platform.python_version()
    supported = (3, 10) <= sys.version_info[:2] <= (3, 12)
    yield "paddlemix", "pass", f"{paddlemix.__version__} in {Path(paddlemix.__file__).parent}"
    yield "Python", "pass" if supported else "slow", version + ("" if supported else ": made for 3.10 to 3.12")
    name, features, cores = processor()
    yield "processor", "pass" if "avx2" in features else "slow", f"{name}, {cores} cores, {' '.join(features) or 'no AVX2'}"
    total, free = memory()
    yield "memory", "pass" if free > 2e9 else "slow", f"{total / 1e9:.1f} GB, {free / 1e9:.1f} GB free"
    for purpose, folder in folders().items():
        yield purpose, *_disk(folder, 10 if purpose == "downloaded models" else 0.1)
    status, detail = _paddle()
    yield "PaddlePaddle", status, detail
    if status != "fail":
        yield from _kernels()
        yield "devices", *_devices()
        yield "models", *_models(free)
        try:
            yield "chat", *_answer()
        except Exception as error:  # whatever is broken belongs in the table
            yield "chat", "fail", f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    for extra, packages in sorted(extras().items()):
        absent = [package for package in packages if not installed(package)]
        detail = "installed" if not absent else f"without {', '.join(absent)}: pip install 'paddlemix[{extra}]'"
        yield f"extra {extra}", "skip" if absent else "pass", detail


@command_main
def main(argv=None):
    """The command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default=None, help="check this card: gpu, npu, or gpu:1")
    parser.add_argument("--dtypes", default=None, help="with --device: such as float32,bfloat16")
    parser.add_argument("--report", metavar="FILE.json", help="write the results there too, to send with a question")
    parser.add_argument("--npu_env", action="store_true", help="print the settings that Ascend needs, for a shell to read")
    args = parser.parse_args(argv)
    if args.npu_env:
        from paddlemix.doctor.npu import environment

        print(environment())
        return
    kind = (args.device or "").partition(":")[0]
    if kind and not _is_host(kind):
        from paddlemix.doctor import device_check

        versions = importlib.import_module(f"paddlemix.doctor.{kind}").versions if _is_known(kind) else lambda: ()
        given = [(name, getattr(args, name)) for name in ("device", "dtypes", "report")]
        device_check.main(kind, versions, [text for name, value in given if value for text in (f"--{name}", value)])
    results = []
    for name, status, detail in lines():
        print(f"{status:5}  {name:20}  {detail}", flush=True)
        results.append({"check": name, "status": status, "detail": detail})
    if args.report:
        Path(args.report).write_text(json.dumps({"results": results}, indent=1) + "\n", encoding="utf-8")
    if any(result["status"] == "fail" for result in results):
        raise SystemExit(1)
    print("\nTry: paddlemix chat")


def _is_known(kind):
    return importlib.util.find_spec(f"paddlemix.doctor.{kind}") is not None


def _is_host(kind):
    from paddlemix import device

    return device.is_cpu(kind)


if __name__ == "__main__":
    main()
