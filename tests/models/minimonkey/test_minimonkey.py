"""Tiles, answers and dropped tokens equal the original's (tests/data/reference/minimonkey)."""

import json

import numpy as np
import pytest
from PIL import Image

from paddlemix.errors import ImageError, PromptError
from paddlemix.models.internvl2 import load_tokenizer
from paddlemix.models.minimonkey import MiniMonkeyChatModel, MiniMonkeySession
from paddlemix.processors import minimonkey
from paddlemix.processors.minimonkey import multi_scale_tiles
from tests.conftest import REFERENCE

EXPECTED = json.loads((REFERENCE / "minimonkey/expected.json").read_text(encoding="utf-8"))
ARRAYS = np.load(REFERENCE / "minimonkey/expected.npz")
CHECKPOINT = str(REFERENCE / "internlm2/checkpoint")
QUESTION = "<image>\nRead the all text in the image."
SIZE = EXPECTED["image_size"]


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("rule, key, max_num", [("chat", "tiling", None), ("training", "training_tiling", 8)])
def test_grids_and_counts(rule, key, max_num, every):
    for width, height, size, grid, of_a, of_b in EXPECTED[key][::every]:
        picture = Image.new("RGB", (width, height))
        pixels, found, counts = multi_scale_tiles(picture, size, rule, max_num)
        told = (list(found), counts)
        assert told == (grid, (of_b, of_a)), (width, height)
        assert len(pixels) == of_a + of_b - (rule == "chat")
        assert minimonkey.count_tiles((width, height), size, rule, max_num) == len(pixels)


def test_pixels_and_their_order():
    pixels, _, _ = multi_scale_tiles(str(REFERENCE / "images/img0.png"), SIZE)
    np.testing.assert_allclose(pixels[:, :, ::7, ::7], ARRAYS["pixels_0"], atol=1e-6)


def test_scales_do_not_cut_at_the_same_places():
    for size in [(a * 100, b * 100) for a in range(1, 13) for b in range(1, 13)]:
        (a, b), (i, j) = minimonkey.grids(size, 28)
        assert 3 <= i * j <= 7 and 4 <= a * b <= 12 and (a % i or b % j)


@pytest.mark.parametrize(
    "size, arguments, message",
    [((9, 9), {"rule": "demo"}, "rule is 'demo'"), ((9, 9), {"max_num": 0}, "max_num"), ((0, 9), {}, "no pixels")],
)
def test_bad_arguments(size, arguments, message):
    with pytest.raises(ImageError, match=message):
        minimonkey.grids(size, 28, **arguments)


@pytest.fixture(scope="module")
def model():
    return MiniMonkeyChatModel.from_pretrained(CHECKPOINT, dtype="float32", engine="eager")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(CHECKPOINT)


def picture(chat):
    return multi_scale_tiles(str(REFERENCE / f"images/img{chat['picture']}.png"), SIZE)


def encoded(model, tokenizer, tiles):
    from paddlemix.models.blocks.conversation import insert_image_tokens

    model.set_tokenizer(tokenizer)
    (text,) = insert_image_tokens([QUESTION], [tiles * model.config.num_image_token])
    return tokenizer.encode(model.template().prompt(text))


@pytest.mark.parametrize("engine", ["eager", "inference"])
def test_answers_and_dropped_tokens(engine, model, tokenizer):
    if engine == "inference":
        from paddlemix.kernels import cpu

        if not cpu.available("float32"):
            pytest.skip("the CPU engine is not available here")
        model = MiniMonkeyChatModel.from_pretrained(CHECKPOINT, dtype="float32", engine="inference")
    model.config.template = EXPECTED["template"]
    for chat in EXPECTED["chats"]:
        pixels, grid, _ = picture(chat)
        assert list(grid) == chat["grid"]
        ids = encoded(model, tokenizer, len(pixels))
        assert len(ids) == chat["prompt_tokens"]
        if chat["scm"]:
            assert model.scm_dropped(pixels, grid, ids) == chat["dropped"]
        options = dict(max_new_tokens=len(chat["output_ids"]), do_sample=False)
        session = MiniMonkeySession(model, tokenizer, grid, chat["scm"])
        answer = session.ask(QUESTION, pixels, options)
        end = tokenizer.require_token_id(model.template().stop)
        expected = [i for i in chat["output_ids"] if i != end]
        assert answer == tokenizer.decode(expected, skip_special_tokens=True).strip()
        assert model.chat(tokenizer, pixels, grid, QUESTION, options, use_scm=chat["scm"]) == answer


