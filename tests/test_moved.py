"""Module paths of earlier versions are the modules of today."""

import importlib
import subprocess
import sys

import pytest

from paddlemix.moved import MOVED


@pytest.mark.parametrize("old, new", MOVED.items())
def test_old_path_is_the_new_module(old, new):
    module = importlib.import_module(old)
    assert module is importlib.import_module(new)
    assert module.__name__ == module.__spec__.name == new
    folder, _, name = old.rpartition(".")
    assert getattr(importlib.import_module(folder), name) is module


def test_old_path_comes_first_in_a_fresh_process():
    code = (
        "from paddlemix.models.internvl2.weight_files import open_weight_file\n"
        "from paddlemix.models.internvl2.tokenization import load_tokenizer\n"
        "import paddlemix.checkpoints.files, paddlemix.tokenizers\n"
        "assert open_weight_file is paddlemix.checkpoints.files.open_weight_file\n"
        "assert load_tokenizer is paddlemix.tokenizers.load_tokenizer\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_unknown_path_is_unknown():
    with pytest.raises(ModuleNotFoundError, match=r"paddlemix\.models\.internvl2\.nothing"):
        importlib.import_module("paddlemix.models.internvl2.nothing")
