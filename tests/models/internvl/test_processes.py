"""Losses over the pictures and texts of two processes against those of one with all of them."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import assert_close
from tests.models.internvl.helpers import fresh, gradients, load, loss_inputs, retrieval_inputs


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What both processes found: a list of two dictionaries."""
    folder = tmp_path_factory.mktemp("two")
    script = str(Path(__file__).parent / "two_processes.py")
    launcher = [sys.executable, "-m", "paddle.distributed.launch", "--nproc_per_node", "2", "--log_dir", str(folder / "logs")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path])}
    done = subprocess.run([*launcher, script, str(folder)], env=environment, capture_output=True, text=True, timeout=180)
    said = done.stdout + done.stderr + "".join(path.read_text() for path in (folder / "logs").glob("workerlog.*"))
    assert done.returncode == 0, said[-3000:]
    return [dict(np.load(folder / f"{rank}.npz")) for rank in range(2)]


def compare(two, name, loss, expected):
    """Losses are the same number in both processes; gradients, averaged over processes, are those of one."""
    for found in two:
        assert_close(found[f"{name}/loss"], float(loss), 1e-5)
    largest = max(np.abs(value).max() for value in expected.values())
    for key, value in expected.items():
        mean = sum(found.get(f"{name}/{key}", np.zeros_like(value)) for found in two) / 2
        assert np.abs(mean - value).max() < 1e-5 * largest, key


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["distinct", "shared"])
def test_retrieval_loss(two, kind):
    model = fresh()
    loss = model.retrieval_loss(**retrieval_inputs(load().expected["retrieval_loss"][kind]["image_ids"])).loss
    compare(two, kind, loss, gradients(model, loss))


@pytest.mark.slow
def test_contrast_of_stage_two(two):
    model = fresh()
    loss = model.loss(**loss_inputs()).loss_itc
    compare(two, "itc", loss, gradients(model, loss))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["itm", "itg"])
def test_matching_and_captions_are_the_mean_over_the_halves(two, name):
    model = fresh()
    halves = [getattr(model.loss(**loss_inputs(rows)), f"loss_{name}") for rows in (slice(0, 2), slice(2, 4))]
    loss = (halves[0] + halves[1]) * 0.5
    compare(two, name, loss, gradients(model, loss))
