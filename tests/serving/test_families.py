"""Every family answers through the server, and in files, as the originals do; models of vectors give these."""

import base64
import json
import shutil

import numpy as np
import pytest

pytest.importorskip("fastapi")
from paddlemix.models.internvl.embedder import unit
from tests.conftest import PICTURE_TOLERANCE, REFERENCE, assert_close

from .helpers import answer, ask, messages, picture, serving
from .test_batch import batch, lines, write

IMAGES, FOLDER = REFERENCE / "images", REFERENCE / "internvl3"


def part(number):
    return picture((IMAGES / f"img{number}.png").read_bytes())


def expected(folder):
    return json.loads((REFERENCE / folder / "expected.json").read_text(encoding="utf-8"))


def content(reply):
    return reply["choices"][0]["message"]["content"]


def test_tiles_of_flash_models_are_routed():
    reference = expected("internvl3/flash")
    folder = str(REFERENCE / "internvl3" / "flash" / "checkpoint")
    with serving("--model_name_or_path", folder, "--max_num", str(reference["max_num"])) as (url, _):
        for chat in reference["chats"] * 2:  # the second time features are there
            counts = chat["num_patches_list"] or []
            parts = [part(number) for number in range(len(counts))]
            for one in parts if len(counts) > 2 else ():  # frames
                one["image_url"]["detail"] = "low"
            texts = [text for turn in chat["history"] or [] for text in turn] + [chat["question"]]
            asked = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
            asked[0]["content"] = [*parts, {"type": "text", "text": texts[0]}]
            status, _, text = ask(url, {"messages": asked, "temperature": 0, "max_tokens": len(chat["output_ids"])})
            reply = json.loads(text)
            assert status == 200 and content(reply) == chat["response"], chat["label"]


@pytest.mark.parametrize("family", ["flash", pytest.param("gpt_oss", marks=pytest.mark.slow)])
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


@pytest.fixture
def minimonkey(tmp_path):
    """(folder of a checkpoint that says that it is Mini-Monkey's, its reference)."""
    reference = expected("minimonkey")
    shutil.copytree(REFERENCE / "internlm2" / "checkpoint", tmp_path / "monkey")
    values = json.loads((tmp_path / "monkey" / "config.json").read_text())
    values |= {"template": reference["template"], "architectures": ["MiniMonkeyChatModel"]}
    (tmp_path / "monkey" / "config.json").write_text(json.dumps(values))
    return tmp_path / "monkey", reference


