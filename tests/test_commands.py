"""The console command: one table of subcommands, each the same code as its script."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from paddlemix import commands, extras
from paddlemix.doctor import npu, report

ROOT = Path(__file__).parents[1]
ALL = {name: command for group in commands.COMMANDS.values() for name, command in group.items()}


def paddlemix(*arguments, cwd=None, code=0):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "paddlemix", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=cwd, env=environment)
    assert done.returncode == code, done.stderr
    return done.stdout, done.stderr


def test_contents_name_every_command_and_import_no_framework():
    code = (
        "import sys; from paddlemix import commands; commands.main(['--help']); "
        "print('heavy:', [m for m in ('paddle', 'numpy', 'PIL', 'tokenizers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT, timeout=60)
    assert "heavy: []" in done.stdout
    for name, command in ALL.items():
        assert re.search(rf"^  {name} +{re.escape(command.help)}", done.stdout, re.MULTILINE)


@pytest.mark.parametrize("name", ALL)
def test_help_of_a_command_is_under_its_name(name):
    command = ALL[name]
    if command.extra is None:
        stdout, _ = paddlemix(name, "--help")
        assert stdout.startswith(f"usage: paddlemix {name} ")
    assert callable(importlib.import_module(command.module).main)


def test_unknown_command():
    _, stderr = paddlemix("chatt", code=2)
    assert stderr.count("\n") == 1 and "'chatt' is no command" in stderr and "chat" in stderr and "doctor" in stderr


def test_dashes_and_underscores_are_alike(capsys):
    parser = commands.Parser()
    parser.add_argument("--max_num", type=int)
    parser.add_argument("--in-place", action="store_true")
    parser.add_argument("--text")
    assert parser.parse_args(["--max-num", "3"]).max_num == parser.parse_args(["--max_num=3"]).max_num == 3
    assert parser.parse_args(["--max-num=4", "--in_place"]).in_place
    assert parser.parse_args(["--text", "a--max-num"]).text == "a--max-num"
    with pytest.raises(SystemExit):
        parser.parse_args(["--max-nun", "3"])
    assert "--max-nun" in capsys.readouterr().err


def test_command_gives_the_answer_of_its_script(tmp_path):
    script = [sys.executable, str(ROOT / "paddlemix/examples/internvl2/chat_demo.py"), "--max_new_tokens", "8"]
    expected = subprocess.run(script, capture_output=True, text=True, check=True, timeout=120).stdout
    assert paddlemix("chat", "--max-new-tokens", 8, cwd=tmp_path)[0] == expected


def test_what_is_missing_is_said_with_the_extra_that_brings_it(monkeypatch):
    declared = [
        "numpy<2",
        'paddlepaddle==3.3.1; extra == "cpu"',
        'opencv-python-headless>=4.8; extra == "cpu"',
        'opencv-python-headless>=4.8; extra == "video"',
        'fastapi; extra == "serving"',
        'winrt; sys_platform == "win32" and extra == "serving"',
    ]
    monkeypatch.setattr("importlib.metadata.requires", lambda name: declared)
    assert extras.extras() == {
        "cpu": ["paddlepaddle", "opencv-python-headless"],
        "video": ["opencv-python-headless"],
        "serving": ["fastapi"],
    }

    def told(name):
        return extras.missing(ModuleNotFoundError(f"No module named '{name}'", name=name))

    assert told("fastapi.responses") == ("fastapi is not installed, which this command needs: pip install 'paddlemix[serving]'")
    assert "pip install 'paddlemix[video]'" in told("cv2")  # the smaller one that has it
    assert told("numpy.linalg").endswith("pip install numpy")
    assert "paddlemix[cpu]" in told("paddle")
    with pytest.raises(ModuleNotFoundError):
        told("paddlemix.nothing")


@pytest.mark.parametrize("name", ["chat", "video", "finetune", "plan", "doctor"])
def test_without_paddle_each_command_says_what_to_install(name, tmp_path):
    """What an installation without extras does; its --help works all the same."""
    (tmp_path / "paddle.py").write_text("raise ModuleNotFoundError(\"No module named 'paddle'\", name='paddle')")
    arguments = ["--model_name_or_path", "x", "--output_dir", "x"] if name == "finetune" else []
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    command = [sys.executable, "-m", "paddlemix", name]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=60)
    told = done.stdout if name == "doctor" else done.stderr
    assert done.returncode == 1 and "pip install 'paddlemix[cpu]'" in told and "Traceback" not in done.stderr
    if name not in ("plan", "doctor"):
        assert done.stderr.count("\n") == 1
        subprocess.run([*command, "--help"], capture_output=True, check=True, cwd=tmp_path, env=environment, timeout=60)


@pytest.mark.parametrize(
    "line, expected",
    [
        ("paddlemix ch", ["chat", "check-data"]),
        ("paddlemix chat --max", ["--max_new_tokens", "--max_num"]),
        ("paddlemix convert a b --dtype b", ["bfloat16"]),
    ],
)
def test_a_shell_completes_commands_and_flags(line, expected, tmp_path):
    asked = {"COMP_LINE": line, "COMP_POINT": str(len(line)), "COMP_TYPE": "9", "_ARGCOMPLETE": "1"}
    asked |= {"_ARGCOMPLETE_SHELL": "bash", "_ARGCOMPLETE_IFS": " ", "_ARGCOMPLETE_STDOUT_FILENAME": str(tmp_path / "out")}
    environment = os.environ | asked | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-m", "paddlemix"], env=environment, check=True, timeout=60)
    assert (tmp_path / "out").read_text().split() == expected


def test_doctor_reports_and_checks_nothing_twice():
    stdout, _ = paddlemix("doctor")
    rows = [line.split(None, 1) for line in stdout.splitlines() if re.match(r"(pass|slow|skip|fail) ", line)]
    names = [re.split(r"\s{2,}", rest)[0] for _, rest in rows]
    assert len(names) == len(set(names))
    for name in (
        "Python",
        "processor",
        "memory",
        "PaddlePaddle",
        "CPU engine, float32",
        "devices",
        "chat",
        "extra cpu",
    ):
        assert name in names
    (answer,) = (rest for _, rest in rows if rest.startswith("chat "))
    assert "'blue'" in answer
    processor = next(rest for _, rest in rows if rest.startswith("processor"))
    flags = set(re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[1].split())
    assert {f for f in report.FEATURES if f in processor.split()} == flags & set(report.FEATURES)


def test_settings_of_ascend_are_those_of_its_script():
    script = (ROOT / "tools/npu/env.sh").read_text(encoding="utf-8")
    assert dict(re.findall(r"^default (\w+) (\S+)", script, re.MULTILINE)) == npu.SETTINGS
    stdout, _ = paddlemix("doctor", "--npu-env")
    code = f"export HCCL_BUFFSIZE=7\n{stdout}\necho $HCCL_BUFFSIZE $FLAGS_use_stride_kernel"
    assert subprocess.run(["sh", "-c", code], capture_output=True, text=True, check=True).stdout == "7 0\n"


@pytest.mark.parametrize("number", ["0", "x", "-1", "99999", ""])
def test_devices_must_be_a_number(number):
    _, stderr = paddlemix("finetune", "--devices", number, "--output_dir", "x", code=1)
    assert "--devices is" in stderr and stderr.count("\n") == 1


@pytest.mark.slow
def test_finetune_starts_its_own_ranks(tmp_path):
    """Two processes halve the samples of each, and leave one model."""
    from tests.datasets.helpers import picture_record, write_meta

    meta = write_meta(tmp_path, [picture_record() for _ in range(4)])
    flags = ["--model-name-or-path", ROOT / "paddlemix/demo_model", "--meta-path", meta, "--output-dir", tmp_path / "out"]
    flags += ["--do-train", "--freeze-backbone", "--max-steps", 2, "--per-device-train-batch-size", 1, "--device", "cpu"]
    paddlemix("finetune", "--devices", 2, *flags, "--logging-steps", 1, "--report-to", "none")
    logs = sorted(path.name for path in (tmp_path / "out/launch_logs").glob("workerlog.*"))
    assert logs == ["workerlog.0", "workerlog.1"]
    assert (tmp_path / "out/model.safetensors").exists()
    steps = [json.loads(line) for line in (tmp_path / "out/train_log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in steps if "loss" in entry] == [1, 2]
