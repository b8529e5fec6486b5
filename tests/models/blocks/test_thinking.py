"""Answers of two parts are taken apart, in Qwen3's form and in channels."""

import pytest

from paddlemix.models.blocks.conversation import split_thought
from paddlemix.models.blocks.thinking import SYSTEM_MESSAGE, AnswerReader
from paddlemix.models.internvl2 import ChatSession, get_template
from tests.models.internvl2.test_internvl3 import load


def read(family, text):
    """(what is shown, what was thought, what the history keeps, whether the reader says that the answer is complete)."""
    reference = load(family)
    template = get_template(reference.model.config.template)
    reader, shown = AnswerReader(reference.tokenizer, template), ""
    for token in reference.tokenizer.encode(text):
        shown += reader.put(token)
        if reader.stopped:
            break
    shown += reader.close()
    return shown, reader.reasoning, reader.said, reader.stopped


@pytest.mark.parametrize(
    "text, shown, thought",
    [
        ("<think>\nadd them\n</think>\n\n4", "4", "add them"),
        ("add them\n</think>\n4\n", "4", "add them"),
        ("<think>\nstill add", "", "still add"),
        ("<think></think>4", "4", ""),
    ],
)
def test_thoughts_of_qwen3(text, shown, thought):
    assert read("qwen3", text) == (shown, thought, text.strip(), False)
    assert split_thought(text) == (thought, shown)


FINAL = "<|channel|>final<|message|>"
ANALYSIS = "<|channel|>analysis<|message|>"


@pytest.mark.parametrize(
    "text, shown, thought, kept, stopped",
    [
        (FINAL + "A cat.", "A cat.", "", FINAL + "A cat.", False),
        (FINAL + "A cat.<|end|>and on", "A cat.", "", FINAL + "A cat.", True),
        (
            f"{ANALYSIS}add them<|end|><|start|>assistant{FINAL}4",
            "4", "add them", f"{ANALYSIS}add them<|end|><|start|>assistant{FINAL}4", False,
        ),
        (ANALYSIS + "still", "", "still", ANALYSIS + "still", False),
        ("no channel at all", "no channel at all", "", "no channel at all", False),
    ],
)  # fmt: skip
def test_channels_of_gpt_oss(text, shown, thought, kept, stopped):
    assert read("gpt_oss", text) == (shown, thought, kept, stopped)


def test_the_system_message_is_the_cards():
    # Three paragraphs and a list, no newline at the end; the prompt has it in the template's place.
    assert SYSTEM_MESSAGE.count("\n") == 6 and not SYSTEM_MESSAGE.endswith("\n")
    assert SYSTEM_MESSAGE.startswith("You are an AI assistant that rigorously follows") and "  " not in SYSTEM_MESSAGE
    reference = load("qwen3")
    session = ChatSession(reference.model, reference.tokenizer, thinking=True)
    session.ask("Who?", None, {"max_new_tokens": 4, "seed": 1})
    prompt = reference.tokenizer.decode(session._ids)
    assert prompt.startswith(f"<|im_start|>system\n{SYSTEM_MESSAGE}<|im_end|>\n<|im_start|>user\nWho?<|im_end|>")
    assert session.answers == [""] and session.reasoning.strip()  # a random model never ends its thought
