"""Check an NVIDIA GPU: versions, every operator, fused kernels, chat, training, two cards.

``python tools/gpu/check.py --report gpu.json``; the same as ``paddlemix doctor --device gpu``.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from paddlemix.doctor.device_check import main
from paddlemix.doctor.gpu import versions

if __name__ == "__main__":
    main("gpu", versions)
