"""The bundled retrieval model finds drawn scenes; how it was made is marked slow."""

import re
import subprocess
import sys

import numpy as np
import pytest

from paddlemix.evaluation import retrieval_recalls
from paddlemix.examples.internvl import cli
from paddlemix.examples.internvl.demo import run, train
from paddlemix.models.internvl.embedder import Embedder


@pytest.mark.parametrize("mode", train.MODES)
def test_scenes_are_found_by_their_captions(mode, tmp_path):
    path, captions = train.write_scenes(tmp_path, 100, "test", different=True)
    assert len(set(captions)) == 100
    embedder = Embedder(cli.demo_model(), "float32", "eager", mode)
    pictures = embedder.images([str(tmp_path / f"{i:05d}.png") for i in range(100)])
    found = retrieval_recalls(pictures @ embedder.texts(captions).T, np.arange(100))
    assert min(found["image_retrieval_recall@1"], found["text_retrieval_recall@1"]) > 0.8


def test_the_demo_shows_what_was_asked_for(tmp_path, capsys):
    run.main(["--output_dir", str(tmp_path), "--count", "60", "--query", "a red circle at the top"])
    said = capsys.readouterr().out.splitlines()
    assert "60 pictures" in said[0] and said[1] == "a red circle at the top"
    own = said.index(str(tmp_path / "pictures" / "00000.png"))
    assert re.fullmatch(r"  1\.000  .*00000\.png", said[own + 1])  # a picture finds itself
    assert (tmp_path / "index" / "matches.png").stat().st_size > 1000


@pytest.mark.slow
def test_it_learns(tmp_path):
    done = subprocess.run(
        [sys.executable, train.__file__, "--output_dir", str(tmp_path)], capture_output=True, text=True, timeout=3600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = re.findall(r"^(InternVL-[CG]) (\w+)@1, before: ([\d.]+)%, after: ([\d.]+)%$", done.stdout, re.MULTILINE)
    assert len(lines) == 4
    for *_, before, after in lines:
        assert float(before) < 10 and float(after) > 80
    assert (tmp_path / "loss.png").stat().st_size > 10_000
