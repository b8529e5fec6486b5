"""Records in messages form are read as those in the form of conversations."""

import json

import pytest

from paddlemix.datasets.records import parse_record
from paddlemix.errors import DataError


def read(**record):
    return parse_record(json.dumps(record, ensure_ascii=False).encode(), "root")


USER, ASSISTANT = {"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "This."}
TURNS = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "This."}]


@pytest.mark.parametrize(
    "messages, conversations",
    [
        (
            dict(messages=[{"role": "system", "content": "Be brief."}, USER, ASSISTANT], images=["a.png"]),
            dict(conversations=[{"from": "system", "value": "Be brief."}, *TURNS], image="a.png"),
        ),
        (
            dict(
                messages=[
                    {
                        "role": "user",
                        "content": [{"type": "image"}, {"type": "text", "text": "Wh"}, {"type": "text", "text": "at?"}],
                    },
                    ASSISTANT,
                ],
                images="a.png",
            ),
            dict(conversations=TURNS, image="a.png"),
        ),
        (
            dict(messages=[{"role": "user", "content": [{"type": "image", "image": "a.png"}, "What?"]}, ASSISTANT]),
            dict(conversations=TURNS, image="a.png"),
        ),
        (
            dict(messages=[{"role": "user", "content": "What?"}, ASSISTANT], images=["a.png"], width=3, height=4),
            dict(conversations=[{"from": "human", "value": "What?"}, TURNS[1]], image="a.png", width=3, height=4),
        ),
        (
            dict(messages=[{"role": "user", "content": "<video>What?"}, ASSISTANT], videos=["a.mp4"]),
            dict(conversations=[{"from": "human", "value": "<video>What?"}, TURNS[1]], video="a.mp4"),
        ),
        (
            dict(messages=[{"role": "user", "content": "Hi"}, ASSISTANT], images=[], videos=[]),
            dict(conversations=[{"from": "human", "value": "Hi"}, TURNS[1]]),
        ),
    ],
)
def test_both_forms_are_the_same_record(messages, conversations):
    assert read(**messages) == read(**conversations)


@pytest.mark.parametrize(
    "record, told",
    [
        (dict(messages=[USER, ASSISTANT], images=["a.png"], conversations=TURNS), "both 'messages' and 'conversations'"),
        (dict(messages=[USER, ASSISTANT], image="a.png"), "both 'messages' and 'image'"),
        (dict(messages=[USER, ASSISTANT]), "1 <image> mark"),
        (dict(messages=[USER], images=["a.png"]), "no answer to learn"),
        (dict(messages=[USER, ASSISTANT], images=["a.png"], videos=["b.mp4"]), "'image' and 'video'"),
        (dict(messages=[{"role": "user", "content": "Hi"}, ASSISTANT], videos=["a.mp4", "b.mp4"]), "has 2 videos"),
        (dict(messages=[{"role": "tool", "content": "Hi"}, ASSISTANT]), "message 1 must have 'role'"),
        (dict(messages=[{"role": ["user"], "content": "Hi"}]), "message 1 must have 'role'"),
        (dict(messages=["Hi"]), "message 1 must have 'role'"),
        (dict(messages=[]), "needs 'messages'"),
        (dict(messages=[{"role": "user", "content": None}, ASSISTANT]), "message 1 needs 'content'"),
        (dict(messages=[{"role": "user", "content": [{"type": "audio"}]}, ASSISTANT]), "not of type text, image or video"),
        (dict(messages=[{"role": "user", "content": [7]}, ASSISTANT]), "not of type text, image or video"),
        (dict(messages=[USER, ASSISTANT], images=[{"path": "a.png"}]), "'images' must be a list of paths"),
    ],
)
def test_messages_that_are_none_are_refused(record, told):
    with pytest.raises(DataError, match=told):
        read(**record)
