"""Prompts, ids, labels and pixels are the original's; records that make no sense are told."""

import numpy as np
import pytest
from PIL import Image

from paddlemix.errors import DataError, PromptError
from paddlemix.models.internvl_llava import build_prompt, encode_record, process_images, tokenize_prompt

from .helpers import EXPECTED, arrays, pixels, tokenizer


def test_ids_equal_the_original():
    for case in EXPECTED["tokenizer"]:
        assert tokenize_prompt(case["text"], tokenizer()) == case["ids"], case["text"]


@pytest.mark.parametrize("case", EXPECTED["prompts"] + EXPECTED["chats"], ids=lambda case: case["template"])
def test_prompts_equal_the_original(case):
    prompt = build_prompt(case["template"], case["messages"])
    assert prompt == case["prompt"]
    assert tokenize_prompt(prompt, tokenizer()) == case["input_ids"]


@pytest.mark.parametrize("version", EXPECTED["train_samples"])
def test_samples_equal_the_original(version):
    for sample in EXPECTED["train_samples"][version]:
        input_ids, labels = encode_record(sample["record"], tokenizer(), version)
        assert input_ids == sample["input_ids"]
        assert labels == sample["labels"]


def record(*turns, image="a.png"):
    roles = ("human", "gpt")
    values = {"conversations": [{"from": roles[i % 2], "value": turn} for i, turn in enumerate(turns)]}
    return {**values, "image": image} if image else values


def test_an_answer_that_looks_like_a_prompt_is_learned():
    """The original throws such a sample away."""
    answer = "say USER: x ASSISTANT: y"
    ids, labels = encode_record(record("<image>\nQ", answer), tokenizer(), "v1")
    learned = [label for label in labels if label >= 0]
    assert learned[-1] == tokenizer().eos_token_id
    assert tokenizer().decode(learned[:-1]).strip() == answer
    assert ids[-len(learned) :] == learned


def test_a_mark_moves_to_the_front_and_a_picture_without_one_gets_one():
    marked = encode_record(record("Q <image>", "A"), tokenizer(), "v1")
    assert encode_record(record("<image>\nQ", "A"), tokenizer(), "v1") == marked
    assert encode_record(record("<image> <image>Q", "A"), tokenizer(), "v1") == marked
    assert encode_record(record("Q", "A"), tokenizer(), "v1") == marked


@pytest.mark.parametrize(
    "version, case, message",
    [
        ("v1", record("<image>\nQ", "A", image=None), "has <image> in its text but no 'image'"),
        ("v1", record("<image>\nQ", "A", "<image> R", "B"), "2 <image> mark"),
        ("v1", record("<image>\nQ"), "no answer"),
        ("v1", {"conversations": [{"from": "human", "value": "a"}] * 2}, "turn 2 is from 'human'"),
        ("v1", {"conversations": [{"from": "user", "value": "a"}]}, "turn 1 must have 'from'"),
        ("v1", {}, "needs 'conversations'"),
        ("plain", record("<image>", "A", "Q", "B"), "exactly two turns"),
    ],
)
def test_bad_records_are_told(version, case, message):
    with pytest.raises(DataError, match=message):
        encode_record(case, tokenizer(), version)


def test_an_unknown_template_is_told():
    with pytest.raises(PromptError, match="vicuna_v9"):
        build_prompt("vicuna_v9", ["hi"])
    with pytest.raises(PromptError, match="v9"):
        encode_record(record("Q", "A"), tokenizer(), "v9")


@pytest.mark.parametrize("aspect", ["pad", "square"])
def test_pixels_equal_the_original(aspect):
    own = pixels(0, 1, 2, 3, aspect=aspect)
    np.testing.assert_allclose(own[:, :, ::16, ::16], arrays()[f"pixels_{aspect}"], atol=1e-5)
    np.testing.assert_allclose(own.mean((1, 2, 3)), arrays()[f"pixels_{aspect}_mean"], atol=1e-5)


def test_padding_keeps_all_of_a_picture_and_square_its_middle():
    wide = Image.fromarray(np.repeat(np.linspace(0, 255, 91).astype("uint8")[None], 30, 0))
    padded, cut = (process_images([wide], 28, aspect)[0] for aspect in ("pad", "square"))
    assert np.ptp(padded[0, 14]) > 2 * np.ptp(cut[0, 14])
    assert abs(padded[:, 0, 0]).max() < 0.02  # the mean colour
    assert process_images([], 28).shape == (0, 3, 28, 28)
