"""Packing: every sample comes out whole, once, in rows within the limits, in an order that can be resumed."""

import json
from collections import Counter

import numpy as np
import pytest

from paddlemix.datasets.internvl2 import Collator, PackedBatches, Packer, SampleOrder, costs, rows_per_epoch
from paddlemix.errors import ConfigError
from tests.datasets.helpers import make_dataset, make_encoder, picture_record, talk

MAX_TOKENS, MAX_TILES = 600, 10


@pytest.fixture
def dataset(tmp_path):
    """Twelve texts of many lengths, four samples with pictures."""
    records = [{"conversations": talk(f"number {i}", "ab " * (7 * i % 45 + 1))} for i in range(12)]
    records += [picture_record(i) for i in range(4)]
    return make_dataset(tmp_path, records, make_encoder(max_seq_length=MAX_TOKENS, max_tiles=MAX_TILES))


def make_batches(dataset, seed=0, buffer_size=3, **options):
    order = SampleOrder(dataset.source_sizes(), seed=seed)
    return PackedBatches(dataset, order, Packer(MAX_TOKENS, MAX_TILES, buffer_size), Collator(), **options)


def take(batches, count):
    iterator = iter(batches)
    return [next(iterator) for _ in range(count)]


def waiting_samples(*ranks, what="name"):
    """Of the samples in unfinished rows."""
    return [sample[what] for b in ranks for lane in b._own for row in lane.packer.rows for sample in row]


def segments(batch):
    """(ids, labels) of each sample of a batch, taken apart by segment."""
    for ids, labels, segment in zip(batch["input_ids"], batch["labels"], batch["segment_ids"]):
        for number in range(1, segment.max() + 1):
            yield tuple(ids[segment == number]), tuple(labels[segment == number])


def test_a_packed_epoch_is_the_unpacked_epoch(dataset):
    packer = Packer(MAX_TOKENS, MAX_TILES, buffer_size=3)
    rows = [packer.add(dataset[i]) for i in range(len(dataset))]
    rows = [row for row in rows if row is not None] + packer.flush()
    assert packer.rows == [] and len(rows) < len(dataset) / 2
    batch = Collator().collate_rows(rows)
    wanted = Counter((tuple(s["input_ids"]), tuple(s["labels"])) for s in (dataset[i] for i in range(len(dataset))))
    assert Counter(segments(batch)) == wanted
    assert len(batch["pixel_values"]) == sum(len(dataset[i]["image_flags"]) for i in range(len(dataset)))
    for row in rows:
        assert sum(len(s["input_ids"]) for s in row) <= MAX_TOKENS
        assert sum(len(s["image_flags"]) for s in row) <= MAX_TILES
    # Tiles follow the order of their context tokens.
    pictures = [s for row in rows for s in row if len(s["image_flags"])]
    assert np.array_equal(batch["pixel_values"], np.concatenate([s["pixel_values"] for s in pictures]))


def test_rows_are_well_filled(dataset):
    batches = take(make_batches(dataset, buffer_size=20), 12)
    filled = np.mean([batch["attention_mask"].sum() for batch in batches])
    alone = np.mean([len(dataset[i]["input_ids"]) for i in range(len(dataset))])
    assert filled > 0.8 * MAX_TOKENS > 2 * alone


def test_the_endless_stream_loses_and_repeats_nothing(dataset):
    batches = make_batches(dataset, rank=0, world=1)
    packed = [name for batch in take(batches, 30) for name in batch["names"]]
    waiting = waiting_samples(batches)
    counts = Counter(packed + waiting)
    epochs = int(batches.epoch)
    assert epochs >= 3 and set(counts.values()) <= {epochs, epochs + 1} and len(counts) == len(dataset)


def test_the_rows_of_an_epoch_are_known_before(dataset):
    """Against packing many epochs of the samples themselves."""
    order = SampleOrder(dataset.source_sizes(), seed=0)
    guess = rows_per_epoch(order, Packer(MAX_TOKENS, MAX_TILES, 3), costs(dataset))
    batches = make_batches(dataset)
    take(batches, 40)
    assert guess == pytest.approx(40 / batches.epoch, rel=0.15)
    # Half of the records unusable: as many rows, of those that take their places.
    third, count = MAX_TOKENS // 3, len(dataset)
    assert rows_per_epoch(order, Packer(MAX_TOKENS, MAX_TILES, 3), lambda i: (third * (i % 2 == 0), 0)) == count / 3
    assert rows_per_epoch(order, Packer(MAX_TOKENS, MAX_TILES, 3), lambda i: (0, 1)) == count


