"""Conversations: the original's answers, many rounds, batches, and questions that make no sense."""

import functools

import numpy as np
import paddle
import pytest

from paddlemix.errors import ConfigError, PromptError, TokenizerError
from paddlemix.kernels import cpu as kernels
from paddlemix.models.internvl2 import ChatSession, InternVLChatModel, load_tokenizer
from tests.conftest import load_reference, tiles

GREEDY = {"max_new_tokens": 24, "do_sample": False}


def test_answers_equal_the_original(reference, chat_pixels):
    for chat in reference.expected["chats"]:
        pixels, counts = chat_pixels(chat["label"])
        options = {"max_new_tokens": len(chat["output_ids"])}
        history = chat["history"] and [tuple(turn) for turn in chat["history"]]
        answer, turns = reference.model.chat(
            reference.tokenizer, pixels, chat["question"], options, history, return_history=True, num_patches_list=counts
        )
        assert answer == chat["response"], chat["label"]
        assert turns == [*(history or []), (chat["question"], answer)]


def test_a_picture_is_marked_when_the_question_does_not():
    reference = load_reference("qwen2")
    chat = reference.expected["chats"][0]
    question = chat["question"].removeprefix("<image>\n")
    assert reference.model.chat(reference.tokenizer, tiles(0), question, GREEDY) == chat["response"]


def batch(reference):
    expected = reference.expected["batch_chat"]
    pixels = np.concatenate([tiles(i) for i in range(3)])
    return expected, pixels


def test_a_batch_equals_the_original_and_its_members(reference):
    expected, pixels = batch(reference)
    counts = expected["num_patches_list"]
    options = {"max_new_tokens": reference.expected["batch_chat"].get("max_new_tokens", 16)}
    answers = reference.model.batch_chat(reference.tokenizer, pixels, expected["questions"], options, counts)
    assert answers == expected["responses"]
    bounds = np.cumsum([0, *counts])
    alone = [
        reference.model.chat(reference.tokenizer, pixels[a:b], question, options)
        for question, a, b in zip(expected["questions"], bounds, bounds[1:])
    ]
    assert answers == alone


def test_a_batch_of_unlike_conversations_equals_its_members(reference):
    """No picture, two pictures, four frames, and a second round, side by side."""
    first = ("<image>\nWhat is in the picture?", "A panda.")
    frames = np.concatenate([tiles(i, max_num=1) for i in range(4)])
    rows = [
        ("Tell me a story.", None, [], None),
        ("Image-1: <image>\nImage-2: <image>\nCompare.", np.concatenate([tiles(0), tiles(3)]), [7, 5], None),
        ("".join(f"Frame{i + 1}: <image>\n" for i in range(4)) + "What happens?", frames, [1] * 4, None),
        ("And where?", tiles(1), [7], [first]),
    ]
    alone = [
        reference.model.chat(reference.tokenizer, pixels, question, GREEDY, history, num_patches_list=counts)
        for question, pixels, counts, history in rows
    ]
    together, histories = reference.model.batch_chat(
        reference.tokenizer,
        np.concatenate([pixels for _, pixels, _, _ in rows if pixels is not None]),
        [question for question, *_ in rows],
        GREEDY,
        num_patches_list=[counts for _, _, counts, _ in rows],
        history=[history for *_, history in rows],
        return_history=True,
    )
    assert together == alone
    assert histories[3] == [first, ("And where?", alone[3])]


