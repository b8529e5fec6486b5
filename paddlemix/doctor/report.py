"""Say what runs on this machine, what does not, and what to install.

  paddlemix doctor                 processor, memory, disk, Paddle, kernels, devices, optional parts
  paddlemix doctor --device gpu    check a card operator by operator; npu for Ascend
  eval "$(paddlemix doctor --npu_env)"    the settings that Ascend needs, before Python starts

Exit code 1 where a chat would not run.
"""

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

from paddlemix.commands import Parser
from paddlemix.errors import command_main

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


def extras():
    """``{extra: names of the packages that it wants}`` as the installed package declares them."""
    found = {}
    for line in importlib.metadata.requires("paddlemix") or []:
        if "extra ==" in line:
            extra = line.rpartition("extra ==")[2].strip(" '\")")
            found.setdefault(extra, []).append(re.match(r"[\w.-]+", line)[0])
    return found


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


def _paddle():
    """(status, line) about Paddle, without importing it where it is missing."""
    if importlib.util.find_spec("paddle") is None:
        return "fail", "not installed: " + "; ".join(f"{build}: {line}" for build, line in BUILDS.items())
    import paddle

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


def lines():
    """Yield ``(name, status, detail)``: pass, slow (works, could be better), skip (not here, not needed) or fail."""
    import paddlemix

    version = platform.python_version()
    supported = (3, 10) <= sys.version_info[:2] <= (3, 12)
    yield "paddlemix", "pass", f"{paddlemix.__version__} in {Path(paddlemix.__file__).parent}"
    yield "Python", "pass" if supported else "slow", version + ("" if supported else ": made for 3.10 to 3.12")
    name, features, cores = processor()
    yield "processor", "pass" if "avx2" in features else "slow", f"{name}, {cores} cores, {' '.join(features) or 'no AVX2'}"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") / 1e9
    yield "memory", "pass" if memory > 4 else "slow", f"{memory:.1f} GB, {free:.1f} GB free; a model of 1B takes 3 to 6 GB"
    cache = Path(os.environ.get("PADDLEMIX_HOME") or Path.home() / ".cache" / "paddlemix")
    nearest = next(path for path in (cache, *cache.parents) if path.exists())
    writable = os.access(nearest, os.W_OK)
    space = shutil.disk_usage(nearest).free / 1e9
    detail = f"{space:.0f} GB free for {cache}" + ("" if writable else ": it cannot be written, set PADDLEMIX_HOME")
    yield "disk", "pass" if writable and space > 10 else "slow", detail
    temporary = tempfile.gettempdir()
    yield "temporary files", "pass", f"{shutil.disk_usage(temporary).free / 1e9:.0f} GB free in {temporary}"
    status, detail = _paddle()
    yield "PaddlePaddle", status, detail
    if status != "fail":
        yield from _kernels()
        yield "devices", *_devices()
    for extra, packages in sorted(extras().items()):
        absent = [package for package in packages if not _installed(package)]
        detail = "installed" if not absent else f"without {', '.join(absent)}: pip install 'paddlemix[{extra}]'"
        yield f"extra {extra}", "skip" if absent else "pass", detail


def _installed(package):
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


@command_main
def main(argv=None):
    """The command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default=None, help="check this card: gpu, npu, or gpu:1")
    parser.add_argument("--dtypes", default=None, help="with --device: such as float32,bfloat16")
    parser.add_argument("--report", metavar="FILE.json", help="with --device: write the results there too")
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
    failed = []
    for name, status, detail in lines():
        print(f"{status:5}  {name:20}  {detail}", flush=True)
        failed += [name] * (status == "fail")
    if failed:
        raise SystemExit(1)
    print("\nTry: paddlemix chat")


def _is_known(kind):
    return importlib.util.find_spec(f"paddlemix.doctor.{kind}") is not None


def _is_host(kind):
    from paddlemix import device

    return device.is_cpu(kind)


if __name__ == "__main__":
    main()
