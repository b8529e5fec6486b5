"""Records to samples: equal to the original's where it has a reference, and never another sample in silence."""

import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image, ImageFile

from paddlemix.datasets.internvl2 import BadSampleLog, Collator, InternVLDataset, measure, read_meta
from paddlemix.errors import ConfigError, DataError, UserError
from tests.conftest import FAMILIES, REFERENCE, tiles
from tests.datasets.helpers import (
    checkpoint,
    labelled_text,
    make_dataset,
    make_encoder,
    picture_record,
    talk,
    write_meta,
)


@pytest.mark.parametrize("family", FAMILIES)
def test_reference_samples_come_out_exactly(family, tmp_path):
    expected = json.loads((REFERENCE / family / "expected.json").read_text(encoding="utf-8"))["train_samples"]
    marked = ["<image>" in sample["conversations"][0]["value"] for sample in expected]
    records = [{"conversations": s["conversations"], **({"image": "img1.png"} if m else {})} for s, m in zip(expected, marked)]
    dataset = make_dataset(tmp_path, records, make_encoder(family))
    for i, (sample, has_picture) in enumerate(zip(expected, marked)):
        made = dataset[i]
        assert made["input_ids"].tolist() == sample["input_ids"]
        assert made["labels"].tolist() == sample["labels"]
        assert np.array_equal(made["pixel_values"], tiles(1) if has_picture else np.empty((0, 3, 112, 112)))
        assert made["image_flags"].tolist() == [1] * (sample["num_tiles"] if has_picture else 0)
        assert made["name"] == f"{tmp_path / 'set.jsonl'}:{i + 1}" and made["bad"] == []


def test_a_single_picture_without_mark_gets_one_in_front(tmp_path):
    records = [picture_record(question="What is it?"), picture_record(question="<image>\nWhat is it?")]
    records.append(records[0] | {"image": ["img1.png"]})
    dataset = make_dataset(tmp_path, records)
    for i in (0, 2):
        assert dataset[i]["input_ids"].tolist() == dataset[1]["input_ids"].tolist()


def test_a_mark_in_a_later_turn_is_left_there(tmp_path):
    record = {"image": "img1.png", "conversations": [*talk("Hello", "Hi"), *talk("<image>\nAnd this?", "A dog.")]}
    encoder = make_encoder()
    (sample,) = (make_dataset(tmp_path, [record], encoder)[0],)
    text = encoder.tokenizer.decode(sample["input_ids"].tolist())
    assert text.count("<img>") == 1 and text.index("Hello") < text.index("<img>") < text.index("And this?")


@pytest.mark.parametrize("limit, pictures, each", [(6, 2, 3), (6, 4, 1), (6, 7, 1), (12, 3, 4)])
def test_the_tile_limit_is_shared_by_the_pictures(tmp_path, limit, pictures, each):
    record = {"image": ["img2.png"] * pictures, "conversations": talk("<image>\n" * pictures)}
    sample = make_dataset(tmp_path, [record], make_encoder(max_dynamic_patch=limit))[0]
    one = tiles(2, max_num=each)
    assert len(sample["pixel_values"]) == pictures * len(one)
    assert np.array_equal(sample["pixel_values"][: len(one)], one)
    context = checkpoint("qwen2")[0].require_token_id("<IMG_CONTEXT>")
    assert (sample["input_ids"] == context).sum() == 16 * len(sample["pixel_values"])


def test_a_data_set_can_have_its_own_tile_limit(tmp_path):
    dataset = make_dataset(tmp_path, [picture_record(2)], max_dynamic_patch=2)
    assert np.array_equal(dataset[0]["pixel_values"], tiles(2, max_num=2))


def test_without_dynamic_size_a_picture_is_one_tile(tmp_path):
    stretched, padded = (
        make_dataset(tmp_path, [picture_record()], make_encoder(dynamic_image_size=False, pad2square=pad))[0]["pixel_values"]
        for pad in (False, True)
    )
    assert stretched.shape == padded.shape == (1, 3, 112, 112)
    assert np.abs(padded[0, :, :, 0]).max() < 0.02  # 333x500 padded at the sides with the mean colour, which is 0
    assert np.abs(stretched[0, :, :, 0]).max() > 0.1


