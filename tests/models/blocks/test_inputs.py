"""Pixels, ids and masks in the dtypes and layouts that callers bring."""

import numpy as np
import paddle
import pytest

from paddlemix.errors import PromptError
from tests.conftest import assert_close, load_reference

# What one value may be off by, relative to the largest: half a unit of the last place of the dtype.
ROUNDING = {"bfloat16": 2**-8, "float16": 2**-11, "float64": 0.0}


@pytest.mark.parametrize("dtype", ROUNDING)
def test_features_of_other_dtypes_are_those_of_float32(reference, dtype):
    pixels = reference.arrays["pixel_values"]
    rounded = paddle.to_tensor(pixels).astype(dtype)
    assert_close(rounded.astype("float32"), pixels, ROUNDING[dtype] + 1e-7)
    with paddle.no_grad():
        features = reference.model.extract_feature(rounded)
        # Exactly what the same pixels give in float32, and what the original gives within the rounding of pixels.
        assert np.array_equal(features.numpy(), reference.model.extract_feature(rounded.astype("float32").numpy()).numpy())
        assert_close(features, reference.arrays["image_features"], 8 * ROUNDING[dtype] + 1e-4)
    assert str(features.dtype) == "paddle.float32"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_answers_of_other_dtypes_are_those_of_float32(reference, chat_pixels, dtype):
    for chat in reference.expected["chats"]:
        pixels, _ = chat_pixels(chat["label"])
        if pixels is None:
            continue
        half = paddle.to_tensor(pixels).astype(dtype)
        ids = reference.model.generate(half, np.array([chat["input_ids"]]), max_new_tokens=len(chat["output_ids"]))
        assert ids.numpy()[0].tolist() == chat["output_ids"], (chat["label"], dtype)


def test_layouts_that_mean_one_thing_are_taken():
    model, pixels = load_reference("qwen2").model, load_reference("qwen2").arrays["pixel_values"][:3]
    with paddle.no_grad():
        features = model.extract_feature(pixels).numpy()
        assert_close(model.extract_feature(pixels[0]), features[:1], 1e-5)
        assert np.array_equal(model.extract_feature([pixels[0], pixels[1:]]).numpy(), features)
        assert np.array_equal(model.extract_feature([paddle.to_tensor(pixels[:1]), pixels[1:]]).numpy(), features)
        strided = np.asfortranarray(pixels[::-1].astype("float64"))[::-1]
        assert np.array_equal(model.extract_feature(strided).numpy(), features)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "make, told",
    [
        (lambda p: np.uint8(p * 20), "is uint8.*load_image"),
        (lambda p: paddle.to_tensor(np.uint8(p * 20)), "is uint8.*load_image"),
        (lambda p: p.astype("int64"), "is int64"),
        (lambda p: paddle.to_tensor(p).astype("bfloat16").numpy(), "is uint16.*bits of bfloat16"),
        (lambda p: p > 0, "is bool"),
        (lambda p: p.astype("complex64"), "numbers, not an array of complex64"),
        (lambda p: p.transpose(0, 2, 3, 1), r"\[tiles, 3, height, width\], not .*colour channels before"),
        (lambda p: p[0, 0], r"must be \[tiles, 3"),
        (lambda p: p[:, :1], r"must be \[tiles, 3"),
        (lambda p: p[None], r"must be \[tiles, 3"),
        (lambda p: p[..., :110], "multiples of"),
        (lambda p: np.where(np.arange(len(p)).reshape([-1, 1, 1, 1]) == 1, np.nan, p), "NaN or infinite values in tile 2 of"),
        (lambda p: p * np.inf, "NaN or infinite"),
        (lambda p: p * 100, "raw pixels"),
        (lambda p: [p, p[:, :, :56, :56]], "112x112"),
        (lambda p: [p[0], np.uint8(p[1])], r"pixel_values\[1\] is uint8"),
        (lambda p: "photo.png", "not str"),
        (lambda p: [[[1.0, 2.0], [3.0]]], "cannot be read as an array"),
    ],
)
def test_pixels_that_are_none_are_refused(make, told, training):
    model, pixels = load_reference("qwen2").model, np.abs(load_reference("qwen2").arrays["pixel_values"][:2])
    if training:
        model.train()
    try:
        with paddle.set_grad_enabled(training), pytest.raises(PromptError, match=told):
            model.extract_feature(make(pixels))
    finally:
        model.eval()