def test_a_step_does_not_depend_on_the_number_of_processes(dataset):
    """Four rows a step, of one, two and four processes, with and without workers."""
    steps = []
    for world, size, workers in ((1, 4, 0), (2, 2, 0), (2, 1, 2), (4, 1, 0)):
        accumulation = 4 // world // size
        ranks = [
            iter(make_batches(dataset, batch_size=size, rank=r, world=world, accumulation=accumulation, num_workers=workers))
            for r in range(world)
        ]
        steps.append([sorted(n for r in ranks for _ in range(accumulation) for n in next(r)["names"]) for _ in range(5)])
    assert all(other == steps[0] for other in steps)


def test_processes_share_the_stream(dataset):
    """What was packed and what waits is the start of the stream, each place once."""
    ranks = [make_batches(dataset, rank=rank, world=2) for rank in range(2)]
    batches = [batch for rank in ranks for batch in take(rank, 5)]
    seen = Counter([name for batch in batches for name in batch["names"]] + waiting_samples(*ranks))
    places = [lane.place(i) for rank in ranks for lane in rank._own for i in range(lane.taken)]
    assert len(set(places)) == len(places)
    assert seen == Counter(dataset[ranks[0].order[place]]["name"] for place in places)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_resuming_is_exact(dataset, batch_size):
    options = {"batch_size": batch_size, "rank": 1, "world": 2}
    whole = make_batches(dataset, **options)
    expected = take(whole, 12)
    stopped = make_batches(dataset, **options)
    take(stopped, 5)
    state = json.loads(json.dumps(stopped.state_dict()))
    resumed = make_batches(dataset, **options)
    resumed.load_state_dict(state)
    for batch, wanted in zip(take(resumed, 7), expected[5:], strict=True):
        assert batch["names"] == wanted["names"]
        assert all(np.array_equal(batch[key], wanted[key]) for key in wanted if key not in ("names", "bad"))
    for batch, wanted in zip(take(stopped, 7), expected[5:], strict=True):  # a new iterator of the same object goes on too
        assert batch["names"] == wanted["names"]