def test_a_system_turn_replaces_the_system_message(tmp_path):
    encoder = make_encoder()
    record = {"conversations": [{"from": "system", "value": "You are a parrot."}, *talk()]}
    sample = make_dataset(tmp_path, [record], encoder)[0]
    text = encoder.tokenizer.decode(sample["input_ids"].tolist())
    assert text.startswith("<|im_start|>system\nYou are a parrot.<|im_end|>")
    assert labelled_text(sample, encoder) == "A picture.<|im_end|>"


# Augmentation.


def test_jpeg_augmentation_depends_on_seed_epoch_and_index_alone(tmp_path):
    records = [picture_record(0)] * 2
    dataset = make_dataset(tmp_path, records, data_augment=True)
    plain = make_dataset(tmp_path, records, name="plain")[0]["pixel_values"]
    again = make_dataset(tmp_path, records, data_augment=True)
    other_seed = make_dataset(tmp_path, records, data_augment=True, seed=1)
    first = dataset[0, 0]["pixel_values"]
    assert np.array_equal(first, again[0]["pixel_values"])
    for other in (dataset[1, 0], dataset[0, 1], other_seed[0]):
        assert not np.array_equal(first, other["pixel_values"])
    assert 0 < np.abs(first - plain).mean() < 0.1  # slightly damaged, still the same picture
    assert dataset[0]["input_ids"].tolist() == dataset[1, 1]["input_ids"].tolist()


def test_jpeg_qualities_are_uniform_from_75_to_100(monkeypatch):
    from paddlemix.datasets.internvl2 import encoding

    qualities, save = [], Image.Image.save
    picture = Image.new("RGB", (8, 8))
    monkeypatch.setattr(Image.Image, "save", lambda self, *a, **k: (qualities.append(k["quality"]), save(self, *a, **k))[1])
    rng = np.random.default_rng(0)
    for _ in range(2600):
        encoding._recompressed(picture, rng)
    counts = Counter(qualities)
    assert sorted(counts) == list(range(75, 101))
    assert min(counts.values()) > 60 and max(counts.values()) < 145


def test_augmented_pictures_are_padded_too(tmp_path):
    """The original drops pad2square where it augments."""
    encoder = make_encoder(dynamic_image_size=False, pad2square=True)
    pixels = make_dataset(tmp_path, [picture_record()], encoder, data_augment=True)[0]["pixel_values"]
    assert np.abs(pixels[0, :, :, 0]).max() < 0.02


# Video.


@pytest.fixture
def video(tmp_path):
    """A GIF of 40 frames, ten a second, whose grey level tells the frame."""
    frames = [Image.new("L", (32, 32), 6 * i) for i in range(40)]
    frames[0].save(tmp_path / "v.gif", save_all=True, append_images=frames[1:], duration=100)
    return tmp_path / "v.gif"


def frame_numbers(sample):
    mean, std = 0.485, 0.229
    grey = sample["pixel_values"][:, 0].mean(axis=(1, 2)) * std + mean
    return np.rint(grey * 255 / 6).astype(int).tolist()


def video_record(question="<video>\nWhat happens?", **more):
    return {"video": "v.gif", "conversations": talk(question), **more}


def test_videos_become_numbered_frames(tmp_path, video):
    encoder = make_encoder(min_num_frame=4, max_num_frame=4, sampling_method="middle")
    records = [video_record(), video_record("What happens?"), video_record("See <video>: what?")]
    dataset = make_dataset(tmp_path, records, encoder, root=str(tmp_path))
    sample = dataset[0]
    assert sample["bad"] == []
    assert frame_numbers(sample) == [4, 14, 24, 34]
    text = encoder.tokenizer.decode(sample["input_ids"].tolist())
    picture = "<img>" + "<IMG_CONTEXT>" * 16 + "</img>"
    lines = "".join(f"Frame-{i}: {picture}\n" for i in range(1, 5))
    assert f"<|im_start|>user\n{lines}What happens?<|im_end|>" in text  # the newline behind the last frame is kept
    assert dataset[1]["input_ids"].tolist() == sample["input_ids"].tolist()
    assert f"See {lines}: what?" in encoder.tokenizer.decode(dataset[2]["input_ids"].tolist())


def test_the_line_of_a_frame_can_be_that_of_the_chat_demo(tmp_path, video):
    from paddlemix.processors.internvl2 import frame_prefix

    encoder = make_encoder(min_num_frame=2, max_num_frame=2, frame_format="Frame{}: <image>\n")
    sample = make_dataset(tmp_path, [video_record()], encoder, root=str(tmp_path))[0]
    text = encoder.tokenizer.decode(sample["input_ids"].tolist()).replace("<IMG_CONTEXT>", "")
    assert frame_prefix(2).replace("<image>", "<img></img>") in text


