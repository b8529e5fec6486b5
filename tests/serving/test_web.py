"""The web page in a real browser. Screenshots are kept in the folder SCREENSHOTS names, by default work_dirs/screenshots.

It runs where ``make web-install`` was run (or WEB_PYTHON names a Python with Gradio) and a Chromium is installed.
"""

import base64
import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from .helpers import ROOT, SCENE, serving

api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (pip install -r requirements-dev.txt)")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PYTHON = Path(os.environ.get("WEB_PYTHON") or Path(sys.prefix, "web", "bin", "python"))
SCREENSHOTS = Path(os.environ.get("SCREENSHOTS") or ROOT / "work_dirs" / "screenshots")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed (Debian, Ubuntu: apt install chromium)"),
    pytest.mark.skipif(not PYTHON.exists(), reason="the page's environment is not installed (make web-install)"),
]
ATTACK = (
    "<script>window.hurt=1</script><img src=x onerror='window.hurt=1'> ![x](http://192.0.2.1/a.png) "
    "`<img src=http://192.0.2.1/b>` [x](javascript:window.hurt=1) <iframe src='http://192.0.2.1/c'></iframe>"
    "<svg onload='window.hurt=1'></svg> ``` <b> "
    "<style>@import 'http://192.0.2.1/d'</style> $$\\href{javascript:window.hurt=1}{x}$$ <video src=http://192.0.2.1/e>"
)


class Stub(ThreadingHTTPServer):
    """An OpenAI-compatible server that says what each question asks it to say, and keeps what it was sent."""

    daemon_threads = True

    def __init__(self, owner="somebody"):
        super().__init__(("127.0.0.1", 0), StubHandler)
        self.owner, self.bodies, self.gone = owner, [], threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class StubHandler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def _send(self, status, value):
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        model = {"id": "m", "object": "model", "owned_by": self.server.owner, "created": 1}
        self._send(200, {"object": "list", "data": [model]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)
        content = body["messages"][-1]["content"]
        text = content if isinstance(content, str) else content[-1]["text"]
        if "refuse" in text:
            error = {"message": "the picture is <b>too</b> large", "type": "x", "param": None, "code": None}
            return self._send(400, {"error": error})
        pieces, pause = [text[5:] if text.startswith("say: ") else f"echo {text}"], 0
        if "slow" in text:
            pieces, pause = [f"word{i} " for i in range(200)], 0.05
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        with contextlib.suppress(OSError):
            for piece in pieces:
                choice = {"index": 0, "delta": {"content": piece}, "finish_reason": None}
                event = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}
                self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
                self.wfile.flush()
                time.sleep(pause)
            self.wfile.write(b"data: [DONE]\n\n")
            return None
        self.server.gone.set()
        return None


@contextlib.contextmanager
def web_page(url):
    """The address of a page that asks ``url``."""
    command = [str(PYTHON), "-m", "paddlemix.serving.web", "--url", url, "--port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        line = process.stdout.readline()
        assert line.startswith("ready: http://127.0.0.1:"), line + process.stderr.read()
        yield line.split()[1]
    finally:
        process.terminate()
        _, errors = process.communicate(timeout=30)
    assert process.returncode in (0, -15) and "Traceback" not in errors, errors


@pytest.fixture(scope="module")
def stub():
    server = Stub("paddlemix")
    yield server
    server.shutdown()


@pytest.fixture(scope="module")
def address(stub):
    with web_page(stub.url) as found:
        yield found


@pytest.fixture(scope="module")
def browser():
    with api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield started
        started.close()


class Tab:
    """A tab of the page, and the little that the tests do with it; nothing but the page's own host can be reached."""

    def __init__(self, browser, address, **options):
        self.context = browser.new_context(**options)
        self.page, self.elsewhere, self.faults = self.context.new_page(), [], []
        self.page.route("**/*", lambda route: self._route(route, address))
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.goto(address)
        self.page.wait_for_selector("#question textarea")
        self.page.wait_for_timeout(300)

    def _route(self, route, address):
        if route.request.url.startswith((address, "data:", "blob:")):
            return route.continue_()
        self.elsewhere.append(route.request.url)
        return route.abort()

    def attach(self, path):
        self.page.set_input_files("#question input[type=file]", str(path))
        self.page.wait_for_selector("#question [class*=thumbnail] img")
        self.page.wait_for_timeout(500)

    def ask(self, text):
        self.page.fill("#question textarea", text)
        self.page.press("#question textarea", "Enter")

    @property
    def written(self):
        return self.page.input_value("#question textarea")

    def sees(self, text, seconds=20):
        self.page.wait_for_function(
            "text => document.querySelector('#chat').innerText.includes(text)", arg=text, timeout=seconds * 1000
        )

    def idle(self):
        self.page.wait_for_selector("#stop", state="hidden", timeout=20000)

    def keep(self, name):
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=SCREENSHOTS / f"{name}.png")


