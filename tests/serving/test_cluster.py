"""Several replicas behind one address: alike in what they answer, and one that dies is not missed."""

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from .helpers import ROOT, answer, ask, messages, picture

for needed in ("ray", "pyarrow"):
    try:
        importlib.import_module(needed)
    except ImportError as failure:
        if needed == "ray" or not isinstance(
            failure, ModuleNotFoundError
        ):  # Ray does without pyarrow, but not with a broken one
            pytest.skip(f"{needed} cannot be imported: {failure}", allow_module_level=True)
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster():
    command = [sys.executable, "-m", "paddlemix.serving.cluster", "--replicas", "2", "--port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    line = process.stdout.readline()
    assert line.startswith("ready: http://127.0.0.1:"), line + process.stderr.read()
    started = descendants(process.pid)
    yield line.split()[1], process
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and "Traceback" not in errors, errors
    left = [pid for pid in started if alive(pid)]
    for _ in range(50):
        left = [pid for pid in left if alive(pid)]
        time.sleep(0.1)
    assert not left


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def descendants(pid):
    found, waiting = [], [pid]
    while waiting:
        listed = subprocess.run(["pgrep", "-P", str(waiting.pop())], capture_output=True, text=True).stdout.split()
        found += map(int, listed)
        waiting += map(int, listed)
    return found


def replicas(process):
    """Processes of the replicas, which Ray names."""
    found = []
    for pid in descendants(process.pid):
        try:
            with open(f"/proc/{pid}/cmdline") as file:
                if "ServeReplica" in file.read():
                    found.append(pid)
        except OSError:
            continue
    return found


def content(reply):
    return reply["choices"][0]["message"]["content"]


def test_it_answers_as_one_server_does(cluster):
    url, process = cluster
    assert len(replicas(process)) == 2
    assert content(answer(url, "What color is the star?", picture())) == "blue"
    assert ask(url.removesuffix("/v1"), path="/health")[0] == 200
    for fields, status in (({"temperature": 3}, 400), ({"model": "other"}, 404), ({"tools": [{}]}, 400)):
        found, headers, text = ask(url, {"messages": messages("Hi"), **fields})
        assert found == status and set(json.loads(text)["error"]) == {"message", "type", "param", "code"}
        assert len(headers.get_all("x-request-id")) == 1
    assert ask(url, raw=b"{")[0] == 400 and ask(url, path="/nothing")[0] == 404
    body = {"messages": messages("Hi"), "temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
    status, headers, text = ask(url, body)
    assert status == 200 and headers["content-type"].startswith("text/event-stream") and text.endswith("data: [DONE]\n\n")
    events = [json.loads(line[6:]) for line in text.split("\n\n") if line.startswith("data: {")]
    assert "".join(e["choices"][0]["delta"].get("content", "") for e in events[:-1]) == content(answer(url, "Hi"))
    assert events[-1]["usage"]["completion_tokens"] > 0
    assert json.loads(ask(url, path="/models")[2])["data"][0]["max_model_len"] == 4096


def test_metrics_are_of_all_replicas(cluster):
    url, _ = cluster

    def count():
        text = ask(url.removesuffix("/v1"), path="/metrics")[2]
        return float(re.search(r'request_success_total\{finished_reason="length",model_name="demo_model"\} (\S+)', text)[1])

    before = count()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: answer(url, f"Hi {i}", max_tokens=3, ignore_eos=True), range(24)))
    assert count() == before + 24


def test_a_replica_that_is_killed_is_not_missed(cluster):
    url, process = cluster
    fields = [{"temperature": 0}, {"temperature": 1.2, "seed": 7}, {"temperature": 0, "stream": True}]

    def one(i):
        body = {"messages": messages(f"Please describe this. {i % 12}"), "max_tokens": 60, "ignore_eos": True, **fields[i % 3]}
        status, _, text = ask(url, body)
        if status != 200 or '"error"' in text:
            return f"failed: {text}"
        if not body.get("stream"):
            return content(json.loads(text))
        events = [json.loads(line[6:]) for line in text.split("\n\n") if line.startswith("data: {")]
        assert len({event["id"] for event in events}) == 1
        return "".join(event["choices"][0]["delta"].get("content", "") for event in events)

    alone = [one(i) for i in range(12)]
    assert not any(text.startswith("failed") for text in alone)
    before, killed = replicas(process), []

    def kill():
        time.sleep(2)
        killed.append(before[0])
        os.kill(before[0], signal.SIGKILL)

    killer, results = threading.Thread(target=kill), []
    killer.start()
    with ThreadPoolExecutor(8) as pool:
        end = time.monotonic() + 12
        while time.monotonic() < end:
            results += list(pool.map(lambda i: (i, one(i)), range(24)))
    killer.join()
    assert killed and not alive(killed[0])
    failed = [text for _, text in results if text.startswith("failed")]
    print(len(results), "answers,", len(failed), "failed")
    assert len(failed) <= 3, failed
    assert all(text == alone[i % 12] for i, text in results if not text.startswith("failed"))
    for _ in range(300):
        if len(replicas(process)) == 2:
            return
        time.sleep(0.2)
    raise AssertionError("the replica was not replaced")