def test_random_frames_lie_one_in_each_interval_and_their_number_varies(tmp_path, video):
    encoder = make_encoder(min_num_frame=3, max_num_frame=8)
    dataset = make_dataset(tmp_path, [video_record()], encoder, root=str(tmp_path))
    drawn = [frame_numbers(dataset[epoch, 0]) for epoch in range(30)]
    assert {len(numbers) for numbers in drawn} == set(range(3, 9))
    assert len({tuple(numbers) for numbers in drawn}) == 30
    for numbers in drawn:
        edges = np.linspace(0, 40, len(numbers) + 1).astype(int)
        assert all(low <= n < high for n, low, high in zip(numbers, edges, edges[1:]))
    assert frame_numbers(dataset[7, 0]) == drawn[7]


def test_a_clip_bounds_the_frames(tmp_path, video):
    dataset = make_dataset(tmp_path, [video_record(clip=[1.0, 2.0])], make_encoder(), root=str(tmp_path))
    for epoch in range(5):
        numbers = frame_numbers(dataset[epoch, 0])
        assert min(numbers) >= 10 and max(numbers) <= 20


def test_videos_that_do_not_fit_name_the_frames_as_the_remedy(tmp_path, video):
    dataset = make_dataset(tmp_path, [video_record()], make_encoder(max_seq_length=100), root=str(tmp_path))
    with pytest.raises(DataError, match="max_seq_length is 100: raise it, or lower max_num_frame"):
        dataset[0]


# Length.


def test_only_text_behind_the_last_picture_is_cut(tmp_path):
    record = picture_record()
    record["conversations"] = talk("<image>\nDescribe.", "word " * 300)
    whole = make_dataset(tmp_path, [record])[0]
    context = checkpoint("qwen2")[0].require_token_id("<IMG_CONTEXT>")
    first_label = int(np.flatnonzero(whole["labels"] >= 0)[0])
    cut = make_dataset(tmp_path, [record], make_encoder(max_seq_length=first_label + 3))[0]
    assert len(cut["input_ids"]) == first_label + 3
    assert cut["labels"].tolist() == whole["labels"][: first_label + 3].tolist()
    assert np.array_equal(cut["pixel_values"], whole["pixel_values"])

    with pytest.raises(DataError, match=f"no token of an answer within max_seq_length .{first_label}.: raise it, or shorten"):
        make_dataset(tmp_path, [record], make_encoder(max_seq_length=first_label))[0]
    last_picture = int(np.flatnonzero(whole["input_ids"] == context)[-1])
    with pytest.raises(DataError, match="has no token of an answer"):  # the picture just fits, its end token included
        make_dataset(tmp_path, [record], make_encoder(max_seq_length=last_picture + 2))[0]
    with pytest.raises(DataError, match=f"needs {last_picture + 2} tokens .* raise it, or lower max_dynamic_patch"):
        make_dataset(tmp_path, [record], make_encoder(max_seq_length=last_picture + 1))[0]


def test_a_picture_in_an_unanswered_question_is_no_surplus_of_features(tmp_path):
    record = {"image": "img1.png", "conversations": [*talk(), {"from": "human", "value": "<image>\nAnd this?"}]}
    with pytest.raises(DataError, match="picture in its last question, which has no answer"):
        make_dataset(tmp_path, [record])[0]


def test_samples_with_too_many_tiles_for_a_packed_row(tmp_path):
    with pytest.raises(DataError, match="has 7 tiles but 6 fit: raise num_images_expected, or lower max_dynamic_patch"):
        make_dataset(tmp_path, [picture_record()], make_encoder(max_tiles=6))[0]
    assert len(make_dataset(tmp_path, [picture_record()], make_encoder(max_tiles=7))[0]["image_flags"]) == 7


# Records that cannot be used.

