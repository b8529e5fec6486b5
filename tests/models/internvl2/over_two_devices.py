"""The reference's chats over two devices, as JSON: `python -m tests.models.internvl2.over_two_devices qwen2 npu`."""

import json
import sys

import numpy as np

from paddlemix import device
from paddlemix.models.internvl2 import InternVLChatModel, load_tokenizer
from paddlemix.processors.image import load_image
from tests.conftest import REFERENCE


def main(family, name):
    """Tokens of each chat of the checkpoint ``family``, every layer divided over two devices of the kind ``name``."""
    device.set_device(name)
    folder = REFERENCE / family
    expected = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    model = InternVLChatModel.from_pretrained(str(folder / "checkpoint"), dtype="float32", tensor_parallel=2)
    model.set_tokenizer(load_tokenizer(str(folder / "checkpoint")))
    size, tokens = model.config.image_size, []
    for chat in expected["chats"]:
        count = len(chat["num_patches_list"] or [])
        most = 1 if count > 2 else expected.get("max_num", 6)
        parts = [load_image(str(REFERENCE / "images" / f"img{i}.png"), input_size=size, max_num=most) for i in range(count)]
        pixels = np.concatenate(parts) if parts else None
        given = model.generate(pixels, np.array([chat["input_ids"]]), max_new_tokens=len(chat["output_ids"]))
        tokens.append(given.numpy()[0].tolist())
    places = sorted({str(p.place) for p in model.parameters()})
    model.close()
    print("\n@" + json.dumps({"places": places, "tokens": tokens}))


if __name__ == "__main__":
    main(*sys.argv[1:])
