"""What docs/serving.md promises of keys, logs, limits and places that pictures come from, each by what a client sees."""

import base64
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

pytest.importorskip("fastapi")
from .helpers import ROOT, SCENE, answer, ask, messages, picture, serving
from .test_soak import pictures, resident

SECRET = "wichtiges-geheimnis"


def content(reply):
    return reply["choices"][0]["message"]["content"]


def refused(reply, status):
    """The error of an answer that must be one of the promised form."""
    found, _, text = reply
    assert found == status, text
    error = json.loads(text)["error"]
    assert set(error) == {"message", "type", "param", "code"} and "\n" not in error["message"] and "Traceback" not in text
    return error["message"]


@pytest.fixture
def start():
    """A function that starts a server and gives (process, base URL); both outputs are pipes."""
    started = []

    def begun(*flags, **env):
        command = [sys.executable, "-m", "paddlemix.serving", "--port", "0", *flags]
        env = {**os.environ, "PYTHONPATH": str(ROOT), **env}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
        started.append(process)
        line = process.stdout.readline()
        assert line.startswith("ready: http://"), line + process.stderr.read()
        return process, line.split()[1]

    yield begun
    for process in started:
        process.kill()
        process.communicate()


def connect(url):
    host, port = url.removeprefix("http://").removesuffix("/v1").split(":")
    return socket.create_connection((host, int(port)), timeout=60)


def begin(url, **fields):
    """A connection on which an endless answer is being made."""
    connection = connect(url)
    body = json.dumps({"messages": messages("Hi"), "ignore_eos": True, "temperature": 0, "stream": True, **fields}).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: "
    connection.sendall(f"{head}{len(body)}\r\n\r\n".encode() + body)
    received = b""
    while received.count(b"data:") < 1 + fields.get("n", 1):  # who speaks is told before anything is computed
        piece = connection.recv(65536)
        assert piece, received
        received += piece
    return connection


def test_logs_hold_neither_key_nor_prompt_nor_answer(start):
    process, url = start("--cpus", "0", "--threads", "1", "--host", "0.0.0.0", PADDLEMIX_API_KEY=SECRET)
    url = url.replace("0.0.0.0", "127.0.0.1")
    bearer = {"Authorization": f"Bearer {SECRET}"}
    replies = [ask(url, {"messages": messages("Hi"), "max_tokens": 1}, headers=bearer)]
    for path, method in (("/models", "GET"), ("/../openapi.json", "GET"), ("/../docs", "GET"), ("/none", "GET")):
        replies.append(ask(url, path=path, method=method))
        assert "API key" in refused(replies[-1], 401)
        replies.append(ask(url, path=path, headers={"Authorization": f"Bearer {SECRET}x"}))
        refused(replies[-1], 401)
    text = "kartoffelsalat"
    for body in ({"messages": messages(text), "max_tokens": 5}, {"messages": messages(f"{text}<IMG_CONTEXT>")}):
        replies.append(ask(url, body, headers=bearer))
    for raw in (f'{{"{text}'.encode(), f'{{"messages": "{text}"}}'.encode()):
        replies.append(ask(url, raw=raw, headers=bearer))
        refused(replies[-1], 400)
    replies.append(ask(url.removesuffix("/v1"), path="/health?" + text, headers={"Origin": "https://a.example"}))
    assert replies[-1][0] == 200 and "access-control-allow-origin" not in replies[-1][1]
    said = content(json.loads(ask(url, {"messages": messages(text), "max_tokens": 40, "ignore_eos": True}, headers=bearer)[2]))
    process.terminate()
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 0
    told = out + errors + "".join(str(reply[1]) + reply[2] for reply in replies)
    assert SECRET not in told and text not in errors and said.strip()[:20] not in errors
    bad = [line for line in errors.splitlines() if re.search(r": 4\d\d$", line)]
    assert "Traceback" not in errors and len(bad) <= 3  # a line each; that the key is missing is none
    assert "warning" not in errors and "cores: [0], threads: 1" in errors


@pytest.mark.slow
def test_one_warning_where_it_listens_to_all(start):
    process, _ = start("--host", "0.0.0.0")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and errors.count("warning: ") == 1 and "--api_key_file" in errors