BROKEN = [
    ('{"conversations": ', "not valid JSON"),
    (picture_record(9), "img9.png' does not exist"),
    ({"image": "README.md", "conversations": talk()}, "does not exist|not a picture"),
    ({"conversations": talk("<image>\nq")}, "1 <image> mark"),
    ({"image": ["img0.png", "img1.png"], "conversations": talk("<image>\nq")}, "1 <image> mark.* 2 picture"),
    ({"conversations": talk(answer="")}, "no answer to learn"),
    ({"conversations": [*talk(), *talk()[1:]]}, "turn 3 .* from 'gpt' where 'human'"),
    ({"conversations": talk("broken \ud83d text")}, "surrogate"),
    ({"video": "v.mp4", "conversations": talk()}, "v.mp4' does not exist"),
]


@pytest.mark.parametrize("record, reason", BROKEN, ids=[reason for _, reason in BROKEN])
def test_a_bad_record_is_named_and_replaced_by_the_next(tmp_path, record, reason):
    dataset = make_dataset(tmp_path, [picture_record(0), record, record, picture_record(1, question="The next one")])
    sample, follower = dataset[1], dataset[3]
    assert sample["name"] == follower["name"] == f"{tmp_path / 'set.jsonl'}:4"
    assert sample["input_ids"].tolist() == follower["input_ids"].tolist()
    assert [entry["line"] for entry in sample["bad"]] == [2, 3] and follower["bad"] == []
    for entry in sample["bad"]:
        assert entry["dataset"] == "set" and entry["file"] == str(tmp_path / "set.jsonl")
    with pytest.raises(UserError, match=reason):
        raise UserError(sample["bad"][0]["reason"])


