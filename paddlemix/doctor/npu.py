"""What there is to say of an Ascend NPU before its operators are checked, and the settings that it needs."""

import os
import re
from importlib import metadata
from pathlib import Path

from paddlemix.doctor.device_check import stand_in

TOOLKIT = Path(os.environ.get("ASCEND_TOOLKIT_HOME", "/usr/local/Ascend/ascend-toolkit/latest"))
TOOLKIT_FILES = (TOOLKIT / "version.cfg", *TOOLKIT.glob("*/ascend_toolkit_install.info"))
DRIVER = Path("/usr/local/Ascend/driver/version.info")
# What tools/npu/README.md describes.
CANN, PLUGIN = "8.0.0", "3.3.0"
# What Paddle and its plug-in read from the environment when they are imported; tools/npu/env.sh says why for each.
SETTINGS = {
    "FLAGS_use_stride_kernel": "0",
    "FLAGS_npu_storage_format": "0",
    "FLAGS_npu_jit_compile": "0",
    "FLAGS_npu_scale_aclnn": "True",
    "FLAGS_npu_split_aclnn": "True",
    "FLAGS_allocator_strategy": "auto_growth",
    "CUSTOM_DEVICE_BLACK_LIST": "set_value,set_value_with_tensor",
    "ASCEND_MAX_OP_CACHE_SIZE": "5000",
    "HCCL_CONNECT_TIMEOUT": "7200",
    "HCCL_WHITELIST_DISABLE": "1",
    "HCCL_SECURITY_MODE": "1",
    "HCCL_BUFFSIZE": "120",
}


def environment():
    """Lines for a shell that set what is unset, for ``eval "$(paddlemix doctor --npu_env)"``."""
    return "\n".join(f'export {name}="${{{name}-{value}}}"' for name, value in SETTINGS.items())


def _in_file(path):
    """The version number that a file of Ascend's names first; None without the file."""
    if not path.exists():
        return None
    found = re.search(r"(?i)version\D*([\w.]+)", path.read_text(errors="replace"))
    return found.group(1) if found else None


def versions():
    """Lines of the table about Paddle, its plug-in, CANN, the driver and the environment."""
    import paddle

    try:
        plugin = metadata.version("paddle-custom-npu")
    except metadata.PackageNotFoundError:
        plugin = None
    if plugin is None and stand_in():
        yield "versions", "skip", f"paddle {paddle.__version__} with the stand-in"
    else:
        same = plugin == paddle.__version__
        advice = "" if same else ": install both in one version, make install DEVICE=npu"
        yield "paddle and plug-in", "pass" if same else "fail", f"paddle {paddle.__version__}, plug-in {plugin}{advice}"
        cann = next(filter(None, map(_in_file, TOOLKIT_FILES)), None)
        status, advice = "pass", ""
        if cann is None:
            status, advice = "fail", f": not found below {TOOLKIT}, source its set_env.sh"
        elif not cann.startswith(CANN):
            # 3.3.0 does not load on 8.5.1 (PaddleCustomDevice issue 2452); others were not tried by anybody we know of.
            status, advice = "slow", f": the plug-in {PLUGIN} is built for {CANN}"
        yield "CANN", status, f"{cann}{advice}"
        yield "driver", "pass", f"{_in_file(DRIVER) or 'unknown'} ({DRIVER}); CANN {CANN} wants 23.0.3 or later"
    unset = [name for name in SETTINGS if name not in os.environ]
    detail = f"not set: {', '.join(unset)}; source tools/npu/env.sh" if unset else "as tools/npu/env.sh sets it"
    yield "environment", "slow" if unset else "pass", detail
