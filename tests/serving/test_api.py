"""The HTTP interface, from outside."""

import contextlib
import io
import json
import os
import socket
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

pytest.importorskip("fastapi")
from .helpers import ROOT, SCENE, answer, ask, messages, picture, serving

QUESTION = "What color is the star?"


@pytest.fixture(scope="module")
def url():
    with serving("--max_body_mb", "4", "--max_images", "3", "--image_cache_mb", "1") as (base, _):
        yield base


def content(reply):
    return reply["choices"][0]["message"]["content"]


def test_the_answer_is_that_of_chat(url):
    from paddlemix.examples.internvl2.chat_demo import load_pictures
    from paddlemix.models.internvl2 import InternVLChatModel, load_tokenizer

    folder = str(ROOT / "paddlemix" / "demo_model")
    model, tokenizer = InternVLChatModel.from_pretrained(folder), load_tokenizer(folder)
    _, pixels, _ = load_pictures([str(SCENE)], model.config)
    reply = answer(url, QUESTION, picture())
    assert content(reply) == model.chat(tokenizer, pixels, QUESTION)
    assert reply["choices"][0]["finish_reason"] == "stop" and reply["model"] == "demo_model"
    usage = reply["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_a_stream_says_the_same(url):
    body = {"messages": messages(QUESTION, picture()), "temperature": 0, "stream": True, "logprobs": True}
    status, headers, text = ask(url, {**body, "stream_options": {"include_usage": True}})
    assert status == 200 and headers["content-type"].startswith("text/event-stream")
    lines = [line[6:] for line in text.split("\n\n") if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    events = [json.loads(line) for line in lines[:-1]]
    assert len({(e["id"], e["created"]) for e in events}) == 1 and events[0]["choices"][0]["delta"]["role"] == "assistant"
    assert events[-1]["choices"] == [] and events[-1]["usage"]["completion_tokens"] > 0
    pieces = [e["choices"][0]["delta"].get("content", "") for e in events[:-1]]
    assert "".join(pieces) == content(answer(url, QUESTION, picture()))


def test_sixteen_at_once_get_what_each_gets_alone(url):
    fields = [{"temperature": 0} if i % 2 else {"temperature": 1.3, "seed": -i} for i in range(16)]

    def one(i):
        parts = [picture()] if i % 3 else []
        return content(answer(url, f"Please describe this. {i}", *parts, max_tokens=24, ignore_eos=True, **fields[i]))

    alone = [one(i) for i in range(16)]
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(one, range(16))) == alone


def test_choices_stop_penalties_and_forms(url):
    reply = answer(url, "Hi", n=3, seed=1, temperature=2, max_tokens=8, ignore_eos=True)
    texts = [choice["message"]["content"] for choice in reply["choices"]]
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2] and len(set(texts)) > 1
    assert reply["usage"]["completion_tokens"] == 24
    whole = content(answer(url, QUESTION, picture(), max_tokens=6, ignore_eos=True, skip_special_tokens=False))
    cut = answer(url, QUESTION, picture(), stop=[whole[2:4]])
    assert content(cut) == whole[:2].strip() and cut["choices"][0]["finish_reason"] == "stop"
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    assert set(json.loads(content(answer(url, "Hi", response_format=form)))) == {"a"}
    assert content(answer(url, "Hi", guided_choice=["red", "green"])) in ("red", "green")
    logprobs = answer(url, QUESTION, picture(), logprobs=True, top_logprobs=2)["choices"][0]["logprobs"]["content"]
    assert all(entry["token"] == entry["top_logprobs"][0]["token"] and entry["logprob"] <= 0 for entry in logprobs)


def test_rounds_and_pictures_are_not_computed_twice(url):
    story = "Tell me about this, please. " * 6
    answer(url, story, picture())
    assert answer(url, story, picture())["usage"]["prompt_tokens_details"]["cached_tokens"] > 16