def test_half_a_picture_is_bad_even_where_pillow_was_told_to_accept_it(tmp_path, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 255, (200, 300, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.jpg")
    (tmp_path / "half.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:9000])
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    records = [{"image": name, "conversations": talk()} for name in ("half.jpg", "whole.jpg")]
    sample = make_dataset(tmp_path, records, root=str(tmp_path))[0]
    assert sample["name"].endswith(":2") and "half.jpg' is damaged or cut off" in sample["bad"][0]["reason"]


def test_the_last_record_is_replaced_by_the_first(tmp_path):
    dataset = make_dataset(tmp_path, [picture_record(0), picture_record(9)])
    assert dataset[1]["name"].endswith(":1")


def test_nothing_but_bad_records_ends_instead_of_trying_for_ever(tmp_path):
    for count, tried in ((3, 3), (500, 20)):
        dataset = make_dataset(tmp_path, [picture_record(9)] * count)
        with pytest.raises(DataError, match=rf"{tried} records in a row cannot be used.*set.jsonl:1: picture file .*img9.png"):
            dataset[0]


def test_programming_errors_are_not_taken_for_bad_records(tmp_path, monkeypatch):
    encoder = make_encoder()
    monkeypatch.setattr(encoder, "encode", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make_dataset(tmp_path, [picture_record()], encoder)[0]


def batches_of(dataset, size=4):
    collate = Collator()
    return (collate([dataset[i] for i in range(at, at + size)]) for at in range(0, len(dataset), size))


def test_bad_samples_are_counted_and_logged_once(tmp_path):
    dataset = make_dataset(tmp_path, [{"conversations": talk()}] * 6 + [picture_record(9), {"conversations": talk()}])
    log = BadSampleLog(tmp_path / "logs" / "bad.jsonl")
    for _ in range(3):
        for batch in batches_of(dataset):
            assert "bad" not in log.take(batch)
    assert (log.seen, log.bad) == (27, 3)
    (entry,) = [json.loads(line) for line in (tmp_path / "logs" / "bad.jsonl").read_text().splitlines()]
    assert (entry["dataset"], entry["line"]) == ("set", 7) and "img9.png" in entry["reason"]


def test_training_stops_when_too_many_samples_are_bad(tmp_path):
    good, bad = {"conversations": talk()}, picture_record(9)
    dataset = make_dataset(tmp_path, [good, bad] * 20)
    log = BadSampleLog(tmp_path / "bad.jsonl", max_share=0.1, handful=3)
    with pytest.raises(DataError, match=r"4 of 12 samples could not be used, more than 10.0%: .*set.jsonl:8: .*img9.png"):
        for batch in batches_of(dataset):
            log.take(batch)
    few = make_dataset(tmp_path, [good] * 399 + [bad], name="few")
    log = BadSampleLog(max_share=0.01, handful=0)
    for batch in batches_of(few):  # the bad one is the 400th, one in four hundred
        log.take(batch)
    assert log.bad == 1
    with pytest.raises(DataError, match="1 of 2 samples"):
        BadSampleLog(max_share=0.01, handful=0).take(Collator()([few[399]]))


def test_wrong_options_and_indices():
    with pytest.raises(ConfigError, match="min_num_frame .9. and max_num_frame .8."):
        make_encoder(min_num_frame=9, max_num_frame=8)
    with pytest.raises(ConfigError, match="sampling_method is 'fps2'"):
        make_encoder(sampling_method="fps2")
    with pytest.raises(ConfigError, match="frame_format"):
        make_encoder(frame_format="Frame {}")
    with pytest.raises(UserError, match="template 'vicuna'"):
        make_encoder(template="vicuna")


def test_an_index_out_of_range(tmp_path):
    dataset = make_dataset(tmp_path, [picture_record()])
    for index in (1, -1):
        with pytest.raises(IndexError):
            dataset[index]


# Several sources, and lengths.


def two_sources(tmp_path):
    metas = {}
    texts = [{"conversations": talk(f"text {i}", "a " * i + "end")} for i in range(5)]
    write_meta(tmp_path, texts, name="texts")
    write_meta(tmp_path, [picture_record(i % 4) for i in range(6)], name="pictures", repeat_time=2)
    for name in ("texts", "pictures"):
        metas |= json.loads((tmp_path / f"{name}.json").read_text())
    (tmp_path / "both.json").write_text(json.dumps(metas))
    return read_meta(tmp_path / "both.json")


def test_sources_follow_one_another(tmp_path):
    dataset = InternVLDataset(two_sources(tmp_path), make_encoder())
    assert len(dataset) == 5 + 12 and dataset.source_sizes() == [5, 12]
    names = [dataset[i]["name"].rsplit("/", 1)[1] for i in range(len(dataset))]
    assert names == [f"texts.jsonl:{i + 1}" for i in range(5)] + [f"pictures.jsonl:{i + 1}" for i in range(6)] * 2


def test_measured_tiles_are_exact_and_tokens_close_without_decoding(tmp_path, monkeypatch):
    dataset = InternVLDataset(two_sources(tmp_path), make_encoder())
    samples = [dataset[i] for i in range(len(dataset))]
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("a picture was decoded"))
    tokens, tiles_of = measure(dataset)
    assert tiles_of.tolist() == [len(sample["image_flags"]) for sample in samples]
    exact = np.array([len(sample["input_ids"]) for sample in samples])
    assert np.abs(tokens - exact).max() <= 2


def test_measuring_believes_stated_sizes_and_lengths_and_caps_them(tmp_path):
    encoder = make_encoder(max_seq_length=150)
    records = [picture_record(9, width=112, height=112), {"conversations": talk(), "length": 60}, picture_record(1), "{"]
    tokens, tiles_of = measure(make_dataset(tmp_path, records, encoder))
    assert tiles_of.tolist() == [1, 0, 7, 0]
    assert tokens[1] == 60 and tokens[2] == 150 and tokens[3] == 0


def test_kept_measurements_are_used_only_for_what_they_were_made_of(tmp_path, monkeypatch):
    from paddlemix.datasets.internvl2 import dataset as module

    def make(answer):
        return make_dataset(tmp_path, [{"conversations": talk(answer=answer)}])

    reads, cache = [], tmp_path / "cache"
    original = module._cost
    monkeypatch.setattr(module, "_cost", lambda *args: reads.append(1) or original(*args))
    dataset = make("a")
    first, again = measure(dataset, cache), measure(dataset, cache)
    assert len(reads) == 1 and [a.tolist() for a in again] == [a.tolist() for a in first]
    reads.clear()
    longer = make("a " * 50)
    assert measure(longer, cache)[0] > first[0] and len(reads) == 1
    measure(InternVLDataset(longer.sources, make_encoder(max_seq_length=40)), cache)
    assert len(reads) == 2
    assert {path.suffix for path in cache.iterdir()} == {".npy"}


def test_nothing_is_written_beside_the_data(tmp_path):
    dataset = make_dataset(tmp_path, [picture_record()] * 3)
    before = sorted(tmp_path.rglob("*"))
    measure(dataset)
    assert dataset[0]["bad"] == [] and sorted(tmp_path.rglob("*")) == before


def test_reading_data_needs_neither_paddle_nor_models():
    import subprocess
    import sys

    code = "import sys, paddlemix.datasets.internvl2; print('paddle' in sys.modules, 'paddlenlp' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
