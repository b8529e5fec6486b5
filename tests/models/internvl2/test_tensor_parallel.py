"""A model over several processes (gloo, loopback) answers as the original, in every way that it is asked."""

import json

import numpy as np
import paddle
import pytest

from paddlemix.errors import ConfigError, DeviceError, ParallelError, PromptError
from paddlemix.models.internvl2 import ChatSession, InternVLChatConfig, InternVLChatModel, load_tokenizer
from paddlemix.models.internvl2.convert import convert
from paddlemix.processors.image import load_image
from tests.checkpoints.test_packed import packed_and_plain
from tests.conftest import REFERENCE, assert_close, load_reference, tiles

pytestmark = pytest.mark.slow  # starting ranks takes long

OLD = ("qwen2", "internlm2", "llama_vit6b", "phi3")
NEW = ("qwen3_moe", "gpt_oss", "qwen3", "internlm3")
BATCH = {"questions": ["What is this?", "<image>\nDescribe the picture in a few words, please.", "Who?"]}  # without a reference


def folder(family):
    return REFERENCE / family if family in OLD else REFERENCE / "internvl3" / family


def load(family, ranks):
    path = str(folder(family) / "checkpoint")
    model = InternVLChatModel.from_pretrained(path, dtype="float32", tensor_parallel=ranks)
    tokenizer = load_tokenizer(path)
    model.set_tokenizer(tokenizer)
    return model, tokenizer


def pictures(chat, size, most):
    """Pixels of a chat of the reference and the tiles of each of its pictures."""
    counts = chat["num_patches_list"] or []
    most = 1 if len(counts) > 2 else most
    parts = [load_image(str(REFERENCE / "images" / f"img{i}.png"), input_size=size, max_num=most) for i in range(len(counts))]
    return (np.concatenate(parts) if parts else None), counts


@pytest.mark.parametrize("family, ranks", [(family, ranks) for family in (*OLD, *NEW) for ranks in (2, 4)])
def test_several_ranks_answer_as_the_original(family, ranks):
    """Pictures, a clip, text, rounds, streams, batches in pages, beams: one launch, and every answer of the reference."""
    whole, _ = load(family, 1)
    expected = json.loads((folder(family) / "expected.json").read_text(encoding="utf-8"))
    arrays = dict(np.load(folder(family) / "expected.npz"))
    model, tokenizer = load(family, ranks)
    try:
        with paddle.no_grad():
            assert_close(model.extract_feature(arrays["pixel_values"]), arrays["image_features"])
            logits = model(input_ids=arrays["lm_input_ids"]).logits
            stride = int(arrays["lm_logits_stride"]) if "lm_logits_stride" in arrays else 1
            assert_close(logits[:, ::stride], arrays["lm_logits"])
        size, most = model.config.image_size, expected.get("max_num", 6)
        for i, chat in enumerate(expected["chats"]):
            pixels, counts = pictures(chat, size, most)
            session = ChatSession(model, tokenizer, history=chat["history"])
            options = {"max_new_tokens": len(chat["output_ids"])}
            ids = np.array([chat["input_ids"]])
            tokens = model.generate(pixels, ids, **options)
            assert tokens.numpy()[0].tolist() == chat["output_ids"], chat["label"]
            if i < 2:
                pieces = list(session.stream(chat["question"], pixels, options, counts))
                alone = ChatSession(whole, tokenizer, history=chat["history"])
                assert pieces == list(alone.stream(chat["question"], pixels, options, counts)) and len(pieces) > 1
                assert session.history[-1][1].strip() == chat["response"]
        batch = expected.get("batch_chat") or BATCH
        parts = [load_image(str(REFERENCE / "images" / f"img{i}.png"), input_size=size, max_num=6) for i in range(3)]
        given = np.concatenate(parts), batch["questions"]
        options = {"max_new_tokens": len(batch["output_ids"][0]) if "output_ids" in batch else batch.get("max_new_tokens", 16)}
        told = [
            known.batch_chat(tokenizer, *given, options, [len(part) for part in parts], return_history=True)
            for known in (model, whole)
        ]
        assert told[0] == told[1]
        if "responses" in batch:
            assert [turns[-1][1].strip() for turns in told[0][1]] == batch["responses"]
        beams = {"max_new_tokens": 6, "num_beams": 3}
        ids = np.array([expected["chats"][-1]["input_ids"]])
        assert (model.generate(None, ids, **beams).numpy() == whole.generate(None, ids, **beams).numpy()).all()
    finally:
        model.close()
    assert all(process.returncode is not None for process in model.workers.processes)


