"""Prompts and label masks."""

import pytest

from paddlemix.errors import PromptError
from paddlemix.models.internvl2 import encode_conversations, get_template
from paddlemix.models.internvl2.conversation import insert_image_tokens
from tests.conftest import load_reference


def test_prompts_equal_the_original(reference):
    template = get_template(reference.expected["template"])
    assert template.system_message == reference.expected["system_message"]
    for chat in reference.expected["chats"]:
        turns = [tuple(turn) for turn in chat["history"] or []]
        questions = insert_image_tokens([q for q, _ in turns] + [chat["question"]], [0] * len(chat["num_patches_list"]))
        prompt = template.prompt(questions[-1], [(q, a) for q, (_, a) in zip(questions, turns)])
        assert prompt == chat["prompt"], chat["label"]


def test_prompt_ids_equal_the_original(reference):
    template = get_template(reference.expected["template"])
    for chat in reference.expected["chats"]:
        turns = [tuple(turn) for turn in chat["history"] or []]
        counts = [n * reference.expected["num_image_token"] for n in chat["num_patches_list"]]
        questions = insert_image_tokens([q for q, _ in turns] + [chat["question"]], counts)
        prompt = template.prompt(questions[-1], [(q, a) for q, (_, a) in zip(questions, turns)])
        assert reference.tokenizer.encode(prompt) == chat["input_ids"], chat["label"]


def test_training_ids_and_labels_equal_the_original(reference):
    template = get_template(reference.expected["template"])
    for sample in reference.expected["train_samples"]:
        marked = any("<image>" in turn["value"] for turn in sample["conversations"])
        counts = [sample["num_tiles"] * reference.expected["num_image_token"]] if marked else []
        ids, labels = encode_conversations(sample["conversations"], reference.tokenizer, template, counts)
        assert ids == sample["input_ids"]
        assert labels == sample["labels"]


@pytest.mark.parametrize(
    "name, expected",
    [
        (
            "internvl2_5",
            "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\na1<|im_end|>\n"
            "<|im_start|>user\nq2<|im_end|>\n<|im_start|>assistant\n",
        ),
        ("internvl_zh", "S <human>: q1 <bot>: a1</s><human>: q2 <bot>:"),
    ],
)
def test_templates_without_reference_follow_their_published_form(name, expected):
    prompt = get_template(name).with_system_message("S").prompt("q2", [("q1", "a1")])
    assert prompt == expected


def test_internvl2_5_learns_the_answer_and_its_end_but_not_the_newline_after_it():
    tokenizer = load_reference("qwen2").tokenizer
    turns = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "one?"},
        {"from": "gpt", "value": "two"},
        {"from": "human", "value": "three?"},
        {"from": "gpt", "value": "four"},
    ]
    ids, labels = encode_conversations(turns, tokenizer, get_template("internvl2_5"))
    text = tokenizer.decode(ids)
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\none?")
    learned = [token for token, label in zip(ids, labels) if label >= 0]
    assert tokenizer.decode(learned) == "two<|im_end|>four<|im_end|>"
    assert all(label in (-100, token) for token, label in zip(ids, labels))


def test_answers_that_merge_with_the_header_are_still_learned():
    tokenizer = load_reference("qwen2").tokenizer
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "\nanswer"}]
    ids, labels = encode_conversations(turns, tokenizer, get_template("Hermes-2"))
    learned = tokenizer.decode([token for token, label in zip(ids, labels) if label >= 0])
    assert learned.lstrip("\n") == "answer<|im_end|>"


def test_a_leading_answer_is_dropped_and_a_trailing_question_too():
    tokenizer = load_reference("qwen2").tokenizer
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    plain = encode_conversations(turns, tokenizer, get_template("Hermes-2"))
    around = [{"from": "gpt", "value": "hello"}, *turns, {"from": "human", "value": "and?"}]
    assert encode_conversations(around, tokenizer, get_template("Hermes-2")) == plain


@pytest.mark.parametrize(
    "turns, counts, message",
    [
        ([("human", "q"), ("human", "q")], [], "turn 2 .* from 'human' where 'gpt'"),
        ([("human", "q")], [], "no answer"),
        ([("gpt", "a")], [], "no answer"),
        ([("human", "<image>\nq"), ("gpt", "a")], [], r"1 <image> mark\(s\) but 0 picture"),
        ([("human", "q"), ("gpt", "a")], [16], r"0 <image> mark\(s\) but 1 picture"),
        ([("human", "<IMG_CONTEXT>"), ("gpt", "a")], [], "reserved token <IMG_CONTEXT>"),
    ],
)
def test_samples_that_cannot_be_used_say_why(turns, counts, message):
    turns = [{"from": who, "value": text} for who, text in turns]
    with pytest.raises(PromptError, match=message):
        encode_conversations(turns, load_reference("qwen2").tokenizer, get_template("Hermes-2"), counts)


def test_unknown_template():
    with pytest.raises(PromptError, match="'vicuna_v1' is not known: use one of Hermes-2"):
        get_template("vicuna_v1")
