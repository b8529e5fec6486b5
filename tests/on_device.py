"""What the reference checkpoints answer and learn on one device: `python -m tests.on_device npu:0` prints it as JSON."""

import json
import sys

import numpy as np
import paddle

from paddlemix import device
from tests.conftest import FAMILIES, load_reference, tiles


def tokens(reference):
    """Greedy tokens of each chat of the reference, by label."""
    pictures = {
        "text_only": [],
        "image": [tiles(0)],
        "second_round": [tiles(0)],
        "two_images": [tiles(0), tiles(1)],
        "video_like": [tiles(i, max_num=1) for i in range(4)],
    }
    found = {}
    for chat in reference.expected["chats"]:
        parts = pictures[chat["label"]]
        pixels = np.concatenate(parts) if parts else None
        options = {"max_new_tokens": len(chat["output_ids"])}
        new = reference.model.generate(pixels, np.array([chat["input_ids"]]), **options)
        found[chat["label"]] = new.numpy()[0].tolist()
    return found


def steps(setting, parameters, compute, count):
    """Losses of AdamW steps as a reference made them; ``compute()`` gives the loss of each."""
    optimiser = paddle.optimizer.AdamW(
        setting["lr"], *setting["betas"], setting["eps"], parameters=parameters, weight_decay=setting["weight_decay"]
    )
    found = []
    for _ in range(count):
        loss = compute()
        loss.backward()
        optimiser.step()
        optimiser.clear_grad()
        found.append(float(loss))
    return found


def losses(reference):
    """Four AdamW steps as the reference made them."""
    setting, model = reference.expected["adamw"], reference.model
    sample = reference.expected["train_samples"][reference.expected["adamw_sample"]]
    model.train()
    for parameter in model.vision_model.parameters():
        parameter.stop_gradient = True
    ids, labels = (np.array([sample[key]]) for key in ("input_ids", "labels"))
    flags = np.full(len(tiles(1)), int((ids == model.img_context_token_id).any()))
    learning = [p for p in model.parameters() if not p.stop_gradient]
    return steps(setting, learning, lambda: model(tiles(1), ids, image_flags=flags, labels=labels).loss, len(setting["losses"]))


def main(name):
    """Everything about every family on the device called ``name``."""
    device.set_device(name)
    found = {}
    for family in FAMILIES:
        reference = load_reference(family)
        places = sorted({str(p.place) for p in reference.model.parameters()})
        found[family] = {"places": places, "tokens": tokens(reference), "losses": losses(reference)}
    print("\n@" + json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
