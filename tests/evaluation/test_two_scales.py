"""Mini-Monkey in evaluation: tiles of both scales in the ranges of each benchmark, and the grid that compression goes by."""

import numpy as np
import pytest

from paddlemix.evaluation.local import TwoScales
from paddlemix.evaluation.rows import Question
from paddlemix.evaluation.runner import Settings
from paddlemix.evaluation.tasks import TASKS
from paddlemix.models.internvl2 import load_tokenizer
from paddlemix.models.minimonkey import MiniMonkeyChatModel
from paddlemix.processors.minimonkey import multi_scale_tiles
from tests.conftest import REFERENCE

CHECKPOINT = str(REFERENCE / "internlm2/checkpoint")
PICTURE = str(REFERENCE / "images/img0.png")
PUBLISHED = {  # Mini-Monkey's evaluation scripts: tiles of the finer scale, of the coarser one
    "vqa-chartqa-test": ((4, 12), (1, 3)),
    "vqa-docvqa-val": ((1, 24), (1, 8)),
    "vqa-infovqa-val": ((5, 24), (3, 8)),
    "ccbench-dev": ((3, 8), (1, 4)),
    "mme": ((3, 9), (1, 4)),
    "pope": ((3, 9), (1, 4)),
    "vqa-textvqa-val": ((12, 24), (3, 5)),
    "mme-realworld": ((12, 24), (3, 5)),
}


@pytest.fixture(scope="module")
def model():
    return MiniMonkeyChatModel.from_pretrained(CHECKPOINT, dtype="float32", engine="eager")


@pytest.mark.parametrize("name, ranges", PUBLISHED.items())
def test_tiles_are_in_the_ranges_of_the_benchmark(model, name, ranges):
    local, task = TwoScales(model, load_tokenizer(CHECKPOINT), Settings(model=CHECKPOINT, scales="scm")), TASKS[name]
    question = Question(0, "Read.", (PICTURE,))
    _, pixels, counts, _, _, compress = local.encode(task, question)
    expected, grid, (coarse, fine) = multi_scale_tiles(PICTURE, model.config.image_size, ranges=ranges)
    np.testing.assert_array_equal(pixels, expected)
    assert counts == [len(expected)] and compress.keywords == {"grid": grid}
    (fewest, most), (fewest_b, most_b) = ranges
    assert fewest <= grid[0] * grid[1] <= most
    assert fewest_b <= coarse - (coarse > 1) <= most_b and fine == grid[0] * grid[1] + (grid[0] * grid[1] > 1)


def test_a_picture_of_two_benchmarks_is_cut_for_each(model):
    local = TwoScales(model, load_tokenizer(CHECKPOINT), Settings(model=CHECKPOINT))
    question = Question(0, "Read.", (PICTURE,))
    for name in ("vqa-textvqa-val", "ccbench-dev"):
        expected, _, _ = multi_scale_tiles(PICTURE, model.config.image_size, ranges=PUBLISHED[name])
        np.testing.assert_array_equal(local.encode(TASKS[name], question)[1], expected)


def test_the_users_bound_comes_first(model):
    settings = Settings(model=CHECKPOINT, scales="scm", max_num=5)
    local = TwoScales(model, load_tokenizer(CHECKPOINT), settings)
    *_, compress = local.encode(TASKS["vqa-docvqa-val"], Question(0, "Read.", (PICTURE,)))
    grid = compress.keywords["grid"]
    assert grid == multi_scale_tiles(PICTURE, model.config.image_size, max_num=5)[1] and grid[0] * grid[1] <= 5
