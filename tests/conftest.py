"""Reference checkpoints and what the original computes on them (tests/data/reference/README.md)."""

import functools
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

DATA = Path(__file__).parent / "data"
REFERENCE = DATA / "reference"
FAMILIES = ("qwen2", "internlm2", "llama_vit6b", "phi3")


@functools.cache
def load_reference(family):
    """Everything about one reference checkpoint; the model is loaded once and shared: tests must not change it."""
    from paddlemix.models.internvl2 import InternVLChatModel, load_tokenizer

    folder = REFERENCE / family
    checkpoint = folder / "checkpoint"
    model = InternVLChatModel.from_pretrained(str(checkpoint), dtype="float32")
    tokenizer = load_tokenizer(str(checkpoint))
    model.set_tokenizer(tokenizer)
    expected = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    arrays = dict(np.load(folder / "expected.npz"))
    return SimpleNamespace(name=family, path=checkpoint, model=model, tokenizer=tokenizer, expected=expected, arrays=arrays)


@pytest.fixture(params=FAMILIES)
def reference(request):
    """Each of the four reference checkpoints in turn."""
    return load_reference(request.param)


@functools.cache
def tiles(number, max_num=6):
    """Tiles of reference picture ``number`` at the checkpoints' 112 pixels, as the reference was made."""
    from paddlemix.processors.image import load_image

    return load_image(str(REFERENCE / "images" / f"img{number}.png"), input_size=112, max_num=max_num)


@pytest.fixture(scope="session")
def chat_pixels():
    """Pixel values for the chats of the reference by label: (pixel_values, tiles of each picture)."""

    def pixels(label):
        if label == "text_only":
            return None, []
        parts = {
            "image": [tiles(0)],
            "second_round": [tiles(0)],
            "two_images": [tiles(0), tiles(1)],
            "video_like": [tiles(i, max_num=1) for i in range(4)],
        }[label]
        return np.concatenate(parts), [len(p) for p in parts]

    return pixels


def assert_close(actual, expected, tolerance=1e-4):
    """Largest difference relative to the largest expected value."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    error = np.abs(actual - expected).max() / np.abs(expected).max()
    assert error < tolerance, f"relative error {error:.2e}"
