"""Reference checkpoints and what the original computes on them (tests/data/reference/README.md)."""

import functools
import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL
import pytest

# What runs whole programs, trains, or asks several models at length: `make test-fast` leaves it out, as it does what is marked
# medium or slow. Paths are relative to this folder.
MEDIUM = (
    "benchmarks/ cluster/ examples/ search/ serving/ training/ test_benchmarks.py test_commands.py test_docs.py "
    "test_operators.py checkpoints/test_hub.py datasets/internvl2/test_check.py models/blocks/test_engine.py "
    "models/internvl2/test_chat.py attacks/ parallel/ checkpoints/test_packed.py datasets/test_stream.py "
    "kernels/test_quantised.py kernels/test_cache.py evaluation/ models/blocks/test_quantis models/blocks/test_memory.py "
    "models/blocks/test_activations.py models/blocks/test_last.py models/blocks/test_decoding.py "
    "models/blocks/test_beams.py models/internvl2/test_hf.py models/internvl2/test_published.py datasets/test_packing.py "
    "kernels/test_weight_only.py models/internvl/ models/internvl_llava/ models/minimonkey/ models/internvl2/test_flash.py "
    "models/internvl2/test_internvl3.py models/internvl2/test_ranks.py models/internvl2/test_tensor_parallel.py "
    "test_scaling.py test_device.py models/internvl2/test_chat_v1.py models/blocks/test_validation.py "
    "models/blocks/test_inputs.py"
).split()

# The reference was resized by Pillow 13, which Python 3.10 cannot have. Earlier ones differ by a grey level here and there, by
# up to three in a few pixels; features and logits of pictures by less than this, relative to the largest. Answers are the same.
SAME_PILLOW = int(PIL.__version__.split(".")[0]) >= 13
PICTURE_TOLERANCE = 1e-4 if SAME_PILLOW else 5e-3

DATA = Path(__file__).parent / "data"
REFERENCE = DATA / "reference"
FAMILIES = ("qwen2", "internlm2", "llama_vit6b", "phi3")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark what is medium by where it is."""
    for item in items:
        if item.path.relative_to(Path(__file__).parent).as_posix().startswith(tuple(MEDIUM)):
            item.add_marker("medium")


@pytest.fixture
def soak_seconds():
    """How long a test marked soak goes on: ``SOAK_SECONDS``, by default a minute."""
    return float(os.environ.get("SOAK_SECONDS", "60"))


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


def assert_pixels(actual, expected, deviation):
    """Normalised pixels are equal; below Pillow 13 within three grey levels, and one but for a thousandth of them.

    Args:
        deviation: the smallest that pixels in 0..1 were divided by.
    """
    assert actual.shape == expected.shape
    levels = np.abs(actual - expected) * 255 * deviation
    assert levels.max() < (1e-3 if SAME_PILLOW else 3.01)
    assert (levels > 1.01).mean() < 1e-3
