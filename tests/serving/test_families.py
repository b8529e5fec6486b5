"""What the server answers with models whose prompts, windows or answers differ: what chat answers."""

import pytest

pytest.importorskip("fastapi")
from tests.conftest import REFERENCE

from .helpers import answer, picture, serving

FOLDER = REFERENCE / "internvl3"


@pytest.mark.parametrize("family", ["flash", "gpt_oss"])
def test_answers_are_those_of_chat(family):
    from paddlemix.models.internvl2 import ChatSession, InternVLChatModel, load_tokenizer
    from paddlemix.processors.image import load_image

    folder = str(FOLDER / family / "checkpoint")
    model, tokenizer = InternVLChatModel.from_pretrained(folder), load_tokenizer(folder)
    config = model.config
    images = [REFERENCE / "images" / f"img{i}.png" for i in range(3)]

    def asked(question, *numbers):
        pixels = [load_image(str(images[i]), input_size=config.image_size, max_num=config.max_dynamic_patch) for i in numbers]
        session = ChatSession(model, tokenizer)
        said = session.ask(question, pixels or None, {"max_new_tokens": 24, "do_sample": False})
        return said, session.reasoning, len(session._ids)

    with serving("--model_name_or_path", folder) as (url, _):
        for question, numbers, said in (
            ("Hello, who are you? Tell me more than that.", [], "Hello, who are you? Tell me more than that."),
            ("What is it?", [0], "<image>\nWhat is it?"),
            ("Where?", [0], "<image>\nWhere?"),  # from what was kept of the first
            ("Compare.", [0, 2], "Image-1: <image>\nImage-2: <image>\nCompare."),
        ):
            found = answer(url, question, *(picture(images[i].read_bytes()) for i in numbers), max_tokens=24)
            expected, thought, tokens = asked(said, *numbers)
            message = found["choices"][0]["message"]
            assert message["content"] == expected
            assert (message.get("reasoning") or "") == thought
            assert found["usage"]["total_tokens"] - tokens in (0, 1)  # the last token need not be computed
        assert found["usage"]["prompt_tokens_details"]["cached_tokens"] >= 0
