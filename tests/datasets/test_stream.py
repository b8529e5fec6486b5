"""The stream of pretraining: four processes read every row exactly once, packed or not, through an index on the disk."""

import json
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from paddlemix.datasets.internvl2 import Collator, PackedBatches, Packer, SampleOrder, TrainBatchSampler, read_meta
from tests.datasets.helpers import talk

ROWS = 100_000


class _Rows:
    """A data set whose samples are a few tokens, by the number of the row."""

    encoder = SimpleNamespace(options=SimpleNamespace(max_seq_length=64, max_tiles=4))

    def __getitem__(self, key):
        count = 3 + key[1] % 23
        ids = np.full(count, key[1])
        name = f"rows:{key[1]}"
        return {
            "input_ids": ids,
            "labels": ids,
            "image_flags": ids[:0],
            "pixel_values": np.empty((0, 3, 1, 1)),
            "name": name,
            "bad": [],
        }


def test_four_processes_read_every_row_once():
    samplers = [TrainBatchSampler(SampleOrder([60_000, 40_000], seed=1), 5, 2, rank, 4, steps=2_500) for rank in range(4)]
    seen = Counter(index for sampler in samplers for batch in sampler for _, index in batch)
    assert set(seen) == set(range(ROWS)) and set(seen.values()) == {1}


@pytest.mark.slow
def test_four_processes_pack_every_row_once():
    """All rows of the first pass are in one row of one process, or wait in one of its buffers, and none twice."""
    order = SampleOrder([60_000, 40_000], seed=2)
    ranks = [PackedBatches(_Rows(), order, Packer(64, 4), Collator(), rank=rank, world=4) for rank in range(4)]
    seen = Counter()
    for rank in ranks:
        batches = iter(rank)
        while min(lane.place(lane.taken) for lane in rank._own) < ROWS:
            seen.update(next(batches)["names"])
    waiting = [tuple(sample["key"]) for rank in ranks for lane in rank._own for row in lane.packer.rows for sample in row]
    second = sum(epoch == 1 for epoch, _ in waiting)
    assert second < 200  # of the next pass, which a process begins to fill its last row
    seen.update(f"rows:{index}" for _, index in waiting)
    assert set(seen) == {f"rows:{i}" for i in range(ROWS)}
    assert sum(seen.values()) - ROWS < 200


def test_a_share_is_drawn_by_the_seed_and_repeats_are_whole(tmp_path):
    """``repeat_time`` below and above 1, as pretraining and preference training read it."""
    rows = "".join(json.dumps({"conversations": talk(f"{i}")}) + "\n" for i in range(1000))
    (tmp_path / "rows.jsonl").write_text(rows)
    entries = {
        name: {"annotation": str(tmp_path / "rows.jsonl"), "repeat_time": r} for name, r in (("part", 0.3), ("thrice", 3))
    }
    (tmp_path / "meta.json").write_text(json.dumps(entries))

    def read(draw, source):
        return [int(source.read(i).conversations[0]["value"]) for i in range(len(source))]

    (first, thrice), (again, _), (other, _) = (
        [read(draw, source) for source in read_meta(tmp_path / "meta.json", draw=draw)] for draw in (1, 1, 2)
    )
    assert first == again != other and len(first) == len(set(first)) == 300
    assert first != sorted(first) and abs(np.mean(first) - 499.5) < 60 and max(first) > 900
    assert Counter(thrice) == Counter(list(range(1000)) * 3)
    source = read_meta(tmp_path / "meta.json", draw=1)[0]
    assert source.where(0) == (str(tmp_path / "rows.jsonl"), first[0] + 1)
    plain = read_meta(tmp_path / "meta.json")[0]  # fine-tuning takes the first ones
    assert read(None, plain) == list(range(300))


@pytest.mark.parametrize("options", [{}, {"resample": True}, {"replacement": True}])
def test_mixing_needs_no_memory(options):
    """A place of a stream of 10^9 rows, weighted or not; shares are those of the weights."""
    order = SampleOrder([900_000_000, 100_000_000], seed=4, **options)
    _, index = order[123_456_789_012]
    assert 0 <= index < 10**9
    share = np.mean(order.indices(0, np.arange(0, 10**9, 499_979)) >= 900_000_000)
    assert share == pytest.approx(0.25 if options.get("resample") else 0.1, abs=0.03)
