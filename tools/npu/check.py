"""Check an Ascend NPU: versions, every operator, fused kernels, chat, training, two cards.

``source tools/npu/env.sh``, then ``python tools/npu/check.py --report npu.json``. In an installed package it is
``paddlemix doctor --device npu``.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from paddlemix.doctor.device_check import main
from paddlemix.doctor.npu import versions

if __name__ == "__main__":
    main("npu", versions)
