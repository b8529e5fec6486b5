"""Answers and dropped tokens of Mini-Monkey's reference on one device, printed as JSON:
`python -m tests.models.minimonkey.on_device npu:0`."""

import json
import sys

from paddlemix import device
from paddlemix.models.internvl2 import load_tokenizer
from paddlemix.models.minimonkey import MiniMonkeyChatModel
from tests.models.minimonkey.test_minimonkey import CHECKPOINT, EXPECTED, QUESTION, encoded, picture


def main(name):
    """Every chat of the reference on the device called ``name``."""
    device.set_device(name)
    model, tokenizer = (
        MiniMonkeyChatModel.from_pretrained(CHECKPOINT, dtype="float32", engine="eager"),
        load_tokenizer(CHECKPOINT),
    )
    model.config.template = EXPECTED["template"]
    found = {"places": sorted({str(p.place) for p in model.parameters()}), "answers": [], "dropped": []}
    for chat in EXPECTED["chats"]:
        pixels, grid, _ = picture(chat)
        options = dict(max_new_tokens=len(chat["output_ids"]))
        found["answers"].append(model.chat(tokenizer, pixels, grid, QUESTION, options, use_scm=chat["scm"]))
        ids = encoded(model, tokenizer, len(pixels))
        found["dropped"].append(model.scm_dropped(pixels, grid, ids) if chat["scm"] else None)
    print("\n@" + json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
