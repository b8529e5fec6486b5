"""Hostile input ends in one sentence that names its file and key, within two seconds and before memory is taken for it.

One child process runs all cases of a kind (:mod:`tests.attacks.child`), under a limit on memory and on time as a whole.
"""

import json
import subprocess
import sys

import pytest

SECONDS = 2  # of processor time, beyond importing Paddle


def run(kind, folder, timeout=300):
    """Results of all cases of a kind, by name."""
    command = [sys.executable, "-m", "tests.attacks.child", "tests.attacks.kinds", kind, str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired as hung:
        pytest.fail(f"hung: {(hung.stdout or b'').decode().splitlines()[-1:]}")
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert done.returncode == 0, (lines[-1:], done.stderr[-2000:])
    return {line["name"]: line for line in lines if "name" in line}


def is_sentence(text):
    return "\n" not in text.strip() and 10 < len(text) < 1500 and "Traceback" not in text


@pytest.mark.parametrize("kind", ["sizes", "files", "media"])
def test_hostile_input_is_one_sentence(kind, tmp_path):
    results = run(kind, tmp_path)
    assert len(results) > 25
    for name, line in results.items():
        assert line["result"][0] == "error", line
        message = line["result"][2]
        assert is_sentence(message), line
        assert line["seconds"] < SECONDS, line
        if kind == "sizes":
            assert name.split(" = ")[0] in message and "config.json" in message, line
        if kind == "files":
            assert name.split()[0] in message, line


def test_hostile_flags_are_one_sentence(tmp_path):
    results = run("flags", tmp_path)
    assert len(results) > 25
    for name, line in results.items():
        assert line["result"] == ["exit", 1], line
        (sentence,) = [said for said in line["said"].splitlines() if said.startswith("error: ")]
        assert is_sentence(sentence), line
        assert name.split()[0].strip("-").partition("_")[0] in sentence, line


@pytest.mark.slow
def test_changed_bytes_of_pictures_and_clips(tmp_path):
    """Each is read, or refused by a sentence: decoders may not hang, crash, or take memory by what a header promises."""
    results = run("mutations", tmp_path, timeout=900)
    assert len(results) > 700
    kinds = {"answer": 0, "error": 0}
    for line in results.values():
        kinds[line["result"][0]] += 1
        if line["result"][0] == "error":
            assert line["result"][1] in ("ImageError", "VideoError") and is_sentence(line["result"][2]), line
        assert line["seconds"] < SECONDS, line
    assert min(kinds.values()) > 100, kinds
