"""The reference's chats over two devices, as JSON: `python -m tests.models.internvl2.over_two_devices qwen2 npu`."""

import json
import sys

import numpy as np

from paddlemix import device
from paddlemix.models.internvl2 import ChatSession, InternVLChatModel, load_tokenizer
from paddlemix.processors.image import load_image
from tests.conftest import REFERENCE


def tiles(counts, size, most):
    """Tiles of the first pictures of the reference, one for each of ``counts``."""
    return [load_image(str(REFERENCE / "images" / f"img{i}.png"), input_size=size, max_num=most) for i in range(len(counts))]


def main(family, name):
    """What the checkpoint ``family`` answers with every layer divided over two devices of the kind ``name``: tokens of each
    chat (pictures, rounds, a clip, text), the pieces of the same as a stream, and a batch."""
    device.set_device(name)
    folder = REFERENCE / family
    expected = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    model = InternVLChatModel.from_pretrained(str(folder / "checkpoint"), dtype="float32", tensor_parallel=2)
    tokenizer = load_tokenizer(str(folder / "checkpoint"))
    model.set_tokenizer(tokenizer)
    size, tokens, streams = model.config.image_size, [], []
    for chat in expected["chats"]:
        counts = chat["num_patches_list"] or []
        parts = tiles(counts, size, 1 if len(counts) > 2 else expected.get("max_num", 6))
        pixels = np.concatenate(parts) if parts else None
        most = {"max_new_tokens": len(chat["output_ids"])}
        tokens.append(model.generate(pixels, np.array([chat["input_ids"]]), **most).numpy()[0].tolist())
        session = ChatSession(model, tokenizer, history=chat["history"])
        streams.append(list(session.stream(chat["question"], pixels, most, counts)))
    batch = expected["batch_chat"]
    parts = tiles(batch["num_patches_list"], size, 6)
    most = {"max_new_tokens": len(batch["output_ids"][0]) if "output_ids" in batch else 16}
    answers = model.batch_chat(tokenizer, np.concatenate(parts), batch["questions"], most, [len(part) for part in parts])
    places = sorted({str(p.place) for p in model.parameters()})
    model.close()
    print("\n@" + json.dumps({"places": places, "tokens": tokens, "streams": streams, "batch": answers}))


if __name__ == "__main__":
    main(*sys.argv[1:])
