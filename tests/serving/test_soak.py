"""Many requests of all kinds for SOAK_SECONDS: right answers, errors as promised, no leak, metrics that add up."""

import contextlib
import io
import json
import random
import re
import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("fastapi")
from .helpers import SCENE, ask, messages, picture, serving

TOTAL, CLIENTS = 10_000, 12
FLAGS = ("--max_body_mb", "1", "--max_queue", "64", "--image_cache_mb", "4", "--kv_cache_gb", "0.05")
BAD = [
    b"{",
    b"[]",
    b'{"messages": NaN}',
    b"\xff\xfe",
    b"[" * 50_000,
    *(
        json.dumps({"messages": messages("Hi"), **fields}).encode()
        for fields in (
            {"temperature": 9},
            {"messages": []},
            {"n": 99},
            {"tools": [{"type": "function"}]},
            {"stop": ["a"] * 5},
            {"guided_regex": "("},
            {"messages": messages("<IMG_CONTEXT>")},
            {"messages": messages("x", picture(b"no picture"))},
            {"messages": messages("x", {"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/x.png"}})},
            {"messages": messages("x", {"type": "image_url", "image_url": {"url": "data:image/png;base64,!!!"}})},
            {"messages": messages("word " * 5000)},
            {"logit_bias": {"x": 1}},
            {"messages": messages("\ud800")},
        )
    ),
]
HOSTILE = [
    b"\x00\x01\x02\x03" * 100,
    b"GET / HTTP/9.9\r\n\r\n",
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n{",
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"GET /v1/models HTTP/1.1\r\nHost: x\r\n" + b"X-A: " + b"a" * 200_000 + b"\r\n\r\n",
    b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n" * 20,
]


def pictures():
    """Data of pictures that differ, and none of which is seen twice by chance."""
    from PIL import Image

    scene = Image.open(SCENE).convert("RGB")
    for number in range(1 << 30):
        buffer = io.BytesIO()
        copy = scene.copy()
        copy.putpixel((number % copy.width, number // copy.width % copy.height), (number % 256, 7, 9))
        copy.save(buffer, "PNG")
        yield buffer.getvalue()


def good(kind, number):
    """The body of a good request, one of few so that its answer is known."""
    random_ = random.Random(number)
    body = {
        "messages": messages(f"Please tell me about this. {number}"),
        "max_tokens": random_.randint(1, 12),
        "ignore_eos": True,
    }
    if number % 3 == 0:
        body["messages"] = messages("What color is the star?", picture())
    if number % 4 == 1:
        body |= {"temperature": 1.4, "seed": -number, "top_p": 0.9}
    else:
        body |= {"temperature": 0}
    if number % 5 == 2:
        body = {**body, "guided_choice": ["red", "green", "blue"], "ignore_eos": False, "max_tokens": 20}
    if number % 7 == 3:
        body["n"] = 2
    if kind == "stream":
        body["stream"] = True
    return body


def text_of(body, text):
    """The texts of the choices of an answer, streamed or not."""
    texts = [""] * body.get("n", 1)
    if not body.get("stream"):
        return [choice["message"]["content"] for choice in json.loads(text)["choices"]]
    lines = [line[6:] for line in text.split("\n\n") if line.startswith("data: ")]
    assert lines[-1] == "[DONE]", text[-200:]
    for event in map(json.loads, lines[:-1]):
        for choice in event["choices"]:
            texts[choice["index"]] += choice["delta"].get("content") or ""
    return texts


def raw(address, data, wait=0.0):
    """What a server sends to bytes that are pushed at it, up to its first pause."""
    received = b""
    with contextlib.suppress(OSError), socket.create_connection(address, timeout=5) as connection:
        connection.sendall(data)
        time.sleep(wait)
        connection.settimeout(1)
        received = connection.recv(65536)
    return received


def head(body, length=None):
    length = len(body) if length is None else length
    return (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
    ).encode()


def check_error(status, text):
    error = json.loads(text)["error"]
    assert set(error) == {"message", "type", "param", "code"} and 400 <= status < 600, text
    assert error["message"] and "\n" not in error["message"] and "Traceback" not in text


def resident(pid):
    """MB of memory of a process."""
    with open(f"/proc/{pid}/status") as file:
        return int(re.search(r"VmRSS:\s+(\d+)", file.read())[1]) / 1024


class Soak:
    """What was sent and what came back, by kind."""

    def __init__(self, url, process):
        host, port = url.removeprefix("http://").removesuffix("/v1").split(":")
        self.url, self.address, self.process = url, (host, int(port)), process
        self.sent, self.lock, self.wrong = Counter(), threading.Lock(), []
        self.different = pictures()
        self.known = {}
        for number in range(40):
            body = good("whole", number)
            status, _, text = ask(url, body)
            assert status == 200, text
            self.known[number] = text_of(body, text)
        self.metrics = self.read()

    def read(self):
        """Counters of ``/metrics``."""
        text = ask(self.url.removesuffix("/v1"), path="/metrics")[2]
        return {name: float(value) for name, value in re.findall(r"^paddlemix:(\S+) (\S+)$", text, re.MULTILINE)}

    def one(self, number):
        """Send request ``number``; its kind is drawn from its number."""
        draw = random.Random(number)
        kind = draw.choices(
            ("whole", "stream", "fresh", "bad", "cut", "slow", "hostile"), weights=(30, 20, 15, 20, 6, 2, 7)
        )[0]  # fmt: skip
        try:
            getattr(self, kind)(draw)
        except Exception as error:
            self.wrong.append(f"{number} {kind}: {type(error).__name__} {str(error)[:300]}")
        with self.lock:
            self.sent[kind] += 1

    def whole(self, draw, kind="whole"):
        number = draw.randrange(40)
        body = good(kind, number)
        status, _, text = ask(self.url, body)
        if self.accepted(status, text):
            found = text_of(body, text)
            assert found == self.known[number], (found, self.known[number])

    def accepted(self, status, text):
        """Whether a good request was answered; else it must have met a full queue."""
        with self.lock:
            self.sent["refused" if status == 429 else "answered"] += 1
        if status != 200:
            assert status == 429, text
            check_error(status, text)
        return status == 200

    def stream(self, draw):
        self.whole(draw, "stream")

    def fresh(self, draw):
        with self.lock:
            data = next(self.different)
        body = {"messages": messages("What is it?", picture(data)), "max_tokens": 2, "temperature": 0}
        status, _, text = ask(self.url, body)
        return self.accepted(status, text) and text_of(body, text)

    def bad(self, draw):
        status, _, text = ask(self.url, raw=draw.choice(BAD))
        assert status in (400, 429), status
        check_error(status, text)

    def cut(self, draw):
        body = json.dumps({"messages": messages("Hi"), "ignore_eos": True, "stream": draw.random() < 0.5}).encode()
        sent = head(body) + body[: draw.choice((0, 10, len(body), len(body)))]
        raw(self.address, sent, wait=draw.random() * 0.2)  # an answer of 4,000 tokens has not ended by then

    def slow(self, draw):
        body = json.dumps(good("whole", 1)).encode()
        with socket.create_connection(self.address, timeout=20) as connection:
            for piece in (head(body), body[:20], body[20:]):
                connection.sendall(piece)
                time.sleep(0.5)
            status = int(connection.recv(4096).split()[1])
            assert status in (200, 429)
            with self.lock:
                self.sent["refused" if status == 429 else "answered"] += 1

    def hostile(self, draw):
        received = raw(self.address, draw.choice(HOSTILE))
        assert b"Traceback" not in received
        assert not received or received.startswith(b"HTTP/1.1"), received[:100]


@pytest.mark.soak
def test_ten_thousand_requests(soak_seconds):
    with serving(*FLAGS) as (url, process):
        soak = Soak(url, process)
        began, done, memory = time.monotonic(), 0, []
        with ThreadPoolExecutor(CLIENTS) as pool:
            while done < TOTAL and time.monotonic() - began < soak_seconds:
                list(pool.map(soak.one, range(done, done + 250)))
                done += 250
                memory.append(resident(process.pid))
        for _ in range(100):
            after = soak.read()
            if not after['num_requests_running{model_name="demo_model"}']:
                break
            time.sleep(0.1)
        print(f"{done} requests in {time.monotonic() - began:.0f} s: {dict(soak.sent)}; MB: {[round(m) for m in memory]}")
        assert not soak.wrong, soak.wrong[:5]
        label = '{model_name="demo_model"}'
        assert after[f"num_requests_running{label}"] == after[f"num_requests_waiting{label}"] == 0
        assert after[f"kv_cache_usage_perc{label}"] == 0

        def counted(*reasons):
            names = [f'request_success_total{{finished_reason="{r}",model_name="demo_model"}}' for r in reasons]
            return sum(after[name] - soak.metrics[name] for name in names)

        assert counted("stop", "length") == soak.sent["answered"]
        assert counted("abort") <= soak.sent["cut"]
        latencies = f"e2e_request_latency_seconds_count{label}"
        assert after[latencies] - soak.metrics[latencies] == counted("stop", "length", "abort")
        assert max(memory[-3:]) - memory[min(3, len(memory) - 1)] < 60, memory  # after the first thousand