def test_a_session_reuses_its_prefix_and_answers_as_a_fresh_run(reference):
    session = ChatSession(reference.model, reference.tokenizer)
    session.ask("<image>\nPlease describe this image in detail.", tiles(0), GREEDY, [7])
    for question, pixels, counts in (
        ("What is in the picture?", None, None),
        ("Now <image> and <image>?", np.concatenate([tiles(1), tiles(2)]), [7, 7]),
        ("Which is larger?", None, None),
    ):
        known = list(session.history)
        seen = [tiles(0)] if len(known) < 2 else [tiles(0), tiles(1), tiles(2)]
        counts_all = [7]
        if pixels is not None or len(known) > 2:
            seen, counts_all = [tiles(0), tiles(1), tiles(2)], [7, 7, 7]
        answer = session.ask(question, pixels, GREEDY, counts)
        assert session.cached_tokens > 7 * 16
        fresh = reference.model.chat(
            reference.tokenizer, np.concatenate(seen), question, GREEDY, known, num_patches_list=counts_all
        )
        assert answer == fresh


def test_an_abandoned_stream_leaves_the_session_as_it_was():
    reference = load_reference("internlm2")
    session = ChatSession(reference.model, reference.tokenizer)
    session.ask("<image>\nWhat?", tiles(0), GREEDY)
    before = list(session.history)
    stream = session.stream("<image> <image>", np.concatenate([tiles(1), tiles(2)]), GREEDY, [7, 7])
    next(stream)
    stream.close()
    assert session.history == before
    answer = session.ask("And now?", None, GREEDY)
    fresh = reference.model.chat(reference.tokenizer, tiles(0), "And now?", GREEDY, before, num_patches_list=[7])
    assert answer == fresh


@pytest.mark.parametrize("engine", ["eager", "inference"])
def test_rounds_hold_their_keys_and_values_and_nothing_else(engine):
    if engine == "inference" and not kernels.available("float32"):
        pytest.skip("the CPU kernels cannot be built here (see the warning)")
    reference = load_reference("qwen2")
    model = InternVLChatModel.from_pretrained(str(reference.path), dtype="float32", engine=engine)
    pictures, options = np.concatenate([tiles(0), tiles(1)]), {"max_new_tokens": 8, "min_new_tokens": 8}
    model.chat(reference.tokenizer, pictures, "<image><image>" + "panda " * 600, options, num_patches_list=[7, 7])
    allocated = functools.partial(paddle.base.core.host_memory_stat_current_value, "Allocated", 0)  # by all tensors there are
    session, before = ChatSession(model, reference.tokenizer), allocated()
    assert session.memory() == {"features": 0, "kv_cache": 0, "positions": 0}
    llm = model.config.llm_config
    per_position = 2 * 4 * llm.num_hidden_layers * llm.num_key_value_heads * llm.head_dim
    for number in range(6):
        question, counts = ("<image><image>Compare.", [7, 7]) if number == 0 else ("And now?", None)
        session.ask(question, pictures if counts else None, options, counts)
        held = session.memory()
        assert held["features"] == 14 * model.config.num_image_token * llm.hidden_size * 4
        assert held["kv_cache"] == held["positions"] * per_position
        # Paddle counts whole blocks of 64 bytes.
        assert 0 <= allocated() - before - held["features"] - held["kv_cache"] < 10_000
    assert held["positions"] <= 1.25 * (session.cached_tokens + 40)  # what a round adds, and a quarter
    del session
    assert allocated() - before < 10_000


def test_streamed_pieces_are_the_answer(reference):
    chat = reference.expected["chats"][0]
    session = ChatSession(reference.model, reference.tokenizer)
    pieces = list(session.stream(chat["question"], tiles(0), GREEDY))
    assert "".join(pieces) == chat["response"]
    assert len(pieces) > 3


def test_the_configuration_and_the_caller_can_replace_the_system_message():
    reference = load_reference("qwen2")
    plain = reference.model.chat(reference.tokenizer, None, "Who are you?", GREEDY)
    spoken = ChatSession(reference.model, reference.tokenizer, system_message="You are a pirate.").ask(
        "Who are you?", None, GREEDY
    )
    assert spoken != plain
    reference.model.config.system_message = "You are a pirate."
    try:
        assert reference.model.chat(reference.tokenizer, None, "Who are you?", GREEDY) == spoken
        assert reference.model.batch_chat(reference.tokenizer, None, ["Who are you?"], GREEDY) == [spoken]
    finally:
        reference.model.config.system_message = None


