"""Check an NVIDIA GPU: versions, every operator, fused kernels, chat, training, two cards.

``python tools/gpu/check.py --report gpu.json``
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from device_check import main


def versions():
    """Lines of the table about Paddle and the card."""
    import paddle

    yield "paddle", "pass", f"{paddle.__version__} for CUDA {paddle.version.cuda()}, cuDNN {paddle.version.cudnn()}"
    major, minor = paddle.device.cuda.get_device_capability()
    advice = "" if major >= 8 else ": no bfloat16 and no flash attention, float16 is used"
    yield "card", "pass", f"{paddle.device.cuda.get_device_name()}, compute capability {major}.{minor}{advice}"


if __name__ == "__main__":
    main("gpu", versions)