def test_a_session_goes_on_is_abandoned_and_grows_as_in_one_process():
    reference = load_reference("internlm2")
    model, tokenizer = load("internlm2", 2)
    options = {"max_new_tokens": 12}
    try:
        answers = []
        for known in (reference.model, model):
            session = ChatSession(known, reference.tokenizer)
            said = [session.ask("<image>\nWhat?", tiles(0), options, [7])]
            stream = session.stream("And <image>?", tiles(1), options, [7])
            next(stream)
            stream.close()
            said.append(session.ask("And now?", None, options))
            with pytest.raises(PromptError):
                session.ask("<image> <image>", tiles(1), options, [7])
            said.append(session.ask("A picture <image>, long after?", tiles(2), {"max_new_tokens": 40}, [7]))
            answers.append(said)
        assert answers[0] == answers[1]
        rng = {"max_new_tokens": 12, "do_sample": True, "temperature": 2.0}  # without a seed: rank 0 alone draws
        assert isinstance(ChatSession(model, tokenizer).ask("Say something.", None, rng), str)
    finally:
        model.close()
    with pytest.raises(ParallelError, match="closed"):
        ChatSession(model, tokenizer).ask("Hello?", None, options)


@pytest.mark.parametrize("family, weight_dtype", [("qwen2", "int8"), ("internlm2", "int4"), ("qwen3_moe", "int8")])
def test_weights_in_few_bits_are_as_near_to_all_bits_as_those_of_one_process(family, weight_dtype):
    """Each rank rounds its own share: where inputs are divided, the groups that have a scale are others."""
    path = str(folder(family) / "checkpoint")
    ids = np.arange(40, 90)[None]
    few = dict(weight_dtype=weight_dtype, quantize_parts="language,projector,vision")
    exact, whole = (InternVLChatModel.from_pretrained(path, "float32", "eager", **more) for more in ({}, few))
    model = InternVLChatModel.from_pretrained(path, "float32", tensor_parallel=2, **few)
    pixels = np.random.default_rng(0).normal(size=(2, 3, *[exact.config.image_size] * 2)).astype("float32")
    try:
        with paddle.no_grad():
            for compute in (lambda m: m(input_ids=ids).logits, lambda m: m.extract_feature(pixels)):
                right, one, two = (compute(known).numpy() for known in (exact, whole, model))
                errors = [np.sqrt(np.square(found - right).mean() / np.square(right).mean()) for found in (one, two)]
                assert 0 < errors[1] < 1.2 * errors[0], errors
        held = [sum(layer.quantised.nbytes for layer in m.quantised_layers.values()) for m in (model, whole)]
        assert 0.2 < held[0] / held[1] < 0.65
    finally:
        model.close()


