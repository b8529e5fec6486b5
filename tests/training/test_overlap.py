"""What processes send each other while they compute: as much as theory says, and the same results; benchmarks/overlap.py."""

from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def overlap(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import overlap

    return overlap


@pytest.mark.parametrize("stage", ["", "stage1", "stage2", "stage3"])
def test_nothing_is_sent_twice_and_losses_are_equal(tmp_path, overlap, stage):
    """Bytes and calls of a step; over a slow link, where what is sent goes on for as long as what is computed."""
    more = ("--tokens", "96", "--slow", "--steps", "2", "--bandwidth", "1e8")
    rows = [overlap.run(stage, *more, *flags, folder=tmp_path) for flags in ((), ("--no_overlap",))]
    assert len(rows[0]["losses"]) == 8 and rows[0]["losses"] == pytest.approx(rows[1]["losses"], rel=1e-6)
    for row, overlaps in zip(rows, (True, False)):
        sizes, names = row["sizes"], set(row["trained"])
        trained = sum(sizes[name] for name in names)
        blocks = {name for name in sizes if name.startswith("language_model.model.layers.")}
        tower = {name for name in sizes if name.startswith("vision_model.encoder.layers.")}
        # Of stage 3: the blocks of the decoder forward and backward, but the last, those of the frozen tower and all else once.
        last = {name for name in blocks if name.startswith(f"language_model.model.layers.{row['blocks'] - 1}.")}
        gathered = [*blocks, *(blocks - last), *(sizes.keys() - blocks)]
        assert 0 < len(last) < len(blocks)
        sent = {kind: row["bytes"].get(kind, 0) / row["steps"] for kind in ("reduce", "broadcast", "all_reduce")}
        calls = {kind: row["calls"].get(kind, 0) / row["steps"] for kind in ("reduce", "broadcast", "all_reduce")}
        few = 4  # bytes: the square of the norm, a number
        assert row["bytes"].keys() <= sent.keys() and len(tower) > 0
        if stage == "":
            assert sent["all_reduce"] == 4 * trained and sent["reduce"] == sent["broadcast"] == 0
            assert 12 <= row["sends"] <= 32 if overlaps else row["sends"] == 0
            assert calls["all_reduce"] == (row["sends"] or 1)
            continue
        assert sent["reduce"] == 4 * trained and sent["all_reduce"] == few and calls["all_reduce"] == 1
        if stage == "stage3":
            assert sent["broadcast"] == 4 * sum(sizes[name] for name in gathered) and calls["broadcast"] == len(gathered)
            # Of each block and of what is outside, those of each owner together.
            assert calls["reduce"] <= 2 * (row["blocks"] + 1)
        else:
            assert sent["broadcast"] == 4 * trained and calls["broadcast"] == len(names)
            assert calls["reduce"] == (row["sends"] if overlaps else 2)