@pytest.fixture
def tab(browser, address):
    opened = Tab(browser, address)
    yield opened
    assert opened.elsewhere == [] and opened.faults == []
    opened.context.close()


def test_a_real_conversation_about_an_uploaded_picture(browser):
    with serving() as (url, _), web_page(url) as address:
        tab = Tab(browser, address)
        tab.attach(SCENE)
        tab.ask("What color is the star?")
        tab.sees("blue")
        tab.idle()
        assert tab.written == "" and tab.page.locator("#chat img").count() >= 1
        tab.ask("Please answer with a bounding box. Where is the star?")
        tab.page.wait_for_selector("#chat .bot img, #chat [data-testid=bot] img", timeout=20000)
        tab.idle()
        tab.keep("conversation")
        assert tab.elsewhere == [] and tab.faults == []
        tab.context.close()


def test_what_is_sent_and_asking_on(tab, stub):
    tab.attach(SCENE)
    tab.ask("say: first answer")
    tab.sees("first answer")
    tab.idle()
    tab.ask("and then")
    tab.sees("echo and then")
    tab.idle()
    body = stub.bodies[-1]
    assert [message["role"] for message in body["messages"]] == ["user", "assistant", "user"]
    part = body["messages"][0]["content"][0]
    assert base64.b64decode(part["image_url"]["url"].partition(",")[2]) == SCENE.read_bytes()
    assert body["messages"][1]["content"] == "first answer" and body["messages"][2]["content"] == "and then"
    assert body["stream"] and body["skip_special_tokens"] is False and body["repetition_penalty"] == 1
    assert part["image_url"]["max_dynamic_patch"] == 12 and body["max_tokens"] == 1024


