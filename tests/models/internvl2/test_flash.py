"""The visual resolution router of InternVL3.5-Flash, against what the original computes, and each prompt by itself."""

import json
import shutil

import numpy as np
import paddle
import pytest
from paddlemix.processors.internvl2.image import load_image

from paddlemix.errors import ConfigError, PromptError
from paddlemix.models.blocks.chat import digested, end_of_answer, place_pictures
from paddlemix.models.blocks.decoding.loop import Loop
from paddlemix.models.blocks.router import compact_tiles
from paddlemix.models.internvl2 import ChatSession, InternVLChatModel
from tests.conftest import PICTURE_TOLERANCE, REFERENCE, assert_close
from tests.models.internvl2.test_internvl3 import ENGINES, FOLDER, load, pictures

OPTIONS = {"max_new_tokens": 12}


@pytest.fixture
def flash():
    return load("flash")


def tiles(number):
    return load_image(str(REFERENCE / "images" / f"img{number}.png"), input_size=64, max_num=4)


@pytest.mark.parametrize("engine", ENGINES)
def test_features_and_gates_equal_the_original(engine):
    reference = load("flash", engine)
    model, arrays = reference.model, reference.arrays
    every = np.concatenate([tiles(i) for i in range(4)])
    with paddle.no_grad():
        assert_close(model.extract_feature(arrays["pixel_values"]), arrays["image_features"])
        assert_close(model.routed_tiles(arrays["pixel_values"]).coarse, arrays["compressed_features"])
        assert_close(model.router_gate(every), arrays["gate"], PICTURE_TOLERANCE)
        assert_close(model(input_ids=arrays["lm_input_ids"]).logits, arrays["lm_logits"])


@pytest.mark.parametrize("engine", [pytest.param(e, marks=[pytest.mark.slow] * (e != "eager")) for e in ENGINES])
def test_chats_equal_the_original(engine):
    reference = load("flash", engine)
    for chat in reference.expected["chats"]:
        history = chat["history"] and [tuple(turn) for turn in chat["history"]]
        session = ChatSession(reference.model, reference.tokenizer, history=history)
        session.ask(chat["question"], pictures(reference, chat), OPTIONS, chat["num_patches_list"])
        assert session.history[-1][1].strip() == chat["response"], chat["label"]
        if "prompt_tokens" in chat:  # not of text alone
            answer = session._ids[chat["prompt_tokens"] :]
            assert answer == chat["output_ids"][: len(answer)] and len(answer) >= len(chat["output_ids"]) - 1
        assert session._compact.tolist() == (chat.get("compressed") or [])


@pytest.mark.slow
def test_token_ids_with_all_context_tokens_are_shortened(flash):
    model, tokenizer = flash.model, flash.tokenizer
    for chat in flash.expected["chats"][:1] + flash.expected["chats"][2:3]:
        pixels = pictures(flash, chat)
        counts = [n * 256 for n in chat["num_patches_list"]]
        ids = model.prompt_ids(tokenizer, model.template(), [(chat["question"], None)], counts)
        tokens = model.generate(pixels, np.array([ids]), max_new_tokens=12).numpy()[0].tolist()
        assert tokens == chat["output_ids"]
    # Two rows, padded on the left: each decides over its own tiles.
    one, two = (model.prompt_ids(tokenizer, model.template(), [("<image>\n?", None)], [n * 256]) for n in (5, 3))
    width = max(len(one), len(two))
    rows = np.stack([np.pad(row, (width - len(row), 0)) for row in (one, two)])
    mask = np.stack([np.arange(width) >= width - len(row) for row in (one, two)]).astype("int64")
    both = model.generate(np.concatenate([tiles(0), tiles(1)]), rows, mask, max_new_tokens=6).numpy()
    for row, ids, pixels in zip(both, (one, two), (tiles(0), tiles(1))):
        assert row.tolist() == model.generate(pixels, np.array([ids]), max_new_tokens=6).numpy()[0].tolist()
    with pytest.raises(PromptError, match="each tile needs exactly its own"):
        model.generate(tiles(0), np.array([two]))


def test_batches_route_each_row_by_itself(flash):
    questions = ["<image>\nWhat is it?", "Who?", "<image>\nWhere?"]
    pixels = [tiles(0), None, tiles(1)]
    answers = flash.model.batch_chat(flash.tokenizer, pixels, questions, OPTIONS)
    for pixel, question, answer in zip(pixels, questions, answers):
        assert flash.model.chat(flash.tokenizer, pixel, question, OPTIONS) == answer


def test_a_later_picture_can_void_what_is_cached(flash):
    session = ChatSession(flash.model, flash.tokenizer)
    session.ask("<image>\nWhat is it?", tiles(0), OPTIONS)
    before = session._compact
    session.ask("And now?", None, OPTIONS)
    assert session.cached_tokens > 0  # no picture, no change
    history = list(session.history)
    answer = session.ask("<image>\nAnd this?", tiles(2), OPTIONS)
    assert (session._compact[:5] != before).any() and session.cached_tokens == 0
    fresh = ChatSession(flash.model, flash.tokenizer, history=history)
    assert fresh.ask("<image>\nAnd this?", np.concatenate([tiles(0), tiles(2)]), OPTIONS, [5, 5]) == answer


