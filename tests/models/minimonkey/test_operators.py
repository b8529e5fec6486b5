"""Compression computes with nothing that Ascend lacks: as tests/test_operators.py, which tells how this is found out."""

import pytest

from paddlemix.models.internvl2 import load_tokenizer
from paddlemix.models.minimonkey import MiniMonkeyChatModel
from tests.models.minimonkey.test_minimonkey import CHECKPOINT, EXPECTED, QUESTION, picture
from tests.test_operators import executed, forbidden, report


@pytest.fixture(autouse=True)
def without_the_kernels_of_cpus(monkeypatch):
    monkeypatch.setenv("PADDLEMIX_KERNELS", "plain")


def test_chats():
    tokenizer, (pixels, grid, _) = load_tokenizer(CHECKPOINT), picture(EXPECTED["chats"][0])

    def run(model):
        for compress in (True, False):
            model.chat(tokenizer, pixels, grid, QUESTION, dict(max_new_tokens=2), use_scm=compress)

    model = MiniMonkeyChatModel.from_pretrained(CHECKPOINT, dtype="float32", engine="eager")
    found = executed(run, model)
    assert not (bad := forbidden(found)), report(bad)
    assert {("matmul", "bfloat16"), ("softmax", "float32")} <= found
