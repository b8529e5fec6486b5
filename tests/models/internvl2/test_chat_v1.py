"""InternVL-Chat V1.1, V1.2 and V1.5: features, logits, answers and samples are the original's."""

import functools
import json
import shutil
from types import SimpleNamespace

import numpy as np
import paddle
import pytest

from paddlemix.models.internvl2 import InternVLChatModel, encode_conversations, get_template, load_tokenizer
from paddlemix.processors.image import load_image
from tests.conftest import REFERENCE

VERSIONS = ("v1_1", "v1_2", "v1_5")


@functools.cache
def load(version):
    folder = REFERENCE / "chat_v1" / version
    return SimpleNamespace(
        path=folder / "checkpoint",
        model=InternVLChatModel.from_pretrained(str(folder / "checkpoint"), dtype="float32"),
        tokenizer=load_tokenizer(str(folder / "checkpoint")),
        expected=json.loads((folder / "expected.json").read_text(encoding="utf-8")),
        arrays=dict(np.load(folder / "expected.npz")),
    )


@pytest.fixture(params=VERSIONS)
def reference(request):
    return load(request.param)


def near(actual, expected):
    assert np.abs(np.asarray(actual) - expected).max() <= 1e-4 * np.abs(expected).max()


def tiles(name):
    name, _, most = name.partition(" max_num ")
    picture = str(REFERENCE / "images" / f"{name}.png")
    if most:
        return load_image(picture, input_size=112, max_num=int(most), use_thumbnail=True)
    return load_image(picture, input_size=112, dynamic=False)


def test_features_and_logits_equal_the_original(reference):
    stride = reference.expected["pixels_stride"]
    given = np.concatenate([tiles("img0"), tiles("img3")])
    near(given[:, :, ::stride, ::stride], reference.arrays["card_pixels"])
    near(reference.model.extract_feature(given).numpy(), reference.arrays["image_features"])
    ids = paddle.to_tensor(reference.arrays["lm_input_ids"].astype("int64"))
    language = reference.model.language_model
    logits = language.lm_head(language(language.embed(ids))).numpy()
    near(logits[:, :: reference.expected["lm_logits_stride"]], reference.arrays["lm_logits"])


def test_answers_equal_the_original(reference):
    for chat in reference.expected["chats"]:
        parts = [tiles(name) for name in chat["pictures"]]
        given = np.concatenate(parts) if parts else None
        answer = reference.model.chat(
            reference.tokenizer,
            given,
            chat["question"],
            {"max_new_tokens": len(chat["output_ids"])},
            chat["history"] and [tuple(turn) for turn in chat["history"]],
            num_patches_list=chat["num_patches_list"],
        )
        assert answer == chat["response"], chat["label"]


def test_a_batch_answers_as_the_original(reference):
    batch = reference.expected["batch_chat"]
    given = np.concatenate([tiles(name) for name in batch["pictures"]])
    answers = reference.model.batch_chat(reference.tokenizer, given, batch["questions"], {"max_new_tokens": 16})
    assert answers in (batch["one_by_one"], batch["responses"])  # rotary scaling by the longest row, where it is dynamic


def samples(reference, tokenizer):
    template = get_template(reference.expected["template"])
    for sample in reference.expected["train_samples"]:
        counts = [sample["num_tiles"] * reference.expected["num_image_token"]] if sample["num_tiles"] else []
        yield sample, encode_conversations(sample["conversations"], tokenizer, template, counts)


def test_samples_equal_the_original(reference):
    for sample, (input_ids, labels) in samples(reference, reference.tokenizer):
        assert input_ids == sample["input_ids"]
        assert labels == sample["labels"]


def test_rounds_are_tokenised_as_parts_of_the_whole(tmp_path):
    """With ``legacy: false`` the question after an answer's end does not begin with a word mark of its own."""
    reference = load("v1_1")
    shutil.copytree(reference.path, tmp_path / "v")
    path = tmp_path / "v" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "legacy": False}))
    tokenizer, template = load_tokenizer(str(tmp_path / "v")), get_template("internvl_zh")
    several = 0
    for sample, (input_ids, labels) in samples(reference, tokenizer):
        turns = [turn for turn in sample["conversations"] if turn["from"] != "system"]
        turns = turns[next(i for i, turn in enumerate(turns) if turn["from"] == "human") :]
        if sample["num_tiles"] or len(turns) < 4:
            continue
        several += 1
        pairs = [(turns[i]["value"], turns[i + 1]["value"]) for i in range(0, len(turns) - 1, 2)]
        whole = "".join(before + answer for before, answer in template.rounds(pairs))
        assert input_ids == tokenizer.encode(whole)
        assert [label for label in labels if label >= 0].count(tokenizer.eos_token_id) == len(pairs)
    assert several