BAD = [
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "assistant", "content": "x"}]}, "messages"),
    ({"messages": messages("<IMG_CONTEXT>")}, "messages"),
    ({"messages": messages("<image> <image>", picture())}, "messages"),
    ({"messages": messages("x", *[picture()] * 4)}, "messages"),
    ({"messages": messages("x", picture(b"<svg/>"))}, "messages"),
    ({"messages": messages("x", {"type": "image_url", "image_url": {"url": "http://127.0.0.1/x.png"}})}, "messages"),
    ({"messages": messages("x", {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}})}, "messages"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": "1"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"n": 17}, "n"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"stop": ["a"] * 5}, "stop"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"logit_bias": {"9999999": 1}}, "logit_bias"),
    ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_choice"),
    ({"guided_regex": "("}, None),
]


@pytest.mark.parametrize("fields, param", BAD)
def test_bad_requests(url, fields, param):
    status, _, text = ask(url, {"messages": messages("Hi"), **fields})
    error = json.loads(text)["error"]
    assert status == 400 and error["param"] == param and error["type"] == "invalid_request_error"
    assert set(error) == {"message", "type", "param", "code"} and "\n" not in error["message"]


def test_what_is_no_request_and_other_paths(url):
    assert ask(url, raw=b'{"messages": NaN}')[0] == 400 and ask(url, raw=b"[" * 100_000)[0] == 400
    assert ask(url, raw=b"{}", headers={"Content-Type": "text/plain"})[0] == 415
    assert ask(url, raw=b" " * (5 << 20))[0] == 413
    assert ask(url, {"messages": messages("Hi"), "model": "other"})[0] == 404
    assert ask(url, path="/nothing")[0] == 404 and ask(url, path="/chat/completions")[0] == 405
    status, _, text = ask(url, {"messages": messages("word " * 5000)})
    error = json.loads(text)["error"]
    assert status == 400 and error["code"] == "context_length_exceeded" and "4096" in error["message"]
    assert ask(url, {"messages": messages("Hi"), "temperature": None, "unknown": {}, "max_tokens": 1})[0] == 200
    _, headers, _ = ask(url, path="/models", headers={"X-Request-Id": "mine"})
    assert headers["x-request-id"] == "mine"
    assert json.loads(ask(url, path="/models")[2])["data"][0]["id"] == "demo_model"


def bomb():
    """A PNG of 30,000 x 30,000 pixels, one bit each."""

    def chunk(kind, data):
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    side = (30000).to_bytes(4, "big")
    rows = zlib.compress(bytes(3751 * 30000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", side * 2 + bytes([1, 0, 0, 0, 0])) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_a_bomb_of_pixels(url):
    data = bomb()
    begun = time.monotonic()
    status, _, text = ask(url, {"messages": messages("x", picture(data))})
    assert status == 400 and "pixels" in text and time.monotonic() - begun < 10


def test_who_goes_away_leaves_the_engine(url):
    host, port = url.removeprefix("http://").removesuffix("/v1").split(":")
    body = json.dumps({"messages": messages("Hi"), "ignore_eos": True, "stream": True}).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}\r\n\r\n"
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + body)
        connection.recv(100)
    metrics = ""
    for _ in range(100):
        metrics = ask(url.removesuffix("/v1"), path="/metrics")[2]
        aborted = 'finished_reason="abort",model_name="demo_model"} 1' in metrics
        if aborted and 'num_requests_running{model_name="demo_model"} 0.0' in metrics:
            return
        time.sleep(0.1)
    raise AssertionError(metrics)