def test_mini_monkey_drops_tokens_and_shares_none_of_their_keys(minimonkey):
    folder, reference = minimonkey
    question = "Read the all text in the image."
    with serving("--model_name_or_path", str(folder)) as (url, _):
        for chat in [chat for chat in reference["chats"] if chat["scm"]] * 2:
            reply = answer(url, question, part(chat["picture"]), max_tokens=len(chat["output_ids"]))
            assert content(reply) == chat["response"]
            assert reply["usage"]["prompt_tokens"] == chat["kept_tokens"]
            assert reply["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        metrics = ask(url.removesuffix("/v1"), path="/metrics")[2]
        assert 'image_cache_hits_total{model_name="monkey"} 4.0' in metrics
        status, _, text = ask(url, {"messages": messages("x", part(0), part(1))})
        assert status == 400 and "Mini-Monkey looks at one" in text
        story = "Tell me more, please. " * 8  # what has no picture is kept
        answer(url, story, max_tokens=2)
        assert answer(url, story, max_tokens=2)["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


@pytest.mark.slow
def test_mini_monkey_in_a_file(minimonkey, tmp_path):
    folder, reference = minimonkey
    for flags, scm in (((), True), (("--no_scm",), False)):
        chats = [chat for chat in reference["chats"] if chat["scm"] == scm]
        rows = [
            {"id": i, "image": str(IMAGES / f"img{chat['picture']}.png"), "text": "Read the all text in the image."}
            for i, chat in enumerate(chats)
        ]
        rows = [{**row, "max_tokens": len(chat["output_ids"])} for row, chat in zip(rows, chats)]
        out = tmp_path / f"{scm}.jsonl"
        batch(write(tmp_path / "rows.jsonl", rows), out, "--model_name_or_path", folder, *flags)
        assert [line["answer"] for line in lines(out)] == [chat["response"] for chat in chats]


def test_llava_answers_as_its_worker_did():
    reference = expected("internvl_llava")
    folder = REFERENCE / "internvl_llava" / "pretrained" / reference["chat"]
    chats = [chat for chat in reference["chats"] if chat["template"] == "vicuna_v1" and chat["aspect"] == "pad"]
    with serving("--model_name_or_path", str(folder)) as (url, _):
        for chat in chats:
            if chat["stop"]:
                continue
            left, asked = [part(number) for number in chat["pictures"]], []
            for i, text in enumerate(chat["messages"]):
                own, left = left[: text.count("<image>")], left[text.count("<image>") :]
                role = ("user", "assistant")[i % 2]
                asked.append({"role": role, "content": [*own, {"type": "text", "text": text}] if own else text})
            status, _, text = ask(url, {"messages": asked, "temperature": 0, "max_tokens": chat["max_new_tokens"]})
            assert status == 200 and content(json.loads(text)) == chat["text"], (chat["label"], text)
        clip = {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}}
        assert ask(url, {"messages": messages("x", clip)})[0] == 400
        assert ask(url, {"input": "x"}, path="/embeddings")[0] == 400
    assert len(chats) > 4


def test_vectors_of_texts_and_pictures():
    reference = expected("internvl_14b")
    arrays = np.load(REFERENCE / "internvl_14b" / "expected.npz")
    folder = str(REFERENCE / "internvl_14b" / "checkpoint")
    with serving("--model_name_or_path", folder, "--served_model_name", "c") as (
        url,
        _,
    ):

        def vectors(value, **fields):
            status, _, text = ask(url, {"model": "c", "input": value, **fields}, path="/embeddings")
            assert status == 200, text
            reply = json.loads(text)
            assert [one["index"] for one in reply["data"]] == list(range(len(reply["data"])))
            assert reply["usage"]["prompt_tokens"] == reply["usage"]["total_tokens"]
            return [one["embedding"] for one in reply["data"]]

        texts = vectors(reference["texts"])
        assert_close(np.array(texts), unit(arrays["text"]))
        seen = [part(number) for number in range(4)]
        found = vectors([*seen, reference["texts"][0]])
        assert_close(np.array(found[:4]), unit(arrays["image_c"]), PICTURE_TOLERANCE)
        assert_close(np.array(found[4]), np.array(texts[0]))
        url_alone = seen[0]["image_url"]["url"]
        assert_close(np.array(vectors(url_alone)[0]), np.array(found[0]), 1e-5)
        packed = np.frombuffer(base64.b64decode(vectors(url_alone, encoding_format="base64")[0]), "<f4")
        assert_close(packed, np.array(found[0]), 1e-5)
        for body in ({"input": []}, {"input": [1, 2]}, {}, {"input": "x", "dimensions": 7}):
            status, _, text = ask(url, body, path="/embeddings")
            assert status == 400 and set(json.loads(text)["error"]) == {"message", "type", "param", "code"}
        assert ask(url, {"input": "x", "model": "other"}, path="/embeddings")[0] == 404
        assert ask(url, {"input": picture(b"none")["image_url"]["url"]}, path="/embeddings")[0] == 400
        assert ask(url, {"messages": messages("Hi")})[0] == 400
        assert json.loads(ask(url, path="/models")[2])["data"][0]["id"] == "c"
        openai = pytest.importorskip("openai")
        client = openai.OpenAI(base_url=url, api_key="none")
        assert_close(
            np.array(client.embeddings.create(model="c", input="a dog").data[0].embedding), np.array(vectors("a dog")[0])
        )
