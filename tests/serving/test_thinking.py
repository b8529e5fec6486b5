"""Thoughts apart from answers, over HTTP."""

import json

import pytest

pytest.importorskip("fastapi")
from .helpers import ROOT, answer, ask, messages, serving

FOLDER = str(ROOT / "tests" / "data" / "reference" / "internvl3" / "qwen3" / "checkpoint")
THINK = {"chat_template_kwargs": {"enable_thinking": True}}


def test_thoughts_are_those_of_chat_whole_and_streamed():
    from paddlemix.models.internvl2 import ChatSession, InternVLChatModel, load_tokenizer

    model, tokenizer = InternVLChatModel.from_pretrained(FOLDER), load_tokenizer(FOLDER)
    session = ChatSession(model, tokenizer, thinking=True)
    said = session.ask("Hello", None, {"max_new_tokens": 12, "do_sample": False})
    with serving("--model_name_or_path", FOLDER) as (url, _):
        message = answer(url, "Hello", max_tokens=12, **THINK)["choices"][0]["message"]
        assert message["content"] == said
        assert (message["reasoning"] or "") == (message["reasoning_content"] or "") == session.reasoning != ""
        assert "reasoning" not in answer(url, "Hello", max_tokens=2)["choices"][0]["message"]
        body = {"messages": messages("Hello"), "temperature": 0, "max_tokens": 12, "stream": True, **THINK}
        events = [json.loads(line[6:]) for line in ask(url, body)[2].split("\n\n")[:-2] if line.startswith("data: {")]
        deltas = [event["choices"][0]["delta"] for event in events]
        for name, text in (("reasoning", session.reasoning), ("reasoning_content", session.reasoning), ("content", said)):
            assert "".join(delta.get(name) or "" for delta in deltas) == text
        turns = [*messages("Hello"), {"role": "assistant", "content": "Hi"}, *messages("And?")]
        counts = []
        for more in ({}, {"reasoning": "a greeting"}, {"reasoning_content": "a greeting"}):
            turns[1] = {"role": "assistant", "content": "Hi", **more}
            body = {"messages": turns, "max_tokens": 1}
            counts.append(json.loads(ask(url, body)[2])["usage"]["prompt_tokens"])
        assert counts[0] < counts[1] == counts[2]
