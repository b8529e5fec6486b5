"""Who the model is told to be: argument, model.system_message, config and template, in this order."""

import pytest

from paddlemix.models.internvl2 import ChatSession
from tests.conftest import load_reference


@pytest.fixture
def reference():
    found = load_reference("qwen2")
    yield found
    del found.model.system_message  # what is left is the class's None


@pytest.mark.parametrize("message", ["You are a pirate.", ""])
def test_a_models_message_rules_chat_batch_and_sessions(reference, message):
    model, tokenizer, options = reference.model, reference.tokenizer, {"max_new_tokens": 6}
    said = ChatSession(model, tokenizer, system_message=message).ask("Who are you?", None, options)
    default = model.chat(tokenizer, None, "Who are you?", options)
    assert said != default
    session = ChatSession(model, tokenizer)
    model.system_message = message
    assert model.chat(tokenizer, None, "Who are you?", options) == said
    assert model.batch_chat(tokenizer, None, ["Who are you?"], options) == [said]
    assert session.ask("Who are you?", None, options) == said
    argument = ChatSession(model, tokenizer, system_message=model.template().system_message)
    assert argument.ask("Who are you?", None, options) == default


def test_a_message_set_between_rounds_rules_the_next_prompt(reference):
    model, tokenizer, options = reference.model, reference.tokenizer, {"max_new_tokens": 6}
    session = ChatSession(model, tokenizer)
    session.ask("Who are you?", None, options)
    history = list(session.history)
    model.system_message = "You are a pirate."
    answer = session.ask("Who?", None, options)
    assert answer == ChatSession(model, tokenizer, history=history).ask("Who?", None, options)
    assert session.cached_tokens < 10  # the beginning of the template alone is the same
