"""The reference's three steps of MPO on one device, as JSON: `python -m tests.training.on_device npu:0`."""

import json
import sys

from paddlemix import device
from tests.training import test_preference as reference


def main(name):
    """Loss and metrics of each step on the device called ``name``."""
    device.set_device(name)
    model, _ = reference.policy()
    print("\n@" + json.dumps({"places": sorted({str(p.place) for p in model.parameters()}), "steps": reference.steps()}))


if __name__ == "__main__":
    main(sys.argv[1])