def test_the_key_guards_all_but_health_and_metrics(tmp_path):
    (tmp_path / "key").write_text("secret-key\n")
    with serving("--api_key_file", str(tmp_path / "key"), "--allowed_origins", "https://a.example") as (base, _):
        status, headers, text = ask(base, {"messages": messages("Hi")}, headers={"Authorization": "Bearer wrong"})
        assert status == 401 and headers["www-authenticate"] == "Bearer" and "secret" not in text
        bearer = {"Authorization": "Bearer secret-key"}
        assert ask(base, {"messages": messages("Hi"), "max_tokens": 2}, headers=bearer)[0] == 200
        root = base.removesuffix("/v1")
        assert ask(root, path="/health")[0] == ask(root, path="/metrics")[0] == 200
        preflight = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
        assert ask(base, headers=preflight, method="OPTIONS")[1]["access-control-allow-origin"] == "https://a.example"
        assert ask(base, headers={**preflight, "Origin": "https://b.example"}, method="OPTIONS")[0] == 400
        client = [sys.executable, "-m", "paddlemix.serving.cli", "--url", base, "--image_file", str(SCENE)]
        env = {**os.environ, "PADDLEMIX_API_KEY": "secret-key"}
        asked = subprocess.run(client, input=f"{QUESTION}\n\n", capture_output=True, text=True, env=env)
        assert asked.returncode == 0 and asked.stdout.strip(), asked.stderr


def test_what_is_wrong_at_the_start(tmp_path):
    taken = socket.socket()
    taken.bind(("127.0.0.1", 0))
    taken.listen()
    for flags in (
        ("--model_name_or_path", str(tmp_path / "none")),
        ("--port", str(taken.getsockname()[1])),
        ("--api_key_file", str(tmp_path / "none")),
        ("--load_8bit", "--load_4bit"),
        ("--lora_modules", f"a={tmp_path}"),
    ):
        command = [sys.executable, "-m", "paddlemix.serving", *(() if "--port" in flags else ("--port", "0")), *flags]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode in (1, 2) and "Traceback" not in done.stderr, done.stderr
        assert len([line for line in done.stderr.splitlines() if "usage" not in line and not line.startswith(" ")]) <= 6
    taken.close()


def test_media_rules(tmp_path):
    from paddlemix.models.internvl2 import InternVLChatConfig
    from paddlemix.serving.families import InternVL2
    from paddlemix.serving.media import Media, MediaRules
    from paddlemix.serving.protocol import RequestError

    inside, outside = tmp_path / "in", tmp_path / "out"
    inside.mkdir()
    outside.mkdir()
    from PIL import Image

    for folder in (inside, outside):
        Image.new("RGB", (40, 40)).save(folder / "x.png")
    (inside / "link.png").symlink_to(outside / "x.png")
    family = InternVL2(None, None)
    family.model = SimpleNamespace(config=InternVLChatConfig.from_pretrained(ROOT / "paddlemix" / "demo_model"))
    media = Media(family, MediaRules(local=str(inside), domains=("localhost",)))
    assert media.picture(f"file://{inside}/x.png")[1].shape[1:] == (3, 84, 84)
    assert len(media.picture(f"file://{inside}/x.png", "low")[1]) == 1
    for url in (f"file://{inside}/link.png", f"file://{outside}/x.png", f"file://{inside}/../out/x.png", f"file://{inside}"):
        with pytest.raises(RequestError):
            media.picture(url)
    for url in ("http://localhost/x.png", "http://example.org/x.png", "ftp://localhost/x", "data:text/plain;base64,eA=="):
        with pytest.raises(RequestError):
            media.picture(url)
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PPM")  # Pillow reads it, but it is none of the promised
    with pytest.raises(RequestError):
        media.picture(picture(buffer.getvalue())["image_url"]["url"])