@pytest.mark.parametrize(
    "question, pictures, counts, message",
    [
        ("<image> <image>", [0], [7], r"2 <image> mark\(s\) but 1 picture"),
        ("<image>", [0, 1], [7, 7], r"1 <image> mark\(s\) but 2 picture"),
        ("<image>", [], None, r"1 <image> mark\(s\) but 0 picture"),
        ("<image>", [0], [6], "counts 6 tiles but pixel_values has 7"),
        ("<IMG_CONTEXT>", [], None, "reserved token"),
    ],
)
def test_questions_that_do_not_fit_their_pictures(question, pictures, counts, message):
    reference = load_reference("qwen2")
    pixels = np.concatenate([tiles(i) for i in pictures]) if pictures else None
    with pytest.raises(PromptError, match=message):
        reference.model.chat(reference.tokenizer, pixels, question, GREEDY, num_patches_list=counts)
    if counts != [6]:
        with pytest.raises(PromptError, match="question 2: .*" + message):
            reference.model.batch_chat(
                reference.tokenizer, pixels, ["hi", question], GREEDY, num_patches_list=[[], counts or []]
            )


def test_a_prompt_longer_than_the_context():
    reference = load_reference("llama_vit6b")
    with pytest.raises(PromptError, match="the model's context is 4096: use fewer tiles"):
        reference.model.chat(reference.tokenizer, None, "panda " * 4096, GREEDY)


def test_models_and_tokenizers_that_do_not_belong_together():
    small, large = load_reference("qwen2"), load_reference("internlm2")
    with pytest.raises(ConfigError, match="beyond the model's vocabulary of 712"):
        small.model.chat(large.tokenizer, None, "hi", GREEDY)
    small.model.set_tokenizer(small.tokenizer)


@pytest.mark.parametrize("pixels, counts", [(None, None), (None, [0, 0]), (None, [[], [0]]), ([], None), ([None, None], None)])
def test_a_batch_without_pictures(pixels, counts):
    reference, questions = load_reference("qwen2"), ["Hello", "Who are you?"]
    alone = [reference.model.chat(reference.tokenizer, None, question, GREEDY) for question in questions]
    assert reference.model.batch_chat(reference.tokenizer, pixels, questions, GREEDY, counts) == alone


def test_an_empty_batch_has_no_answers():
    reference = load_reference("qwen2")
    assert reference.model.batch_chat(reference.tokenizer, None, [], GREEDY) == []
    with pytest.raises(PromptError, match="2 questions, 1 entries"):
        reference.model.batch_chat(reference.tokenizer, None, ["a", "b"], GREEDY, num_patches_list=[[]])


def test_a_checkpoint_saved_and_loaded_answers_the_same(tmp_path, reference):
    reference.model.save_pretrained(str(tmp_path), layout="paddle", max_shard_size="200KB")
    again = InternVLChatModel.from_pretrained(str(tmp_path), dtype="float32")
    chat = reference.expected["chats"][0]
    assert again.chat(reference.tokenizer, tiles(0), chat["question"], GREEDY) == chat["response"]


def test_a_tokenizer_without_image_tokens(tmp_path):
    reference = load_reference("qwen2")
    import json

    values = json.loads((reference.path / "tokenizer_config.json").read_text())
    values["added_tokens_decoder"] = {
        k: v for k, v in values["added_tokens_decoder"].items() if v["content"] != "<IMG_CONTEXT>"
    }
    values["additional_special_tokens"].remove("<IMG_CONTEXT>")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(values))
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((reference.path / name).read_bytes())
    with pytest.raises(TokenizerError, match="<IMG_CONTEXT>"):
        reference.model.chat(load_tokenizer(str(tmp_path)), None, "hi", GREEDY)
