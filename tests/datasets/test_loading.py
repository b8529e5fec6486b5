"""Worker processes hand over what the data set gives, and say what went wrong."""

import numpy as np
import pytest

from paddlemix.datasets.internvl2 import BatchLoader, Collator, SampleOrder, TrainBatchSampler
from paddlemix.errors import DataError
from tests.datasets.helpers import make_dataset, make_encoder, picture_record, talk


def same(batch, wanted):
    assert batch.keys() == wanted.keys()
    for key, value in wanted.items():
        if isinstance(value, np.ndarray):
            assert batch[key].dtype == value.dtype and np.array_equal(batch[key], value)
        else:
            assert batch[key] == value
    return True


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_do_not_depend_on_the_number_of_workers(tmp_path, workers):
    records = [picture_record(0), {"conversations": talk()}, picture_record(9), {"conversations": talk("a", "b")}]
    dataset = make_dataset(tmp_path, records, make_encoder(max_dynamic_patch=2), data_augment=True)
    sampler = TrainBatchSampler(SampleOrder(dataset.source_sizes()), batch_size=2, steps=4)
    expected = [Collator()([dataset[key] for key in keys]) for keys in sampler]
    loader = BatchLoader(dataset, sampler, Collator(), num_workers=workers)
    assert len(loader) == 4
    assert all(same(batch, wanted) for batch, wanted in zip(loader, expected, strict=True))
    assert sum(len(batch["bad"]) for batch in expected) == 2  # eight samples are two epochs


@pytest.mark.parametrize("workers", [0, 1])
def test_empty_arrays_pass(tmp_path, workers):
    dataset = make_dataset(tmp_path, [{"conversations": talk()}])
    (sample,) = BatchLoader(dataset, [[0]], lambda samples: samples[0], num_workers=workers)
    assert same(sample, dataset[0]) and sample["pixel_values"].shape == (0, 3, 112, 112)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unusable_data_set_ends_the_run_with_its_sentence(tmp_path, workers):
    dataset = make_dataset(tmp_path, [picture_record(9)] * 30)
    with pytest.raises(DataError, match="20 records in a row cannot be used, the first of them .*set.jsonl:1: picture file"):
        list(BatchLoader(dataset, [[0, 1], [2, 3]], Collator(), num_workers=workers))


def test_a_programming_error_in_a_worker_shows_where_it_happened(tmp_path, monkeypatch):
    dataset = make_dataset(tmp_path, [{"conversations": talk()}])
    monkeypatch.setattr(dataset.encoder, "encode", lambda *args: 1 / 0)
    with pytest.raises(RuntimeError, match=r"(?s)while loading sample 0:.*in __getitem__.*ZeroDivisionError"):
        list(BatchLoader(dataset, [[0]], Collator(), num_workers=1))
