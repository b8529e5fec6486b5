"""The reference of InternVL-Chat-LLaVA: checkpoints, what the original computes on them, and pictures."""

import functools
import json
import shutil

import numpy as np

from paddlemix.models.internvl_llava import LlavaForCausalLM, load_tokenizer, process_images
from tests.conftest import REFERENCE

FOLDER = REFERENCE / "internvl_llava"
EXPECTED = json.loads((FOLDER / "expected.json").read_text(encoding="utf-8"))
PRETRAINED = FOLDER / "pretrained"
CHAT, TOWER, BASE = (PRETRAINED / EXPECTED[name] for name in ("chat", "tower", "llm"))
PROJECTOR, LORA = (PRETRAINED / EXPECTED[name]["model"] for name in ("base_and_projector", "lora"))
IMAGES = REFERENCE / "images"


@functools.cache
def arrays():
    """The numbers of the reference."""
    return dict(np.load(FOLDER / "expected.npz"))


@functools.cache
def model():
    """The whole checkpoint with the tower's own folder; tests must not change it."""
    return LlavaForCausalLM.from_pretrained(CHAT, vision_tower=TOWER)


@functools.cache
def tokenizer():
    """Its tokenizer."""
    return load_tokenizer(CHAT)


def pixels(*numbers, aspect="pad", size=336):
    """Pictures of the reference by number, or None for none."""
    return process_images([IMAGES / f"img{number}.png" for number in numbers], size, aspect) if numbers else None


def pixels_of(chat):
    """The pictures of a chat of the reference."""
    return pixels(*chat["pictures"], aspect=chat["aspect"])


def assert_near(actual, expected, tolerance=1e-4):
    """Equal within a share of the largest value."""
    actual, expected = np.asarray(actual, "float64"), np.asarray(expected, "float64")
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= tolerance * np.abs(expected).max()


def copied(source, target, **changes):
    """A copy of a checkpoint, some keys of its configuration changed; None removes one."""
    shutil.copytree(source, target)
    path = target / "config.json"
    values = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}), encoding="utf-8")
    return target