def test_blocks_of_rows_do_not_matter(model, tokenizer, monkeypatch):
    """The mean over all rows is the same when a few are in memory at a time."""
    pixels, grid, _ = picture({"picture": 0})
    ids = encoded(model, tokenizer, len(pixels))
    whole = model.scm_dropped(pixels, grid, ids)
    monkeypatch.setattr("paddlemix.models.minimonkey.modeling._SCORES", 5000)
    assert model.scm_dropped(pixels, grid, ids) == whole


def test_session_asks_on_with_the_same_picture(model, tokenizer):
    """A second round equals a new conversation with its history: features are kept, keys are not."""
    pixels, grid, _ = picture({"picture": 1})
    options = dict(max_new_tokens=8, do_sample=False)
    session = MiniMonkeySession(model, tokenizer, grid, use_scm=True)
    session.ask(QUESTION, pixels, options)
    history = list(session.history)
    second = session.ask("And now?", None, options)
    assert session.cached_tokens == 0
    assert second == model.chat(tokenizer, pixels, grid, "And now?", options, use_scm=True, history=history)


def test_one_picture_alone(model, tokenizer):
    pixels, grid, _ = picture({"picture": 0})
    session = MiniMonkeySession(model, tokenizer, grid)
    session.ask(QUESTION, pixels, dict(max_new_tokens=1))
    with pytest.raises(PromptError, match="2 pictures, but Mini-Monkey looks at one"):
        session.ask(QUESTION, pixels)
    with pytest.raises(PromptError, match="2 pictures"):
        MiniMonkeySession(model, tokenizer, grid).ask("<image><image>", pixels, None, [1, len(pixels) - 1])


@pytest.mark.parametrize("grid", [(12, 12), (0, 3), (-1, -1)])
def test_grid_of_another_picture(model, tokenizer, grid):
    pixels, _, _ = picture({"picture": 0})
    with pytest.raises(PromptError, match="take pixels and grid from the same call"):
        model.chat(tokenizer, pixels, grid, QUESTION, use_scm=True)


def test_questions_without_a_picture(model, tokenizer):
    options = dict(max_new_tokens=5, do_sample=False)
    plain = super(MiniMonkeyChatModel, model).chat(tokenizer, None, "Hello.", options)
    assert model.chat(tokenizer, None, None, "Hello.", options, use_scm=True) == plain


@pytest.mark.parametrize("bound", [1, 4, 8])
def test_training_samples_have_the_training_tiles(bound):
    """The encoder counts before it cuts; both are the tiles that the processor makes, and the text has room for all."""
    from paddlemix.datasets.records import parse_record
    from tests.datasets.helpers import make_encoder, picture_record

    encoder = make_encoder("internlm2", multi_scale="training", dynamic_image_size=True, max_dynamic_patch=bound)
    record = parse_record(json.dumps(picture_record(0)).encode(), str(REFERENCE / "images"))
    sample = encoder.encode(record)
    expected, _, _ = multi_scale_tiles(str(REFERENCE / "images/img0.png"), SIZE, "training", bound)
    np.testing.assert_array_equal(sample["pixel_values"], expected)
    context = encoder.tokenizer.require_token_id("<IMG_CONTEXT>")
    assert (sample["input_ids"] == context).sum() == len(expected) * EXPECTED["num_image_token"]


@pytest.mark.slow
def test_command_answers_with_and_without_compression():
    import subprocess
    import sys

    from paddlemix.examples.minimonkey import chat_demo_minimonkey as command

    outputs = {}
    for flag in ("--scm", "--no_scm"):
        arguments = ["--model_name_or_path", CHECKPOINT, "--image_path", str(REFERENCE / "images/img0.png"), "--text", "Read."]
        call = [sys.executable, command.__file__, *arguments, flag, "--max_new_tokens", "12", "--engine", "eager"]
        outputs[flag] = subprocess.run(call, capture_output=True, text=True, check=True, timeout=120).stdout.strip()
    model = MiniMonkeyChatModel.from_pretrained(CHECKPOINT, dtype="float32", engine="eager")
    pixels, grid, _ = picture({"picture": 0})
    for flag, compress in (("--scm", True), ("--no_scm", False)):
        options = dict(max_new_tokens=12)
        answer = model.chat(load_tokenizer(CHECKPOINT), pixels, grid, "<image>\nRead.", options, use_scm=compress)
        assert outputs[flag] == answer
    assert outputs["--scm"] != outputs["--no_scm"]
