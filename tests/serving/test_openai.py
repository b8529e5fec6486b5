"""OpenAI's own client, as its users call it."""

import base64

import pytest

pytest.importorskip("fastapi")
openai = pytest.importorskip("openai")
from .helpers import SCENE, picture, serving  # noqa: E402


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    key = tmp_path_factory.mktemp("key") / "key"
    key.write_text("right")
    with serving("--api_key_file", str(key), "--max_num_seqs", "1", "--max_queue", "1") as (base, _):
        yield base


@pytest.fixture
def client(url):
    return openai.OpenAI(base_url=url, api_key="right", max_retries=0)


def question(text, *parts):
    return {"model": "demo_model", "messages": [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]}


def test_answers_streams_and_models(client):
    assert [model.id for model in client.models.list()] == ["demo_model"] and client.models.retrieve("demo_model").id
    whole = client.chat.completions.create(**question("What color is the star?", picture()), temperature=0, logprobs=True)
    choice = whole.choices[0]
    assert choice.message.content == "blue" and choice.finish_reason == "stop" and choice.message.role == "assistant"
    assert (
        len(choice.logprobs.content) > 0
        and whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    )
    assert bytes(byte for token in choice.logprobs.content for byte in token.bytes).decode().strip() == "blue"
    url = f"data:image/png;base64,{base64.b64encode(SCENE.read_bytes()).decode()}"
    part = {"type": "image_url", "image_url": {"url": url, "detail": "low"}}
    options = {"stream": True, "stream_options": {"include_usage": True}, "temperature": 0}
    chunks = list(client.chat.completions.create(**question("What color is the star?", part), **options))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "blue"
    assert chunks[-1].usage.completion_tokens > 0 and len({chunk.id for chunk in chunks}) == 1


def test_a_form_as_a_pydantic_model(client):
    import pydantic

    class Star(pydantic.BaseModel):
        model_config = pydantic.ConfigDict(extra="forbid")
        seen: bool

    parsed = client.chat.completions.parse(**question("Is there a star?", picture()), response_format=Star, temperature=0)
    assert isinstance(parsed.choices[0].message.parsed, Star)


def test_errors_are_its_own_classes(client, url):
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(**question("Hi"), temperature=3)
    assert refused.value.param == "temperature" and refused.value.type == "invalid_request_error"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(**{**question("Hi"), "model": "other"})
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=url, api_key="wrong", max_retries=0).models.list()
    endless = {**question("Hi"), "stream": True, "extra_body": {"ignore_eos": True}}
    with client.chat.completions.create(**endless) as running:
        assert len([chunk for chunk, _ in zip(running, range(3))]) == 3  # the first of which came before it ran
        with client.chat.completions.create(**endless), pytest.raises(openai.RateLimitError):
            client.chat.completions.create(**question("Hi"))