@pytest.mark.slow
def test_a_full_queue_a_timeout_and_pings():
    with serving("--max_num_seqs", "1", "--max_queue", "2", "--request_timeout", "12") as (url, _):
        running = begin(url, n=16)
        waiting = {"messages": messages("Hi"), "temperature": 0, "ignore_eos": True, "n": 16}  # also when it runs in the end
        with ThreadPoolExecutor(2) as pool:
            whole = pool.submit(ask, url, waiting)
            stream = pool.submit(ask, url, {**waiting, "stream": True})
            for _ in range(200):
                waits = ask(url.removesuffix("/v1"), path="/metrics")[2]
                if 'num_requests_waiting{model_name="demo_model"} 2.0' in waits:
                    break
                time.sleep(0.05)
            found = ask(url, waiting)
            assert refused(found, 429) and int(found[1]["retry-after"]) > 0
            assert "too long" in refused(whole.result(), 504)
            status, _, text = stream.result()
        assert status == 200 and "\n\n: ping\n\n" in text and "[DONE]" not in text
        error = json.loads(text.rpartition("data: ")[2])["error"]
        assert error["type"] == "server_error" and error["code"] == "timeout"
        running.settimeout(60)
        received = b""
        while b'"error"' not in received and (piece := running.recv(1 << 20)):
            received = received[-5000:] + piece
        assert b'"code":"timeout"' in received
        running.close()
        assert content(answer(url, "Hi"))  # and everybody else is served again


@pytest.mark.slow
def test_without_a_queue_whoever_finds_a_place_is_answered():
    with serving("--max_num_seqs", "2", "--max_queue", "0") as (url, _):
        assert answer(url, "Hi", max_tokens=1) and answer(url, "Hi", n=4, max_tokens=1, temperature=1)
        with begin(url, n=2):
            refused(ask(url, {"messages": messages("Hi")}), 429)


@pytest.mark.slow
def test_term_lets_answers_end_and_lets_nobody_in(start):
    process, url = start("--shutdown_timeout", "200")
    running, received = begin(url, max_tokens=300), b""
    running.settimeout(300)  # tokens without a text come without a piece
    process.terminate()
    time.sleep(0.3)
    other = ask(url, {"messages": messages("Hi"), "max_tokens": 1})
    while piece := running.recv(1 << 20):
        received = received[-5000:] + piece
        if b"[DONE]" in received:
            break
    assert b'"finish_reason":"length"' in received and b'"error"' not in received
    refused(other, 503)
    running.close()
    process.communicate(timeout=60)
    assert process.returncode == 0


@pytest.mark.parametrize("again", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_what_has_not_ended_in_time_is_cut(start, again):
    process, url = start("--shutdown_timeout", "60" if again else "1")
    connection = begin(url, n=16)
    process.terminate()
    begun = time.monotonic()
    if again:
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
    received = b""
    while not again and (piece := connection.recv(1 << 20)):
        received = received[-5000:] + piece
    process.wait(30)
    assert time.monotonic() - begun < 15
    assert process.returncode not in (0, None) and (again or process.returncode == 1)
    assert again or b'"the server is ending"' in received
    connection.close()
    process.communicate()


@pytest.mark.slow
def test_bodies_are_limited_while_they_are_read():
    with serving("--max_body_mb", "0.5") as (url, _):
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        half = [connect(url) for _ in range(50)]  # these never say the rest
        for connection in half:
            connection.sendall(head + b'Content-Length: 500\r\n\r\n{"mess')
        with connect(url) as connection:  # announced
            connection.sendall(head + b"Content-Length: 99999999\r\n\r\n" + b" " * 1000)
            assert connection.recv(65536).startswith((b"HTTP/1.1 413 ", b"HTTP/1.1 400 "))
        with connect(url) as connection:  # without a length
            connection.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n")
            for _ in range(9):
                connection.sendall(b"10000\r\n" + b" " * 65536 + b"\r\n")
            connection.sendall(b"0\r\n\r\n")
            assert connection.recv(65536).startswith(b"HTTP/1.1 413 ")
        refused(ask(url, raw=b" " * 600_000), 413)
        begun = time.monotonic()
        assert answer(url, "Hi", max_tokens=1) and time.monotonic() - begun < 20
        for connection in half:
            connection.close()


class Pictures(BaseHTTPRequestHandler):
    """``/a.png``; ``/to/URL`` leads there; ``/head`` and ``/body`` come a byte at a time."""

    def do_GET(self):
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path[4:])
            self.end_headers()
        elif self.path == "/a.png":
            data = SCENE.read_bytes()
            self.wfile.write(b"HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n" % len(data) + data)
        else:
            self.wfile.write(b"" if self.path == "/head" else b"HTTP/1.0 200 OK\r\n\r\n")
            try:
                while True:
                    self.wfile.write(b"X")
                    time.sleep(0.2)
            except OSError:
                pass

    def log_message(self, *arguments):
        pass