@pytest.mark.parametrize(
    "family, form, near",
    [
        ("llama_vit6b", "awq", 1e-5),  # groups begin where shares do: the same codes
        ("phi3", "gptq_8", 1e-5),
        ("llama_vit6b", "own", 1e-5),
        ("internlm2", "gptq", 4e-2),  # the inputs of two layers are cut in groups' middle, and rounded anew in 8 bits
        ("llama_vit6b", "gptq_order", 4e-2),  # and here groups have inputs from everywhere
    ],
)
def test_checkpoints_in_few_bits_answer_as_in_one_process(tmp_path, family, form, near):
    """AWQ, GPTQ and our own: each rank has its rows or inputs of the codes in the files."""
    source = folder(family) / "checkpoint"
    if form == "own":
        path, options = tmp_path / "own", dict(weight_dtype="int4", quantize_parts="language,projector,vision")
        convert(str(source), str(path), **options)
    else:
        path, _ = packed_and_plain(tmp_path, source, form, 32)
    ids = np.random.default_rng(1).integers(0, 700, [1, 40])
    whole = InternVLChatModel.from_pretrained(str(path), "float32", "eager")
    model = InternVLChatModel.from_pretrained(str(path), "float32", tensor_parallel=2)
    try:
        with paddle.no_grad():
            one, two = (known(input_ids=ids).logits.numpy() for known in (whole, model))
            assert np.abs(two - one).max() < near * np.abs(one).max()
            if near == 1e-5:
                pixels = np.random.default_rng(0).normal(size=(2, 3, *[whole.config.image_size] * 2)).astype("float32")
                features = [known.extract_feature(pixels).numpy() for known in (whole, model)]
                assert np.abs(features[1] - features[0]).max() < near * np.abs(features[0]).max()
                answers = [known.generate(None, ids, max_new_tokens=12).numpy() for known in (whole, model)]
                assert (answers[0] == answers[1]).all()
                kept = {name: layer.quantised.bits for name, layer in model.quantised_layers.items()}
                assert kept == {name: whole.quantised_layers[name].quantised.bits for name in kept} and len(kept) >= 8
        held = [sum(layer.quantised.nbytes for layer in m.quantised_layers.values()) for m in (model, whole)]
        assert held[0] / held[1] < 0.75
    finally:
        model.close()


def test_what_cannot_be_is_said_before_anything_starts():
    path = str(REFERENCE / "qwen2" / "checkpoint")
    with pytest.raises(ConfigError, match="tensor_parallel is 5: .* over 1 to 4 ranks"):
        InternVLChatModel.from_pretrained(path, tensor_parallel=5)
    with pytest.raises(ConfigError, match="tensor_parallel is 'two'"):
        InternVLChatModel.from_pretrained(path, tensor_parallel="two")
    with pytest.raises(ConfigError, match="tensor_parallel is 0"):
        InternVLChatModel.from_pretrained(path, tensor_parallel=0)
    with pytest.raises(DeviceError, match="--engine inference packs whole weights"):
        InternVLChatModel.from_pretrained(path, engine="inference", tensor_parallel=2)
    assert InternVLChatModel.from_pretrained(path, tensor_parallel="auto").group is None  # ranks on CPU share its memory


def test_every_head_is_somewhere_with_its_key():
    """25 heads over 2, 4 and 8 ranks, and key heads that several ranks share: each head is somewhere, and with its key."""
    from paddlemix.models.blocks.division import Division, head_shares

    for heads, keys in ((14, 2), (48, 8), (64, 8), (28, 4), (32, 32), (6, 2), (12, 2), (40, 8)):
        for size in (1, 2, 3, 4, 6, 8):
            if size > heads:
                continue
            shares = head_shares(heads, keys, size)
            assert len(shares) == size
            queries = [head for (a, b), _ in shares for head in range(a, b)]
            assert queries == list(range(heads))
            for (a, b), (c, d) in shares:
                assert (b - a) % (d - c) == 0 or b == a
                group = (b - a) // (d - c)
                assert [head // (heads // keys) for head in range(a, b)] == [c + i // group for i in range(b - a)]
    config = InternVLChatConfig.from_pretrained(str(REFERENCE / "llama_vit6b" / "checkpoint"))
    for size in (2, 3, 4):
        divisions = [Division(config, rank, size) for rank in range(size)]
        for weight in config.weight_table():
            shares = [division.share(weight.name) for division in divisions]
            if shares[0] is None:
                continue
            seen = np.zeros(weight.shape[shares[0].axis], int)
            for share in shares:
                for start, count in share.runs:
                    seen[start : start + count] += 1
            assert (seen >= 1).all() and (size <= 2 or "qkv" in weight.name or (seen == 1).all()), weight.name
