"""Beam search equals the original's: ids and scores of transformers' own."""

import json

import numpy as np
import paddle
import pytest

from paddlemix.models.blocks.beams import beam_search
from paddlemix.models.internvl2 import GenerationConfig
from tests.conftest import REFERENCE, load_reference

CASES = [
    pytest.param(family, case, id=f"{family}-{i}")
    for family, cases in json.loads((REFERENCE / "beams.json").read_text()).items()
    for i, case in enumerate(cases)
]


def search(model, case, **changes):
    rows = case.get("batch") or [case["prompt"]]
    width = max(map(len, rows))
    starts = np.array([width - len(row) for row in rows])
    ids = np.array([[0] * int(start) + row for start, row in zip(starts, rows)])
    options = {name: case[name] for name in ("max_new_tokens", "eos_token_id", "pad_token_id")}
    config = GenerationConfig(**options, **case["settings"] | changes)
    with paddle.no_grad():
        return beam_search(model.language_model, model.embed(ids), config, starts)


@pytest.mark.parametrize("family, case", CASES)
def test_ids_and_scores_equal_the_original(family, case):
    ids, scores = search(load_reference(family).model, case)
    assert ids.tolist() == case["output_ids"]
    assert np.allclose(scores, np.ravel(case["scores"]), rtol=1e-4, atol=1e-4)
