"""Offline batches: every row once, whatever is in the file and whenever it is ended."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

pytest.importorskip("fastapi")
from .helpers import ROOT, SCENE, messages, picture

ENV = {**os.environ, "PYTHONPATH": str(ROOT)}


def batch(*flags, code=0, seconds=300):
    command = [sys.executable, "-m", "paddlemix", "batch", *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENV, timeout=seconds)
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
    return done.stderr


def write(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def rows_of(count, **more):
    questions = ("What color is the star?", "Please describe this picture.", "How many shapes are there?")
    return [{"id": f"q{i}", "image": str(SCENE), "text": f"{questions[i % 3]}{' ' * (i // 3)}", **more} for i in range(count)]


def test_both_forms_bad_rows_and_other_settings(tmp_path):
    from paddlemix.examples.internvl2.chat_demo import load_pictures
    from paddlemix.models.internvl2 import InternVLChatModel, load_tokenizer

    shutil.copy(SCENE, tmp_path / "a.png")
    body = {"messages": messages("What color is the star?", picture()), "temperature": 0}
    rows = [
        {"id": 1, "image": "a.png", "text": "What color is the star?"},
        {"custom_id": "o", "method": "POST", "url": "/v1/chat/completions", "body": body},
        "{not json",
        {"id": 1, "text": "again"},
        {"id": "gone", "image": "none.png", "text": "x"},
        {"id": "choice", "text": "x", "guided_choice": ["yes", "no"]},
        {"custom_id": "hot", "body": {"messages": messages("Hi"), "temperature": 9}},
        {"custom_id": "random", "body": {"messages": messages("Hi"), "temperature": 2, "max_tokens": 8}},
    ]
    requests, answers, others = write(tmp_path / "r.jsonl", rows), tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    told = batch(requests, answers, code=1)
    found = lines(answers)
    model = InternVLChatModel.from_pretrained(str(ROOT / "paddlemix" / "demo_model"))
    tokenizer = load_tokenizer(str(ROOT / "paddlemix" / "demo_model"))
    expected = model.chat(tokenizer, load_pictures([str(SCENE)], model.config)[1], "What color is the star?")
    assert found[0] == {"id": 1, "answer": expected}
    assert set(found[1]) == {"id", "custom_id", "response", "error"} and found[1]["error"] is None
    response = found[1]["response"]
    assert response["status_code"] == 200 and response["body"]["choices"][0]["message"]["content"] == expected
    assert [(line.get("id"), line["error"]["row"]) for line in found[2:4]] == [(3, 3), (1, 4)]
    assert "none.png" not in json.dumps(found[5]) and found[4]["error"]["type"] == "invalid_request_error"
    assert found[5]["answer"] in ("yes", "no") and found[6]["response"]["status_code"] == 400 and found[6]["error"]["message"]
    assert "4 failed" in told and "row 3" in told and "row 4" in told
    before = answers.read_bytes()
    batch(requests, answers, code=1)  # nothing is left to do
    assert answers.read_bytes() == before
    assert "defaults" in batch(requests, answers, "--max_new_tokens", "3", code=1) and answers.read_bytes() == before
    batch(requests, others, "--max_num_seqs", "1", code=1)  # sampling without a seed too is the same again
    assert lines(others)[7]["response"]["body"]["choices"] == found[7]["response"]["body"]["choices"]


def kill_when(count, *flags):
    """Start a batch, and kill it once its file of answers, the second of ``flags``, has so many lines."""
    command, answers = [sys.executable, "-m", "paddlemix", "batch", *map(str, flags)], flags[1]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=ENV)
    while process.poll() is None and (not answers.exists() or answers.read_bytes().count(b"\n") < count):
        time.sleep(0.05)
    assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_killed_at_any_moment_no_line_is_lost_or_doubled(tmp_path):
    requests = write(tmp_path / "r.jsonl", rows_of(120, ignore_eos=True, max_tokens=30))
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    batch(requests, whole)
    for count in (1, 60):
        kill_when(count, requests, cut)
    with open(cut, "ab") as file:  # and one that was cut within a line
        file.write(b'{"id": "q11", "ans')
    batch(requests, cut)
    assert cut.read_bytes() == whole.read_bytes() and [line["id"] for line in lines(cut)] == [f"q{i}" for i in range(120)]


@pytest.mark.slow
def test_two_thousand_rows_killed_twice_and_by_two_actors(tmp_path):
    requests = write(tmp_path / "r.jsonl", rows_of(2000))
    cut, there = tmp_path / "cut.jsonl", tmp_path / "there.jsonl"
    for count in (200, 1200):
        kill_when(count, requests, cut)
    batch(requests, cut, seconds=1800)
    assert [line["id"] for line in lines(cut)] == [f"q{i}" for i in range(2000)] and all(
        "answer" in line for line in lines(cut)
    )
    pytest.importorskip("ray")
    batch(requests, there, "--ray", "local", "--processes", "2", seconds=1800)
    assert there.read_bytes() == cut.read_bytes()


def test_processes_and_folders_of_pictures(tmp_path):
    folder = tmp_path / "photos" / "inner"
    folder.mkdir(parents=True)
    for i in range(1, 5):
        shutil.copy(SCENE.with_name(f"scene_{i}.png"), folder / f"{i}.png")
    (folder / "notes.txt").write_text("no picture")
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    flags = ("--images", tmp_path / "photos", "--text", "What color is the star?", "--choices", "red", "blue", "green")
    batch(one, *flags)
    batch(two, *flags, "--processes", "2", "--order", "finished")
    assert [line["id"] for line in lines(one)] == [f"inner/{i}.png" for i in range(1, 5)]
    assert sorted(two.read_bytes().splitlines()) == sorted(one.read_bytes().splitlines())
    assert {line["answer"] for line in lines(one)} <= {"red", "blue", "green"}


def test_what_is_wrong_with_the_flags(tmp_path):
    requests = write(tmp_path / "r.jsonl", rows_of(1))
    for flags in ((requests,), (requests, requests), ("--images", tmp_path, "a.jsonl"), (tmp_path / "none", tmp_path / "a")):
        assert len(batch(*flags, code=1).splitlines()) == 1
    (tmp_path / "notes").write_text("mine\n")
    batch(requests, tmp_path / "notes", code=1)
    assert (tmp_path / "notes").read_text() == "mine\n"
