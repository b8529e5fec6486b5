"""Features, captions, losses and a step of training of the reference checkpoint on one device, printed as JSON:
`python -m tests.models.internvl.on_device npu:0`."""

import json
import sys

import numpy as np
import paddle

from paddlemix import device
from paddlemix.training.arguments import PreTrainingArguments
from paddlemix.training.optimizer import Optimizer
from tests.models.internvl.helpers import fresh, load, loss_inputs, retrieval_inputs


def main(name):
    """Everything about the model on the device called ``name``."""
    device.set_device(name)
    model, expected, pixels = load().model, load().expected, load().arrays["pixels_retrieval"]
    found = {"places": sorted({str(p.place) for p in model.parameters()}), "captions": [], "losses": []}
    with paddle.no_grad():
        for mode in ("c", "g"):
            found[f"image_{mode}"] = model.encode_image(pixels, f"InternVL-{mode.upper()}").numpy().tolist()
            scores = model(pixels, np.array(expected["text_ids"]), f"InternVL-{mode.upper()}")
            found[f"logits_{mode}"] = scores[0].numpy().tolist()
    prompt = np.tile(expected["caption_prompt_ids"], [4, 1])
    for caption in expected["captions"]:
        options = {key: value for key, value in caption.items() if key not in ("ids", "text")}
        found["captions"].append(model.generate(pixels, prompt, **options).numpy().tolist())
    for loss in (
        lambda model: model.loss(**loss_inputs()).loss,
        lambda model: model.retrieval_loss(**retrieval_inputs(expected["retrieval_loss"]["shared"]["image_ids"])).loss,
    ):
        model = fresh()
        optimizer = Optimizer(dict(model.named_parameters()), PreTrainingArguments(output_dir="unused"))
        for _ in range(2):
            value = loss(model)
            value.backward()
            optimizer.accumulate()
            optimizer.step(1e-3)
            found["losses"].append(float(value))
    print("\n@" + json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
