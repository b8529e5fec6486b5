"""An installed package is enough: the wheel alone, in a fresh virtual environment and an empty folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """``run(*arguments)`` of the console command that the wheel brings, where no checkout is in sight."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    # Copied first: setuptools leaves its build folder beside the sources.
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    for name in filter(None, files):
        if name.startswith(("paddlemix/", "pyproject.toml", "README.md", "LICENSE")) and (ROOT / name).exists():
            target = folder / "source" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    subprocess.run([*pip, "wheel", "--no-deps", "-w", folder, folder / "source"], check=True, timeout=600)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    python = folder / "venv/bin/python"
    empty = folder / "empty"
    empty.mkdir()
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}

    def run(*arguments, code=0):
        command = [folder / "venv/bin/paddlemix", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=empty, env=environment, timeout=300)
        assert done.returncode == code, done.stderr
        return done.stdout or done.stderr

    subprocess.run([python, *pip[1:], "install", wheel], check=True, timeout=1200, env=environment)
    run.without_paddle = [run("chat", code=1), run("doctor", code=1), run("--help")]
    subprocess.run([python, *pip[1:], "install", f"{wheel}[cpu]"], check=True, timeout=1200, env=environment)
    run.folder = empty
    return run


def test_chat_and_video_answer(installed):
    from paddlemix.examples.internvl2 import chat_demo, chat_demo_video

    for name, script in (("chat", chat_demo), ("video", chat_demo_video)):
        done = subprocess.run([sys.executable, script.__file__], capture_output=True, text=True, check=True, timeout=120)
        assert installed(name) == done.stdout


def test_before_paddle_is_there_its_installation_is_told(installed):
    chat, doctor, contents = installed.without_paddle
    assert chat.count("\n") == 1 and "pip install 'paddlemix[cpu]'" in chat
    assert "paddlepaddle-gpu" in doctor and "paddle-custom-npu" in doctor
    assert "check-data" in contents


def test_commands_that_need_no_model(installed):
    assert "PaddlePaddle" in installed("doctor")
    assert "--meta_path" in installed("finetune", "--help")
    assert installed("--version").strip()


def test_convert_there_and_back(installed):
    from paddlemix.checkpoints import open_weight_file

    model = ROOT / "paddlemix/demo_model"
    installed("convert", model, "there", "--layout", "paddle")
    installed("convert", "there", "back", "--layout", "torch")
    with open_weight_file(model / "model.safetensors") as a, open_weight_file(installed.folder / "back/model.safetensors") as b:
        assert a.keys() == b.keys()
        for name in a:
            rows = a[name].shape[0]
            assert (a[name].read(0, rows) == b[name].read(0, rows)).all(), name