def test_resuming_with_another_number_of_processes_is_exact(dataset):
    """Four rows a step: two processes stop, and one or four go on as the two would have."""

    def ranks_of(world):
        return [make_batches(dataset, rank=r, world=world, accumulation=4 // world) for r in range(world)]

    def step(ranks):
        return sorted(name for rank in ranks for batch in take(rank, 4 // len(ranks)) for name in batch["names"])

    stopped = ranks_of(2)
    for _ in range(3):
        step(stopped)
    states = json.loads(json.dumps([rank.state_dict() for rank in stopped]))
    expected = [step(stopped) for _ in range(4)]
    for world in (1, 2, 4):
        resumed = ranks_of(world)
        for rank in resumed:
            rank.load_state_dict(*states)
        assert [step(resumed) for _ in range(4)] == expected


def test_states_that_do_not_fit_are_refused(dataset):
    batches = make_batches(dataset, rank=1, world=2)
    take(batches, 1)
    with pytest.raises(ConfigError, match="of steps of 2 rows, not 1: keep"):
        make_batches(dataset).load_state_dict(batches.state_dict())
    with pytest.raises(ConfigError, match="lacks row 0"):
        make_batches(dataset, rank=0, world=2).load_state_dict(batches.state_dict())


def test_what_is_bad_is_skipped_and_nothing_takes_its_place(tmp_path):
    records = [{"conversations": talk(f"number {i}", "ab " * 20)} for i in range(30)]
    for i in (3, 4, 5, 20):
        records[i] = "{broken" if i % 2 else {"image": "none.png", "conversations": talk(f"number {i}")}
    dataset = make_dataset(tmp_path, records, make_encoder(max_seq_length=MAX_TOKENS, max_tiles=MAX_TILES))
    dataset.skip = True
    batches = make_batches(dataset)
    names, bad = [], []
    while len(names) + len(bad) < 3 * len(records):
        (batch,) = take(batches, 1)
        names += batch["names"]
        bad += [entry["line"] for entry in batch["bad"]]
    seen = Counter([int(name.rpartition(":")[2]) for name in names + waiting_samples(batches)] + bad)
    assert set(seen) == set(range(1, 31)) and max(seen.values()) - min(seen.values()) <= 1
    assert set(bad) == {4, 5, 6, 21}
    dataset.sources[0].parse = None
    with pytest.raises(TypeError):  # a fault of ours is no bad sample
        dataset[0]


def test_workers_do_not_change_the_batches(dataset):
    expected = take(make_batches(dataset), 4)
    for batch, wanted in zip(take(make_batches(dataset, num_workers=2), 4), expected, strict=True):
        assert batch["names"] == wanted["names"]
        assert all(np.array_equal(batch[key], wanted[key]) for key in wanted if key not in ("names", "bad"))


def test_bad_samples_are_reported_once_even_across_a_resume(tmp_path):
    records = [{"conversations": talk(f"number {i}", "ab " * 20)} for i in range(9)] + [picture_record(9)]
    dataset = make_dataset(tmp_path, records, make_encoder(max_seq_length=MAX_TOKENS, max_tiles=MAX_TILES))
    batches = make_batches(dataset)
    reported = 0
    while batches.epoch < 6:
        reported += sum(len(batch["bad"]) for batch in take(batches, 1))
        again = make_batches(dataset)
        again.load_state_dict(batches.state_dict())
        batches = again
    waiting = sum(map(len, waiting_samples(batches, what="bad")))
    drawn = [batches.order[p][1] for p in range(batches._own[0].taken)]
    assert reported + waiting == drawn.count(9) >= 5


def sample(tokens, tiles=0, min_length=10, name="s"):
    labels = np.where(np.arange(tokens) < 5, -100, 1)
    return {
        "input_ids": np.arange(tokens),
        "labels": labels,
        "image_flags": np.ones(tiles),
        "min_length": min_length,
        "name": name,
    }


def test_overflow_cuts_the_last_answer_but_nothing_that_must_stay():
    def packed(first, second, allow_overflow=True):
        packer = Packer(100, 10, allow_overflow=allow_overflow)
        row = packer.add(first) or packer.add(second)
        return row and [len(s["input_ids"]) for s in row]

    assert packed(sample(60), sample(70, min_length=40)) == [60, 40]
    assert packed(sample(60), sample(70, min_length=40), allow_overflow=False) is None
    assert packed(sample(60), sample(70, min_length=41)) is None  # the rest of a picture would be lost
    assert packed(sample(40), sample(70)) is None  # not yet half full
    assert packed(sample(60, tiles=6), sample(70, tiles=5)) is None


def test_encoders_say_what_must_stay(dataset):
    for i in (0, 12):
        made = dataset[i]
        first = int(np.flatnonzero(made["labels"] >= 0)[0])
        assert made["min_length"] == first + 1


def test_the_fullest_row_that_has_room_is_chosen_and_the_fullest_is_finished_first():
    packer = Packer(100, 10, buffer_size=2)
    assert [packer.add(sample(n, name=str(n))) for n in (50, 70)] == [None, None]
    assert packer.add(sample(20, name="20")) is None
    assert [[s["name"] for s in row] for row in packer.rows] == [["50"], ["70", "20"]]
    assert [s["name"] for s in packer.add(sample(60, name="60"))] == ["70", "20"]
    assert [s["name"] for s in packer.add(sample(40, name="40"))] == ["60", "40"]


def test_a_row_is_full_at_its_number_of_tiles():
    packer = Packer(100, 10)
    assert packer.add(sample(10, tiles=4)) is None
    assert len(packer.add(sample(10, tiles=6))) == 2


def test_samples_larger_than_a_row():
    for big in (sample(101), sample(10, tiles=11)):
        with pytest.raises(ConfigError, match="more than max_packed_tokens .100. or num_images_expected .10."):
            Packer(100, 10).add(big)


def test_limits_that_do_not_fit_together(tmp_path):
    for options, message in (
        ({"max_seq_length": 700, "max_tiles": 10}, "max_seq_length .700. is larger than max_packed_tokens .600."),
        ({"max_seq_length": 300}, "max_tiles must be at most num_images_expected .10."),
    ):
        with pytest.raises(ConfigError, match=message):
            make_batches(make_dataset(tmp_path, [picture_record()], make_encoder(**options)))
