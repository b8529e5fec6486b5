"""The reference checkpoint of InternVL-C and -G, and what the original computes with it."""

import functools
import json
from types import SimpleNamespace

import numpy as np

from tests.conftest import REFERENCE

FOLDER = REFERENCE / "internvl_14b"
CHECKPOINT, LORA = FOLDER / "checkpoint", FOLDER / "lora"
EVERY = slice(None)
PICTURES = [str(REFERENCE / "images" / f"img{i}.png") for i in range(4)]


@functools.cache
def load():
    """Model, tokenizer and expected values; shared, so tests must not change the model."""
    from paddlemix.models.internvl import InternVLModel, load_tokenizer

    expected = json.loads((FOLDER / "expected.json").read_text(encoding="utf-8"))
    return SimpleNamespace(
        model=InternVLModel.from_pretrained(CHECKPOINT, dtype="float32"),
        tokenizer=load_tokenizer(CHECKPOINT),
        expected=expected,
        arrays=dict(np.load(FOLDER / "expected.npz")),
    )


def fresh(train=True):
    """A model that a test may change."""
    from paddlemix.models.internvl import InternVLModel

    model = InternVLModel.from_pretrained(CHECKPOINT, dtype="float32")
    if train:
        model.train()
    return model


def loss_inputs(rows=EVERY):
    """Arguments of ``loss`` for some rows of the reference's batch."""
    expected = load().expected
    inputs = {"pixel_values": load().arrays["pixels_retrieval"][rows], "labels": np.array(expected["loss_labels"])[rows]}
    for kind in ("positive_", "negative_", "summarize_", ""):
        for what, name in (("ids", "input_ids"), ("mask", "attention_mask")):
            inputs[kind + name] = np.array(expected[f"loss_{kind or 'input_'}{what}"])[rows]
    return inputs


def retrieval_inputs(image_ids, rows=EVERY):
    """Arguments of ``retrieval_loss`` for some rows of the reference's batch."""
    inputs = loss_inputs(rows)
    for name in ("labels", "input_ids", "attention_mask"):
        del inputs[name]
    return {**inputs, "image_ids": np.array(image_ids)[rows]}


def gradients(model, loss):
    """``{name: gradient}`` of ``loss``; they are cleared."""
    loss.backward()
    found = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    for p in model.parameters():
        p.clear_gradient(False)
    return found