def test_ids_and_masks_of_other_layouts_are_the_same_prompt():
    reference = load_reference("qwen2")
    chat = next(chat for chat in reference.expected["chats"] if chat["label"] == "text_only")
    ids, model, options = chat["input_ids"], reference.model, {"max_new_tokens": 5}
    expected = model.generate(None, np.array([ids]), **options).numpy()
    padded = [[0, 0, *ids]]
    for given in (ids, np.array(ids), [ids], paddle.to_tensor(ids, "int32"), np.array([ids], "uint16")):
        assert np.array_equal(model.generate(None, given, **options).numpy(), expected)
    mask = np.array([[0, 0] + [1] * len(ids)])
    for given in (mask, mask[0], mask.astype(bool), mask.tolist(), paddle.to_tensor(mask).astype("bfloat16")):
        assert np.array_equal(model.generate(None, padded, given, **options).numpy(), expected)


@pytest.mark.parametrize(
    "ids, mask, told",
    [
        ([[1, 2], [3]], None, "cannot be read as an array"),
        ([], None, "whole numbers|is empty"),
        (np.zeros([1, 0], "int64"), None, "is empty"),
        ([[0.5, 1.0]], None, "whole numbers"),
        (np.zeros([1, 2, 3], "int64"), None, "whole numbers"),
        ([[1, -1]], None, "has the id -1"),
        ([[1, 10**6]], None, "has the id 1000000, but the model's ids are 0 to"),
        ([[1, 2]], [[1, 1, 1]], r"attention_mask is \[1, 3\]"),
        ([[1, 2], [3, 4]], [[1, 1], [0, 0]], "hides all of row 2"),
        ([["a", "b"]], None, "must be numbers"),
    ],
)
def test_ids_and_masks_that_are_none_are_refused(ids, mask, told):
    with pytest.raises(PromptError, match=told):
        load_reference("qwen2").model.generate(None, ids, mask, max_new_tokens=2)


def test_features_are_taken_in_any_dtype(chat_pixels):
    reference = load_reference("qwen2")
    chat = next(chat for chat in reference.expected["chats"] if chat["label"] == "image")
    model, ids, options = reference.model, np.array([chat["input_ids"]]), {"max_new_tokens": len(chat["output_ids"])}
    features = model.extract_feature(chat_pixels("image")[0]).numpy()
    for given in (features, paddle.to_tensor(features), features.astype("float64")):
        assert model.generate(None, ids, visual_features=given, **options).numpy()[0].tolist() == chat["output_ids"]
    with pytest.raises(PromptError, match="visual_features must be"):
        model.generate(None, ids, visual_features=features[..., :-1])


def test_weights_of_labels_are_taken_in_any_dtype():
    model, ids = load_reference("qwen2").model, np.arange(5, 17)[None]
    weight = np.linspace(0.5, 2, 12, dtype="float32")[None]
    weight = paddle.to_tensor(weight).astype("bfloat16")
    with paddle.no_grad():
        expected = float(model(None, ids, labels=ids, loss_weight=weight.astype("float32").numpy()).loss)
        assert float(model(None, ids, labels=ids, loss_weight=weight).loss) == expected


def test_pictures_come_as_a_list_of_arrays(chat_pixels):
    """Each array is a picture, in chat and, with an entry for each conversation, in a batch."""
    reference = load_reference("qwen2")
    model, tokenizer = reference.model, reference.tokenizer
    pixels, counts = chat_pixels("two_images")
    first, second = pixels[: counts[0]], pixels[counts[0] :]
    question, options = "Image-1: <image>\nImage-2: <image>\nCompare them.", {"max_new_tokens": 8}
    expected = model.chat(tokenizer, pixels, question, options, num_patches_list=counts)
    for given in ([first, second], (paddle.to_tensor(first), second)):
        assert model.chat(tokenizer, given, question, options) == expected
        assert model.chat(tokenizer, given, question, options, num_patches_list=counts) == expected
    alone = [model.chat(tokenizer, second, "What?", options), model.chat(tokenizer, None, "Who?", options)]
    questions = [question, "What?", "Who?"]
    assert model.batch_chat(tokenizer, [[first, second], second, None], questions, options) == [expected, *alone]
    assert model.batch_chat(tokenizer, [pixels, second], questions[:2], options, [counts, [len(second)]]) == [
        expected,
        alone[0],
    ]
