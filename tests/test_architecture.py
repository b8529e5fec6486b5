"""The rule of docs/architecture.md, which pyproject.toml has for import-linter: imports keep it, and breaking it is found."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("importlinter")

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
RULE = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def lint(folder):
    """What import-linter says of the package in a folder, with the rule of pyproject.toml."""
    program = (
        "import sys; sys.path.insert(0, ''); from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout + done.stderr


def test_imports_keep_the_rule():
    code, said = lint(ROOT)
    assert code == 0, said
    assert "4 kept, 0 broken" in said


@pytest.mark.parametrize(
    "path, line, told",
    [
        ("processors/boxes.py", "from paddlemix.training import plan", "paddlemix.processors"),
        ("models/blocks/layers.py", "import paddlemix.models.internvl2.modeling", "paddlemix.models.blocks"),
        (
            "models/internvl/modeling.py",
            "def late():\n    from paddlemix.models.internvl2 import modeling",
            "paddlemix.models.internvl",
        ),
        ("evaluation/rows.py", "import paddlemix.serving.protocol", "paddlemix.evaluation"),
        ("datasets/preference/records.py", "from paddlemix.datasets.internvl2 import check", "paddlemix.datasets.preference"),
        ("tokenizers/base.py", "import paddle", "paddlemix.tokenizers"),
        ("newroom.py", "import paddlemix.errors", "newroom"),
    ],
)
def test_an_arrow_back_up_is_found(path, line, told, tmp_path):
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for source in (ROOT / "paddlemix").rglob("*.py"):
        copy = tmp_path / source.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, copy)
    with open(tmp_path / "paddlemix" / path, "a") as file:
        file.write(f"\n\n{line}\n")
    code, said = lint(tmp_path)
    assert code == 1
    assert told in said


def test_the_page_has_the_rule_and_every_room():
    (shown,) = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    assert shown in RULE
    rooms = {
        path.name for path in (ROOT / "paddlemix").iterdir() if (path / "__init__.py").exists() and path.name != "demo_model"
    }
    assert rooms - {"models"} == set(re.findall(r"^\| `(\w+)/(?:FAMILY/)?`", PAGE, re.MULTILINE)) - {"models"}


def test_files_are_short_or_say_why_not():
    """More than 500 lines need a word at the head of the file that says why."""
    for path in [*(ROOT / "paddlemix").rglob("*.py"), *(ROOT / "paddlemix").rglob("*.cc"), *(ROOT / "tests").rglob("*.py")]:
        lines = path.read_text(encoding="utf-8").splitlines()
        assert len(lines) <= 530 or "500 lines" in "\n".join(lines[:15]), f"{path}: {len(lines)} lines"
