"""The folder of compiled kernels: damage is repaired, builders do not meet, and a folder of no use is one sentence.

The compiler is a stand-in that hands out the library that the real one made, so that a build takes no time.
"""

import hashlib
import json
import os
import subprocess
import sys

import pytest

from paddlemix.kernels import cpu

pytestmark = pytest.mark.skipif(not cpu.available("float32"), reason="the CPU kernels cannot be built here (see the warning)")

COMPILER = """#!/bin/sh
[ "$1" = --version ] && { echo "stand-in 1"; exit; }
if [ "$1" = -shared ]; then
    sleep "${SLEEP:-0}"; echo built >> "$BUILDS"
    while [ "$1" != -o ]; do shift; done
    cp "$PREBUILT" "$2"
fi
"""

CHILD = """
import hashlib, json, os, resource, signal, sys, warnings
from pathlib import Path
from paddlemix.kernels import cpu

def attempt():
    for function in (cpu._loaded, cpu._warn_once, cpu.available):
        function.cache_clear()
    builds = Path(os.environ["BUILDS"])
    before = builds.read_text().count("built") if builds.exists() else 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        there, works = cpu.compiled(), cpu.available("float32")
    after = builds.read_text().count("built") if builds.exists() else 0
    return [there, works, after - before, [str(w.message) for w in caught if "kernels" in str(w.message)]]

def signed(content):
    return content + hashlib.sha256(content).digest()
"""


@pytest.fixture
def run(tmp_path):
    """Start a child that runs some code after :data:`CHILD`, with a cache folder of its own."""
    compiler, prebuilt = tmp_path / "compiler", tmp_path / "prebuilt"
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    prebuilt.write_bytes(cpu._target()[2].read_bytes()[: -hashlib.sha256().digest_size])
    environment = {
        **os.environ, "CXX": str(compiler), "PREBUILT": str(prebuilt), "BUILDS": str(tmp_path / "builds"),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }  # fmt: skip

    def start(code, **more):
        command = [sys.executable, "-c", CHILD + code]
        return subprocess.Popen(command, env=environment | more, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    return start


def result(child):
    out, err = child.communicate(timeout=200)
    assert child.returncode == 0, err
    return json.loads(out.splitlines()[-1])


def test_a_damaged_library_is_built_again(run, tmp_path):
    found = result(
        run(
            """
target = cpu._target()[2]
target.parent.mkdir(parents=True)
target.write_bytes(signed(b"no library"))  # whole, but of no use
results = {"no library": attempt(), "again": attempt()}
whole = target.read_bytes()
for name, content in {
    "cut short": whole[: len(whole) // 2],  # loading it would end the process
    "one bit": bytes([*whole[:5000], whole[5000] ^ 1]) + whole[5001:],
    "empty": b"",
}.items():
    target.unlink()  # written anew, since this process has the old one mapped
    target.write_bytes(content)
    results[name] = attempt()
    assert target.read_bytes() == whole
print(json.dumps(results))
"""
        )
    )
    assert found.pop("no library") == [True, True, 1, []]
    assert found.pop("again") == [True, True, 0, []]
    assert found == dict.fromkeys(("cut short", "one bit", "empty"), [False, True, 1, []])
    assert [path.suffix for path in (tmp_path / "cache" / "paddlemix").iterdir()] == [".so"]


def test_two_builders_at_once_do_not_meet(run, tmp_path):
    children = [run("print(json.dumps(attempt()))", SLEEP="2") for _ in range(2)]
    for child in children:
        there, works, _, said = result(child)
        assert works and not said
    (path,) = (tmp_path / "cache" / "paddlemix").iterdir()
    assert cpu._intact(path)


def test_a_folder_of_no_use_is_one_sentence(run, tmp_path):
    """A file in its place, a full disk, and a home that nobody knows."""
    (tmp_path / "file").write_text("")
    found = result(
        run(
            """
results = {}
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
os.environ["XDG_CACHE_HOME"] = sys.argv[0] = os.environ["BUILDS"].replace("builds", "file")
results["file"] = attempt()
os.environ["XDG_CACHE_HOME"] = os.environ["BUILDS"].replace("builds", "full")
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
results["full"] = attempt()
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
for name in ("XDG_CACHE_HOME", "HOME"):
    del os.environ[name]
os.getuid = lambda: 54321
results["homeless"] = attempt()
print(json.dumps(results))
"""
        )
    )
    for name, (there, works, _, said) in found.items():
        assert (there, works, len(said)) == (False, False, 1), name
        assert said[0].startswith("CPU kernels are off, so answers are slower: ") and "\n" not in said[0], name
    assert "XDG_CACHE_HOME" in found["file"][3][0] and str(tmp_path / "file") in found["file"][3][0]


def test_thread_counts_that_are_no_numbers(monkeypatch):
    for value in ("4,2", "many", "0", "-3", ""):
        monkeypatch.setenv("OMP_NUM_THREADS", value)
        cpu.set_num_threads(0)
        assert cpu.num_threads() == (4 if value == "4,2" else len(os.sched_getaffinity(0)))
    monkeypatch.undo()
    cpu.set_num_threads(0)
