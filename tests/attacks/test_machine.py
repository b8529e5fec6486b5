"""A machine that lacks memory, threads, room, a home folder or a locale: one sentence, or the right answer."""

import os
import shutil
import subprocess
import sys

import pytest

SCENE = "paddlemix/demo_images/scene_1.png"
QUESTION = [sys.executable, "-m", "paddlemix", "chat", "--image_path", SCENE, "--text", "What color is the star?"]
ANSWER = "blue"  # as tools/draw_demo_images.py drew it


def ask(before=(), command=QUESTION, environment=None, **settings):
    settings = {"stdout": subprocess.PIPE, **settings}
    return subprocess.run(
        [*before, *command], stderr=subprocess.PIPE, text=True, errors="replace", timeout=120, env=environment, **settings
    )


def sentence(done):
    """The one line that says what is wrong; what C libraries print before it is not ours."""
    assert "Traceback" not in done.stderr, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1
    return line


@pytest.mark.parametrize("megabytes", [400, 880, 1000, 1300])
def test_too_little_memory(megabytes):
    if not shutil.which("prlimit"):
        pytest.skip("needs prlimit (util-linux)")
    done = ask(["prlimit", f"--as={megabytes << 20}"])
    if done.returncode == 0:  # smaller builds of Paddle may do with it
        assert done.stdout.strip() == ANSWER
    else:
        assert "not enough memory" in sentence(done)


@pytest.mark.parametrize("tasks", [1, 2, 3])
def test_no_threads_left(tasks):
    """As another user, since the limit does not bind root; who may read everything, since the test's files are root's."""
    if os.geteuid() or not shutil.which("setpriv") or not shutil.which("prlimit"):
        pytest.skip("needs root, setpriv and prlimit (util-linux)")
    rights = "-all,+dac_override,+dac_read_search"
    user = ["setpriv", "--reuid=65533", "--regid=65533", "--clear-groups", f"--inh-caps={rights}", f"--ambient-caps={rights}"]
    if subprocess.run([*user, "true"], capture_output=True).returncode:
        pytest.skip("this container's root may not become another user")
    assert "no more threads" in sentence(ask([*user, "prlimit", f"--nproc={tasks}"]))


def test_disk_full_for_the_answer():
    with open("/dev/full", "w") as full:
        assert "disk is full" in sentence(ask(stdout=full))


@pytest.mark.slow  # kernels are built without a cache
def test_no_home_and_assertions_off():
    environment = {name: value for name, value in os.environ.items() if name not in ("HOME", "XDG_CACHE_HOME")}
    optimised = [sys.executable, "-O", *QUESTION[1:]]
    done = ask(command=optimised, environment=environment)
    assert (done.returncode, done.stdout.strip()) == (0, ANSWER), done.stderr


def test_a_locale_without_utf8(tmp_path):
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for name in ("PYTHONIOENCODING", "LANG"):
        environment.pop(name, None)
    scene = shutil.copy(SCENE, tmp_path / "星.png")
    command = [*QUESTION[:4], "--image_path", str(scene), "--text", "What color is the star?", "--system_message", "星"]
    done = ask(command=command, environment=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ask(command=command).stdout


def test_closed_output():
    closed = ask(["sh", "-c", 'exec "$@" >&-', "sh"])
    assert closed.returncode == 0 and "Traceback" not in closed.stderr, closed.stderr
    for words in (["finetune", "--help"], ["--help"]):
        command = [sys.executable, "-m", "paddlemix", *words]
        piped = ask(["bash", "-c", '"$@" | true', "bash"], command=command)  # who reads nothing at all
        assert not piped.stderr, piped.stderr


def test_disk_full_in_mid_write(tmp_path):
    """A limit on the size of files ends a write as a full disk does: nothing half is left under the name."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "paddlemix", "convert", "tests/data/reference/qwen2/checkpoint", str(out)]
    command += ["--layout", "paddle"]
    done = ask(["prlimit", "--fsize=200000"], command=command)
    line = sentence(done)
    assert str(out) in line or "cannot be written" in line, line
    assert not list(out.glob("*.safetensors"))