@pytest.fixture
def host():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Pictures)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_pictures_come_only_from_where_they_may(host, tmp_path):
    inside, outside = tmp_path / "in", tmp_path / "out.png"
    inside.mkdir()
    for path in (inside / "a.png", outside):
        path.write_bytes(SCENE.read_bytes())
    (inside / "link.png").symlink_to(outside)
    os.mkfifo(inside / "pipe.png")
    question = "What color is the star?"

    def at(url):
        return {"type": "image_url", "image_url": {"url": url}}

    local = ("--allowed_local_media_path", str(inside), "--media_timeout", "2")
    with serving("--allowed_media_domains", "127.0.0.1", *local) as (url, _):
        message = refused(ask(url, {"messages": messages("x", at(f"{host}/a.png"))}), 400)
        assert "private" in message  # it is not said that they may have such addresses
        for name in ("link.png", "pipe.png", "../out.png", "none.png", ""):
            refused(ask(url, {"messages": messages("x", at(f"file://{inside}/{name}"))}), 400)
        assert content(answer(url, question, at(f"file://{inside}/a.png"))) == content(answer(url, question, picture()))
    flags = ("--allowed_media_domains", "127.0.0.1", "--allow_private_media", "--media_timeout", "2")
    with serving(*flags) as (url, _):
        expected = content(answer(url, question, picture()))
        assert content(answer(url, question, at(f"{host}/a.png"))) == expected
        assert content(answer(url, question, at(f"{host}/to//a.png"))) == expected
        port = host.rpartition(":")[2]
        for place in (
            f"http://localhost:{port}/a.png",
            f"{host}/to/http://localhost:{port}/a.png",
            f"{host}/to/file:///etc/passwd",
        ):
            assert "not allowed" in refused(ask(url, {"messages": messages("x", at(place))}), 400)
        for slow in ("/head", "/body"):
            begun = time.monotonic()
            assert "too long" in refused(ask(url, {"messages": messages("x", at(host + slow))}), 400)
            assert time.monotonic() - begun < 8


def test_clips_are_looked_at_and_leave_nothing(tmp_path):
    clip = (SCENE.parent / "clip.mp4").read_bytes()
    url = f"data:video/mp4;base64,{base64.b64encode(clip).decode()}"
    with serving("--num_segments", "4", "--max_images", "4", env={"TMPDIR": str(tmp_path)}) as (base, _):
        part = {"type": "video_url", "video_url": {"url": url}}
        reply = answer(base, "What moves?", part, max_tokens=8)
        from paddlemix.processors.internvl2.video import load_video

        from paddlemix.models.internvl2 import InternVLChatModel, load_tokenizer

        folder = str(ROOT / "paddlemix" / "demo_model")
        model, tokenizer = InternVLChatModel.from_pretrained(folder), load_tokenizer(folder)
        pixels, counts = load_video(str(SCENE.parent / "clip.mp4"), input_size=model.config.image_size, num_segments=4)
        marks = "".join(f"Frame{i + 1}: <image>\n" for i in range(len(counts)))
        expected = model.chat(tokenizer, pixels, f"{marks}What moves?", {"max_new_tokens": 8}, num_patches_list=counts)
        assert content(reply) == expected and len(counts) == 4
        for bad in ("data:video/mp4;base64,AAAA", url.replace("video/mp4", "image/png")):
            kind = "video_url" if bad.startswith("data:video") else "image_url"
            refused(ask(base, {"messages": messages("x", {"type": kind, kind: {"url": bad}})}), 400)
        assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.slow
def test_many_pictures_and_a_bomb_leave_no_memory():
    from .test_api import bomb

    different = pictures()
    with serving("--image_cache_mb", "4", "--kv_cache_gb", "0.05") as (url, process):

        def one(_=None):
            data = next(different)
            return answer(url, "What is it?", picture(data), max_tokens=1)

        for _ in range(20):
            one()
        before = resident(process.pid)
        for _ in range(5):
            assert "pixels" in refused(ask(url, {"messages": messages("x", picture(bomb()))}), 400)
        assert resident(process.pid) - before < 60
        for _ in range(300):
            one()
        assert resident(process.pid) - before < 60