def test_boxes_are_drawn(tab):
    tab.attach(SCENE)
    tab.ask("say: <ref>the star</ref><box>[[100, 100, 500, 500]]</box>")
    tab.page.wait_for_selector("#chat [data-testid=bot] img, #chat .bot img")
    tab.idle()
    tab.sees("the star")
    drawn = tab.page.locator("#chat [data-testid=bot] img, #chat .bot img").last
    from PIL import Image

    from paddlemix.boxes import draw_boxes, parse_boxes

    picture = Image.open(SCENE).convert("RGB")
    found = tab.context.request.get(drawn.get_attribute("src"))
    expected = draw_boxes(picture, parse_boxes("<ref>the star</ref><box>[[100, 100, 500, 500]]</box>", *picture.size))
    shown = Image.open(io.BytesIO(found.body())).convert("RGB")
    assert shown.size == expected.size and shown.getpixel((shown.width // 10, shown.height // 3)) != picture.getpixel(
        (shown.width // 10, shown.height // 3)
    )
    tab.keep("boxes")


def test_a_picture_can_be_pasted(tab, stub):
    data = base64.b64encode(SCENE.read_bytes()).decode()
    tab.page.focus("#question textarea")
    tab.page.evaluate(
        """data => {
            const bytes = Uint8Array.from(atob(data), c => c.charCodeAt(0)), transfer = new DataTransfer();
            transfer.items.add(new File([bytes], "pasted.png", {type: "image/png"}));
            document.querySelector("#question textarea").dispatchEvent(
                new ClipboardEvent("paste", {clipboardData: transfer, bubbles: true, cancelable: true}));
        }""",
        data,
    )
    tab.page.wait_for_selector("#question [class*=thumbnail] img")
    tab.page.wait_for_timeout(500)
    tab.ask("say: pasted")
    tab.sees("pasted")
    tab.idle()
    url = stub.bodies[-1]["messages"][0]["content"][0]["image_url"]["url"]
    assert base64.b64decode(url.partition(",")[2]) == SCENE.read_bytes()


def test_a_clip(tab, stub, tmp_path):
    av = pytest.importorskip("av")
    import numpy as np

    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for i in range(5):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 40 * i, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    tab.page.set_input_files("#question input[type=file]", str(path))
    tab.page.wait_for_timeout(1500)
    tab.ask("say: clip seen")
    tab.sees("clip seen")
    tab.idle()
    part = stub.bodies[-1]["messages"][0]["content"][0]
    assert base64.b64decode(part["video_url"]["url"].partition(",")[2]) == path.read_bytes()
    tab.page.wait_for_selector("#chat video")
    assert tab.page.locator("#chat video").count() == 1
    tab.keep("clip")


def test_an_answer_streams_and_stops_and_no_question_is_lost(tab, stub):
    stub.gone.clear()
    tab.ask("slow please")
    tab.sees("word1 ")
    assert "word150" not in tab.page.inner_text("#chat")
    sent = len(stub.bodies)
    tab.ask("say: meanwhile")
    tab.page.wait_for_timeout(700)
    assert len(stub.bodies) == sent and tab.written == "say: meanwhile"
    tab.page.click("#stop")
    tab.idle()
    assert stub.gone.wait(10)
    tab.keep("stopped")
    assert tab.written == "say: meanwhile"
    tab.page.press("#question textarea", "Enter")
    tab.page.wait_for_function("() => document.querySelector('#question textarea').value === ''")
    tab.idle()
    sent = stub.bodies[-1]["messages"]
    assert sent[-1]["content"] == "say: meanwhile" and sent[-2]["content"].startswith("word0 ") and "word199" not in str(sent)


def test_an_error_is_told_and_the_question_comes_back(tab, stub):
    tab.attach(SCENE)
    tab.ask("refuse this")
    tab.sees("the picture is <b>too</b> large")
    tab.page.wait_for_function("() => document.querySelector('#question textarea').value === 'refuse this'")
    assert tab.page.locator("#question [class*=thumbnail] img").count() == 1
    tab.keep("error")
    tab.ask("say: good")
    tab.sees("good")
    tab.idle()
    assert len(stub.bodies[-1]["messages"]) == 1


def test_text_is_no_code(tab):
    tab.ask(f"say: {ATTACK}")
    tab.sees("window.hurt=1")
    tab.idle()
    tab.page.wait_for_timeout(500)
    assert tab.page.evaluate("() => window.hurt") is None
    assert tab.page.locator("#chat iframe, #chat script, #chat [onerror], #chat [href^=javascript]").count() == 0
    assert "<script>window.hurt=1</script>" in tab.page.inner_text("#chat")
    tab.keep("no-code")


def test_chinese_and_a_narrow_screen(browser, address, stub):
    tab = Tab(browser, address, locale="zh-CN", viewport={"width": 390, "height": 844})
    tab.page.wait_for_function("() => document.querySelector('#new').innerText === '新对话'")
    tab.page.click("#language >> text=English")
    tab.page.wait_for_function("() => document.querySelector('#new').innerText === 'New conversation'")
    tab.page.click("#language >> text=中文")
    tab.page.wait_for_function("() => document.querySelector('#new').innerText === '新对话'")
    tab.attach(SCENE)
    tab.ask("say: 这是一颗蓝色的星星。" + "很长的回答，" * 40 + "x" * 300)
    tab.sees("这是一颗蓝色的星星。")
    tab.idle()
    tab.page.click("#settings button")
    tab.page.wait_for_timeout(500)
    wide = tab.page.evaluate("() => document.documentElement.scrollWidth")
    tab.keep("narrow-chinese")
    assert wide <= 390 and tab.elsewhere == [] and tab.faults == []
    for locator in ("#question textarea", "#new", "#chat"):
        box = tab.page.locator(locator).bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 390
    tab.context.close()


def test_retry_and_a_new_conversation(tab, stub):
    tab.ask("say: once")
    tab.sees("once")
    tab.idle()
    sent = len(stub.bodies)
    tab.page.click("#chat button[aria-label=Retry], #chat button[title=Retry]")
    tab.page.wait_for_timeout(1500)
    tab.idle()
    assert len(stub.bodies) == sent + 1 and stub.bodies[-1]["messages"] == stub.bodies[-2]["messages"]
    tab.page.click("#new")
    tab.ask("say: afresh")
    tab.sees("afresh")
    tab.idle()
    assert len(stub.bodies[-1]["messages"]) == 1


def test_other_servers_get_openai_fields_alone_and_one_that_is_away_is_told(browser):
    stranger = Stub()
    with web_page(stranger.url) as address:
        tab = Tab(browser, address)
        tab.attach(SCENE)
        tab.ask("say: hello")
        tab.sees("hello")
        tab.idle()
        body = stranger.bodies[-1]
        assert set(body) <= {"model", "messages", "stream", "temperature", "top_p", "max_tokens"}
        assert set(body["messages"][0]["content"][0]["image_url"]) == {"url"}
        stranger.shutdown()
        stranger.server_close()
        tab.ask("are you there")
        tab.sees("cannot be reached")
        tab.page.wait_for_function("() => document.querySelector('#question textarea').value === 'are you there'")
        tab.context.close()


def test_it_imports_neither_paddle_nor_our_processors():
    code = (
        "import sys\n"
        "from paddlemix.serving.web.__main__ import make_app\n"
        "make_app('http://127.0.0.1:1/v1')\n"
        "import paddlemix.boxes\n"
        "print([m for m in sys.modules if m.split('.')[0] in ('paddle', 'tokenizers') or m.startswith('paddlemix.processors')])"
    )
    done = subprocess.run(
        [str(PYTHON), "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.stdout.strip() == "[]", done.stderr
