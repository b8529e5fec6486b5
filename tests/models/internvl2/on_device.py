"""What InternVL3 and 3.5 answer and learn on a device: `python -m tests.models.internvl2.on_device npu:0` prints JSON."""

import json
import sys

import numpy as np

from paddlemix import device
from tests.models.internvl2.test_internvl3 import load, pictures
from tests.on_device import steps

CHATS = ("qwen3", "qwen3_moe", "gpt_oss", "internlm3", "flash")
STEPS = 2


def answers(reference):
    """Responses of the first chats, by label."""
    found = {}
    for chat in reference.expected["chats"][:3]:
        history = chat["history"] and [tuple(turn) for turn in chat["history"]]
        asked = pictures(reference, chat), chat["question"], {"max_new_tokens": len(chat["output_ids"])}, history
        counts = chat["num_patches_list"]
        _, history = reference.model.chat(reference.tokenizer, *asked, return_history=True, num_patches_list=counts)
        found[chat["label"]] = history[-1][1].strip()
    return found


def losses(reference):
    """The first AdamW steps of the reference, which train the language model alone."""
    train, model = reference.expected["train"], reference.model
    setting = train["adamw"]
    batch = {key: np.array(train[key]) for key in ("input_ids", "attention_mask", "labels")}
    model.config.llm_config.output_router_logits = setting["with_balance_loss"]
    model.train()
    return steps(setting, model.language_model.parameters(), lambda: model(**batch).loss, STEPS)


def main(name):
    """Everything about every family on the device called ``name``."""
    device.set_device(name)
    found = {}
    for family in CHATS:
        reference = load(family)
        found[family] = {"places": sorted({str(p.place) for p in reference.model.parameters()}), "answers": answers(reference)}
        if "adamw" in reference.expected.get("train", {}):
            found[family]["losses"] = losses(reference)
    print("\n@" + json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
