"""Batches: padding by length, pictures and texts together, weights of the loss."""

import numpy as np
import pytest

from paddlemix.datasets.internvl2 import Collator
from paddlemix.errors import ConfigError
from tests.conftest import assert_close, load_reference
from tests.datasets.helpers import checkpoint, make_dataset, picture_record, talk


@pytest.fixture
def dataset(tmp_path):
    """A picture, a long text, a short text, two pictures."""
    two = {"image": ["img0.png", "img3.png"], "conversations": talk("<image><image>\nCompare.")}
    texts = [{"conversations": talk(answer="word " * 40)}, {"conversations": talk(answer="!!!!!")}]
    return make_dataset(tmp_path, [picture_record(), *texts, two])


def test_rows_are_padded_by_their_length(dataset):
    samples = [dataset[i] for i in range(4)]
    batch = Collator(pad_token_id=7)(samples)
    width = max(len(sample["input_ids"]) for sample in samples)
    for key in ("input_ids", "labels", "attention_mask", "position_ids"):
        assert batch[key].shape == (4, width) and batch[key].dtype == np.int64
    for row, sample in enumerate(samples):
        n = len(sample["input_ids"])
        assert batch["input_ids"][row].tolist() == sample["input_ids"].tolist() + [7] * (width - n)
        assert batch["labels"][row].tolist() == sample["labels"].tolist() + [-100] * (width - n)
        assert batch["attention_mask"][row].tolist() == [1] * n + [0] * (width - n)
        assert batch["position_ids"][row].tolist() == list(range(n)) + [0] * (width - n)
    assert batch["names"] == [sample["name"] for sample in samples] and batch["bad"] == []
    assert "segment_ids" not in batch and "loss_weight" not in batch


def test_id_0_is_a_word_and_stays_visible(dataset):
    """Qwen2's "!" has id 0, with which rows are also filled up."""
    tokenizer = checkpoint("qwen2")[0]
    assert tokenizer.encode("!") == [0]
    sample = dataset[2]
    words = np.flatnonzero(sample["input_ids"] == 0)
    assert len(words) == 5
    batch = Collator(pad_token_id=0)([dataset[1], sample])
    assert batch["attention_mask"][1, words].all() and (batch["labels"][1, words] == 0).all()
    assert batch["attention_mask"][1].sum() == len(sample["input_ids"])


def test_pictures_and_texts_share_a_batch_without_blank_tiles(dataset):
    samples = [dataset[i] for i in range(4)]
    batch = Collator()(samples)
    assert np.array_equal(batch["pixel_values"], np.concatenate([samples[0]["pixel_values"], samples[3]["pixel_values"]]))
    assert batch["image_flags"].tolist() == [1] * len(batch["pixel_values"])
    context = checkpoint("qwen2")[0].require_token_id("<IMG_CONTEXT>")
    assert (batch["input_ids"] == context).sum() == 16 * len(batch["pixel_values"])


def test_texts_alone_need_no_tile_unless_it_is_asked_for(dataset):
    texts = [dataset[1], dataset[2]]
    assert "pixel_values" not in Collator()(texts) and "image_flags" not in Collator()(texts)
    batch = Collator(blank_tile=True)(texts)
    assert batch["pixel_values"].shape == (1, 3, 112, 112) and batch["image_flags"].tolist() == [0]
    assert Collator(blank_tile=True)([dataset[0], dataset[1]])["image_flags"].tolist() == [1] * 7


def test_a_constant_number_of_tiles(dataset):
    batch = Collator(tiles_per_row=12)([dataset[0], dataset[1]])
    assert batch["image_flags"].tolist() == [1] * 7 + [0] * 17
    assert batch["pixel_values"].shape == (24, 3, 112, 112) and not batch["pixel_values"][7:].any()


def test_rows_of_several_samples_keep_them_apart(dataset):
    a, b, c = (dataset[i] for i in range(3))
    batch = Collator().collate_rows([[a, b], [c]])
    na, nb, nc = (len(sample["input_ids"]) for sample in (a, b, c))
    assert batch["input_ids"][0].tolist() == a["input_ids"].tolist() + b["input_ids"].tolist()
    assert batch["position_ids"][0].tolist() == [*range(na), *range(nb)]
    assert batch["segment_ids"][0].tolist() == [1] * na + [2] * nb
    assert batch["segment_ids"][1].tolist() == [1] * nc + [0] * (na + nb - nc)


@pytest.mark.parametrize("reduction, weight", [("sample", lambda n: 1 / n), ("square", lambda n: 1 / np.sqrt(n))])
def test_loss_weights(dataset, reduction, weight):
    a, b = dataset[0], dataset[1]
    batch = Collator(loss_reduction=reduction).collate_rows([[a, b]])
    na = len(a["input_ids"])
    counts = [(sample["labels"] >= 0).sum() for sample in (a, b)]
    assert counts[0] != counts[1]
    assert np.allclose(batch["loss_weight"][0, :na], weight(counts[0]))
    assert np.allclose(batch["loss_weight"][0, na:], weight(counts[1]))


def test_unknown_reduction():
    with pytest.raises(ConfigError, match="loss_reduction is 'mean': it must be one of token, sample, square"):
        Collator(loss_reduction="mean")


# What the model makes of a batch.


def loss_of(model, batch):
    inputs = {key: value for key, value in batch.items() if key not in ("names", "bad")}
    return float(model(**inputs).loss)


@pytest.mark.parametrize("reduction", ["token", "sample", "square"])
def test_padded_and_packed_batches_have_the_loss_of_the_samples_alone(dataset, reduction):
    model = load_reference("qwen2").model
    samples = [dataset[i] for i in range(4)]
    collator = Collator(loss_reduction=reduction)
    alone = [loss_of(model, Collator()([sample])) for sample in samples]
    counts = np.array([(sample["labels"] >= 0).sum() for sample in samples], dtype=float)
    weights = {"token": counts, "sample": np.ones(4), "square": np.sqrt(counts)}[reduction]
    expected = np.average(alone, weights=weights)
    assert max(alone) - min(alone) > 0.05  # else any weights would do
    assert_close(loss_of(model, collator(samples)), expected, 1e-5)
    assert_close(loss_of(model, collator.collate_rows([[samples[3], samples[1]], [samples[0], samples[2]]])), expected, 1e-5)
    assert_close(loss_of(model, collator.collate_rows([samples])), expected, 1e-5)


def test_blank_tiles_do_not_change_the_loss(dataset):
    model = load_reference("qwen2").model
    text = dataset[1]
    plain = loss_of(model, Collator()([text]))
    assert_close(loss_of(model, Collator(blank_tile=True)([text])), plain, 1e-6)
    both = [dataset[0], text]
    assert_close(loss_of(model, Collator(tiles_per_row=5)(both)), loss_of(model, Collator()(both)), 1e-6)
