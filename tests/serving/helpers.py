"""A server in a process of its own, and what asks it."""

import base64
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCENE = ROOT / "paddlemix" / "demo_images" / "scene_1.png"


def picture(data=None):
    """A part with a data URL of ``data``, by default the demo's scene."""
    data = SCENE.read_bytes() if data is None else data
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(data).decode()}"}}


def messages(text, *parts):
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}] if parts else text}]


@contextlib.contextmanager
def serving(*flags, env=None):
    """The base URL of a server with ``flags`` on a free port; it is ended afterwards, and must end well."""
    command = [sys.executable, "-m", "paddlemix.serving", "--port", "0", *flags]
    env = {**os.environ, "PYTHONPATH": str(ROOT), **(env or {})}
    with tempfile.TemporaryFile("w+") as told:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=told, text=True, env=env)
        try:
            line = process.stdout.readline()
            assert line.startswith("ready: http://127.0.0.1:"), line + _read(told)
            yield line.split()[1], process
        finally:
            process.terminate()
            process.communicate(timeout=60)
        errors = _read(told)
    assert process.returncode == 0 and "Traceback" not in errors, errors


def _read(file):
    file.seek(0)
    return file.read()


def ask(url, body=None, path="/chat/completions", headers=None, raw=None, method=None):
    """(status, headers, text) of a request."""
    data = raw if raw is not None else None if body is None else json.dumps(body).encode()
    kind = {"Content-Type": "application/json"} if data is not None else {}
    request = urllib.request.Request(url + path, data, {**kind, **(headers or {})}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=300) as response:
            return response.status, response.headers, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read().decode()


def answer(url, text, *parts, **fields):
    """The parsed answer to a question."""
    status, _, body = ask(url, {"messages": messages(text, *parts), "temperature": 0, **fields})
    assert status == 200, body
    return json.loads(body)
