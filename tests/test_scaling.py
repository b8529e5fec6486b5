"""benchmarks/scaling.py: what it says of steps whose time can be told without it."""

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def scaling(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import scaling

    return scaling


def step(scaling, stage, forward=1.0, **more):
    """Ten blocks of a billion weights, all of which learn, and half a billion outside."""
    blocks = tuple(scaling.Block(forward, 10**9, 10**9) for _ in range(10))
    return scaling.Step((), blocks, scaling.Block(forward, 5 * 10**8, 5 * 10**8), stage, **more)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_step_takes_what_it_computes_or_what_it_sends(scaling, stage):
    slow = scaling.Link(8, 100.0)
    computes = scaling.alone(step(scaling, stage))
    assert computes == 4 * 10 + 3
    seconds, waited, _ = scaling.simulate(step(scaling, stage), scaling.Link(8, 1e9))
    assert seconds == pytest.approx(computes, rel=1e-6)
    # Where nothing is computed, a step takes what theory says is sent: twice the weights (in a ring 7/8 of that), three times
    # those of the blocks with stage 3 (the last of them twice), over the bandwidth.
    seconds, _, sent = scaling.simulate(step(scaling, stage, forward=0.0), slow)
    blocks, outside = 2 * 10e9, 2 * 0.5e9
    ways = {0: 2 * 7 / 8 * (blocks + outside), 1: 2 * (blocks + outside), 2: 2 * (blocks + outside)}
    ways[3] = (3 - 1 / 10) * blocks + 2 * outside
    assert seconds == pytest.approx(ways[stage] / 100e9, rel=1e-6)
    assert sent["gradients"] == blocks + outside
    # Sending while computing saves time, and never more than the shorter of the two takes.
    alone, _, _ = scaling.simulate(step(scaling, stage), slow, overlaps=False)
    together, _, _ = scaling.simulate(step(scaling, stage), slow)
    assert alone == pytest.approx(computes + ways[stage] / 100e9, rel=1e-6)
    assert computes < together < alone and together >= max(computes, ways[stage] / 100e9)


def test_links_are_those_of_the_groups(scaling):
    node = scaling.NODES["A800"]
    inside, across = scaling.link(node, 8, 8), scaling.link(node, 64, 8)
    assert inside.bandwidth == node.inside and across.bandwidth == min(node.inside, 8 * node.outside)
    assert scaling.link(node, 8, 1).bandwidth == node.outside  # one card of each node
    assert inside.ring == 7 * 2 and across.ring == 56 * 2 + 7 * 5 and across.tree == 3 * 2 + 3 * 5
    assert scaling.ALONE.one(1e9) == scaling.ALONE.all(1e9) == 0


def test_replicas_of_states_sum_their_shares_alone(scaling):
    """Eight cards of each of 64 nodes divide states: what leaves a node is an eighth, twice."""
    shards, replicas = scaling.Link(8, 100.0), scaling.Link(64, 10.0)
    seconds, _, _ = scaling.simulate(step(scaling, 2, forward=0.0), shards, replicas=replicas)
    assert seconds == pytest.approx((2 * 21e9) / 100e9 + 2 * 63 / 64 * 21e9 / 8 / 10e9, rel=1e-6)


def test_divided_layers_wait_for_four_sums_a_block(scaling):
    """Two forward and two backward, and with recompute the forward ones again."""
    tensor = scaling.Link(4, 100.0)
    for recompute, passes in ((False, 2), (True, 3)):
        blocks = tuple(scaling.Block(1.0, 10, 10, summed=10**9) for _ in range(10))
        seconds, waited, _ = scaling.simulate(
            scaling.Step((), blocks, scaling.Block(0, 0, 0), 0, recompute=recompute), scaling.ALONE, tensor
        )
        assert waited["layers"] == pytest.approx(10 * 2 * passes * 2 * 3 / 4 / 100, rel=1e-6)


def test_the_command_prints_and_draws(tmp_path):
    picture = tmp_path / "scaling.png"
    command = [sys.executable, BENCHMARKS / "scaling.py", "--model", "InternVL2-2B", "--cards", "8", "512", "--out", picture]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "A model, not a measurement" in done.stdout and picture.stat().st_size > 5000
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines() if "InternVL2-2B" in line
    ]
    assert [row[0] for row in rows] == ["A800", "A800", "H800", "H800", "910B", "910B"]
    assert all(0 < int(row[4].strip("%")) <= 100 for row in rows)