def job_of(loop, reference, pixels, turns, counts):
    """A job of many at once for a conversation, with all context tokens that its tiles may have."""
    model, tokenizer = reference.model, reference.tokenizer
    ids = model.prompt_ids(tokenizer, model.template(), turns, [n * 256 for n in counts])
    config = end_of_answer(OPTIONS, model.template(), tokenizer, model)
    return loop.make_job(ids, config, place_pictures(ids, model, digested(pixels, counts) if counts else []))


def turn(loop, *jobs):
    for job in jobs:
        loop.add(job)
    while loop.is_busy:
        assert all(event.error is None for event in loop.step())


@pytest.mark.parametrize("max_seqs, at_once", [(16, True), (2, False)])
def test_many_at_once_are_what_the_original_computes(flash, max_seqs, at_once):
    loop = Loop(flash.model, flash.tokenizer, 8192, max_seqs, at_once=at_once)
    jobs = []
    for chat in flash.expected["chats"]:
        turns = [*map(tuple, chat["history"] or []), (chat["question"], None)]
        jobs.append(job_of(loop, flash, pictures(flash, chat), turns, chat["num_patches_list"] or []))
    turn(loop, *jobs)
    for job, chat in zip(jobs, flash.expected["chats"]):
        assert job.answer == chat["output_ids"][: len(job.answer)] and len(job.answer) >= len(chat["output_ids"]) - 1
        assert job.prompt == chat.get("prompt_tokens", job.prompt)
        assert [small for picture in job.pictures for small in picture.compact] == (chat.get("compressed") or [])
    assert not loop.tower._claims and not loop.table.used


def test_pages_are_shared_only_where_tiles_keep_their_size(flash):
    loop = Loop(flash.model, flash.tokenizer, 16384, image_cache=1 << 30)
    one = job_of(loop, flash, tiles(0), [("<image>\nWhat is it?", None)], [5])
    turn(loop, one)
    size = loop.table.page_size
    # The same picture, and another question: all but the end is there already.
    again = job_of(loop, flash, tiles(0), [("<image>\nAnd where?", None)], [5])
    turn(loop, again)
    assert again.image_hits == 1 and again.cached >= again.pictures[0].start + again.pictures[0].count - size
    # A second picture makes other tiles of the first compact: nothing from that picture on is of use.
    two = job_of(loop, flash, np.concatenate([tiles(0), tiles(2)]), [("<image>\nWhat is it? <image>", None)], [5, 5])
    turn(loop, two)
    assert (two.pictures[0].compact != one.pictures[0].compact).any()
    assert two.cached <= one.pictures[0].start
    fresh = Loop(flash.model, flash.tokenizer, 16384)
    other = job_of(fresh, flash, np.concatenate([tiles(0), tiles(2)]), [("<image>\nWhat is it? <image>", None)], [5, 5])
    turn(fresh, other)
    assert other.answer == two.answer and other.cached == 0


def test_room_counts_what_is_left_of_a_prompt(flash):
    shortest = min(
        (chat for chat in flash.expected["chats"] if chat.get("prompt_tokens")), key=lambda chat: chat["prompt_tokens"]
    )
    turns, counts = [(shortest["question"], None)], shortest["num_patches_list"]
    assert not shortest["history"]
    room = shortest["prompt_tokens"] + 4
    loop = Loop(flash.model, flash.tokenizer, 4096, longest=room)
    job = job_of(loop, flash, pictures(flash, shortest), turns, counts)
    assert len(job.tokens) > room
    turn(loop, job)
    assert job.answer == shortest["output_ids"][:4]
    loop = Loop(flash.model, flash.tokenizer, 4096, longest=room - 4)
    loop.add(job_of(loop, flash, pictures(flash, shortest), turns, counts))
    errors = []
    while loop.is_busy:
        errors += [str(event.error) for event in loop.step() if event.error]
    assert len(errors) == 1 and f"the prompt has {room - 4} tokens" in errors[0]


def test_the_rule():
    gates = np.array([0.1, 0.5, 0.9, 0.5], "float32")
    assert compact_tiles(gates, 0.5, 0.0).tolist() == [False, False, True, False]
    assert compact_tiles(gates, 0.0, 0.0).tolist() == [False, True, True, True]
    assert compact_tiles(gates, 0.0, 0.6).tolist() == [False, False, True, False]
    assert compact_tiles(gates[:1], 0.3, 0.0).tolist() == [False]


def test_without_flash_mode_the_router_is_kept_and_unused(tmp_path, flash):
    shutil.copytree(FOLDER / "flash" / "checkpoint", tmp_path, dirs_exist_ok=True)
    values = json.loads((tmp_path / "config.json").read_text()) | {"flash_mode": False}
    (tmp_path / "config.json").write_text(json.dumps(values))
    model = InternVLChatModel.from_pretrained(str(tmp_path), dtype="float32")
    session = ChatSession(model, flash.tokenizer)
    session.ask("<image>\nWhat is it?", tiles(0), OPTIONS)
    assert session._ids.count(model.img_context_token_id) == 5 * 256
    assert_close(model.router_gate(tiles(0)), flash.arrays["gate"][:5])


def test_models_without_a_router_say_so():
    reference = load("qwen3")
    with pytest.raises(ConfigError, match="no visual resolution router"):
        reference.model.router_gate(reference.arrays["pixel_values"])
