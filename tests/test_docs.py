"""What the documents say is so: their commands run, their flags and links exist, both languages show the same commands."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("tools/**/*.md"),
        *ROOT.glob("benchmarks/README.md"),
        *ROOT.glob("paddlemix/**/*.md"),
    ]
)
README = ROOT / "README.md"


def blocks(path, language):
    """Code blocks of a document in one language, comments and line continuations resolved."""
    found = re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [block.replace("\\\n", " ") for block in found]


def environment():
    """As after `source .venv/bin/activate`, whichever environment the tests run in."""
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


RUNNABLE = [(path, block) for path in DOCUMENTS for block in blocks(path, "bash")]


@pytest.mark.parametrize("path, block", RUNNABLE, ids=[f"{p.name}-{i}" for i, (p, _) in enumerate(RUNNABLE)])
def test_commands_for_everybody_run(path, block):
    """```bash blocks need neither network nor special hardware."""
    lines = [line for line in block.splitlines() if not line.startswith("source ")]
    done = subprocess.run(
        ["bash", "-ec", "\n".join(lines)], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_python_of_the_readme_runs():
    (code,) = blocks(README, "python")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


COMMANDS = sorted(
    {
        " ".join(line.split())
        for path in DOCUMENTS
        for language in ("bash", "sh")
        for block in blocks(path, language)
        for line in block.splitlines()
        if line.startswith("python ")
    }
)


@pytest.mark.parametrize("line", COMMANDS)
def test_flags_in_documents_exist(line):
    words = line.split("  #")[0].split()
    if words[1] == "-c":
        return
    target = words[1:3] if words[1] == "-m" else words[1:2]
    done = subprocess.run([sys.executable, *target, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for flag in (word for word in words if word.startswith("--")):
        assert re.search(rf"{flag}\b", done.stdout), f"{' '.join(target)} has no {flag}"


def test_make_targets_in_documents_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for path in DOCUMENTS:
        for target in re.findall(r"(?:^|`)make ([a-z][a-z-]*)", path.read_text(encoding="utf-8"), re.MULTILINE):
            assert target in targets, f"{path.name}: make {target}"


def test_links_in_documents_lead_somewhere():
    for path in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_both_readmes_show_the_same_code():
    chinese = ROOT / "README_cn.md"
    for language in ("bash", "sh", "python"):
        code = [[re.sub(r"\s*#.*", "", b) for b in blocks(path, language)] for path in (README, chinese)]
        assert code[0] == code[1]