def test_pictures_that_come_again_are_read_once(tmp_path):
    """By what is in them and what is asked of them, and in so much memory."""
    from PIL import Image

    from paddlemix.models.internvl2 import InternVLChatConfig
    from paddlemix.serving import media as rooms
    from paddlemix.serving.families import InternVL2

    reads = []

    class Family(InternVL2):
        most_tiles = 6

        def read(self, data, most, low):
            reads.append((most, low))
            return super().read(data, most, low)

    family = Family(None, None)
    config = InternVLChatConfig.from_pretrained(ROOT / "paddlemix" / "demo_model")
    config.max_dynamic_patch = 6
    family.model = SimpleNamespace(config=config)
    media, file = rooms.Media(family, rooms.MediaRules(local=str(tmp_path))), tmp_path / "x.png"
    Image.new("RGB", (80, 40), "red").save(file)
    red = media.picture(f"file://{file}")
    again = media.picture(f"file://{file}")
    assert len(reads) == 1 and again[0] == red[0] and (again[1] == red[1]).all()
    assert len(media.picture(f"file://{file}", "low")[1]) == 1 < len(red[1])
    Image.new("RGB", (80, 40), "blue").save(file)
    assert media.picture(f"file://{file}")[0] != red[0] and len(reads) == 3

    kept = rooms.Kept(10)
    for name, size in (("a", 4), ("b", 4), ("a", 5), ("large", 11)):
        kept.put(name, name, size)
    assert kept.get("b") == "b" and kept.get("a") == "a" and kept.get("large") is None
    kept.put("c", "c", 3)
    assert kept.get("b") is None and kept.get("a") == "a" and kept.get("c") == "c"
    kept.put("d", "d", 10)
    assert (kept.get("a"), kept.get("c"), kept.get("d")) == (None, None, "d")


@pytest.mark.slow
def test_heads_without_end_and_what_is_no_http(url):
    host, port = url.removeprefix("http://").removesuffix("/v1").split(":")

    def push(*pieces):
        with socket.create_connection((host, int(port)), timeout=20) as connection:
            with contextlib.suppress(OSError):  # closed before all of it was sent
                for piece in pieces:
                    connection.sendall(piece)
            try:
                return connection.recv(4096)
            except ConnectionResetError:
                return b"reset"

    begin, lines = b"GET /v1/models HTTP/1.1\r\nHost: x\r\n", [b"X-%d: 1\r\n" % i for i in range(300_000)]
    for pieces in ((begin, b"X-A: ", *[b"a" * 10**6] * 30), (begin, b"".join(lines)), (b"GET /", *[b"a" * 10**6] * 5)):
        begun = time.monotonic()
        received = push(*pieces)
        assert received == b"reset" or (b" 431 " in received and b'"error"' in received), received
        assert time.monotonic() - begun < 10
    received = push(b"\x16\x03\x01\x02\x00\x01")
    assert received.startswith(b"HTTP/1.1 400 ") and set(json.loads(received.partition(b"\r\n\r\n")[2])) == {"error"}
    waiting = [socket.create_connection((host, int(port)), timeout=20) for _ in range(300)]
    for connection in waiting:
        connection.sendall(begin)
    assert ask(url, path="/models")[0] == 200
    connection = waiting[0]
    connection.settimeout(40)
    assert connection.recv(4096).startswith(b"HTTP/1.1 408 ")
    for connection in waiting:
        connection.close()
    many = begin + b"\r\n"
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(many * 3000)  # more than a head may have, but of several requests
        received = b""
        while received.count(b"HTTP/1.1 200") < 3000:
            received += connection.recv(1 << 20)


@pytest.mark.slow
def test_a_log_that_nobody_reads_holds_up_nobody():
    command = [sys.executable, "-m", "paddlemix.serving", "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        url = process.stdout.readline().split()[1]
        host, port = url.removeprefix("http://").removesuffix("/v1").split(":")
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n[]"
        with socket.create_connection((host, int(port)), timeout=30) as connection:
            for _ in range(45):  # a line each; a pipe holds 64 KB
                connection.sendall(head * 50)
                received = b""
                while received.count(b'"error"') < 50:
                    received += connection.recv(1 << 20)
        assert ask(url, {"messages": messages("Hi"), "max_tokens": 1})[0] == 200
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        process.kill()
        process.communicate()
    assert process.returncode == 0
