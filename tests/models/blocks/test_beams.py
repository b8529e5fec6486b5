"""Beam search equals the original's: ids and scores of transformers' own."""

import json

import numpy as np
import paddle
import pytest

from paddlemix.errors import PromptError
from paddlemix.models.blocks.beams import beam_search
from paddlemix.models.internvl2 import ChatSession, GenerationConfig, InternVLChatModel
from tests.conftest import FAMILIES, REFERENCE, load_reference

CASES = [
    pytest.param(family, case, id=f"{family}-{i}")
    for family, cases in json.loads((REFERENCE / "beams.json").read_text()).items()
    for i, case in enumerate(cases)
]


def prompts(case):
    """Ids ``[B, N]`` padded on the left, and how many of each row are padding."""
    rows = case.get("batch") or [case["prompt"]]
    width = max(map(len, rows))
    starts = np.array([width - len(row) for row in rows])
    return np.array([[0] * int(start) + row for start, row in zip(starts, rows)]), starts


def options(case, **changes):
    return {name: case[name] for name in ("max_new_tokens", "eos_token_id", "pad_token_id")} | case["settings"] | changes


def cut(rows, expected):
    """Rows without the filling behind the length that is expected."""
    assert all(not any(row[len(wanted) :]) for row, wanted in zip(rows, expected))
    return [row[: len(wanted)] for row, wanted in zip(rows, expected)]


@pytest.mark.parametrize("family, case", CASES)
def test_ids_and_scores_equal_the_original(family, case):
    model = load_reference(family).model
    ids, starts = prompts(case)
    with paddle.no_grad():
        found, scores = beam_search(
            model.language_model, model.embed(ids), GenerationConfig(**options(case)), starts, prompt_ids=ids
        )
    assert cut(found.tolist(), case["output_ids"]) == case["output_ids"]
    if "scores" in case:
        assert np.allclose(scores, case["scores"], rtol=1e-4, atol=1e-4)
    mask = (np.arange(ids.shape[1]) >= starts[:, None]).astype("int64")
    assert np.array_equal(model.generate(None, ids, mask, **options(case)).numpy(), found)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_beam_is_as_likely_as_it_says_and_no_less_than_greedy(family):
    """Scores against one pass over the whole answer, without a cache."""
    model = load_reference(family).model
    prompt = np.arange(9, 26)[None]
    settings = dict(num_beams=4, num_return_sequences=4, max_new_tokens=7, length_penalty=0.0, eos_token_id=[3])
    with paddle.no_grad():
        found, scores = beam_search(model.language_model, model.embed(prompt), GenerationConfig(**settings))
        greedy = model.generate(None, prompt, max_new_tokens=7, eos_token_id=[3]).numpy()

        def log_probability(answer):
            whole = np.concatenate([prompt, answer[None]], axis=1)
            logits = model(None, whole).logits[0, prompt.shape[1] - 1 : -1].numpy().astype("float64")
            chosen = logits[np.arange(len(answer)), answer]
            peak = logits.max(-1)
            return (chosen - peak - np.log(np.exp(logits - peak[:, None]).sum(-1))).sum()

        ends = [list(row).index(3) + 1 if 3 in row else len(row) for row in found]
        assert np.allclose(scores, [log_probability(row[:end]) for row, end in zip(found, ends)], atol=1e-3)
        assert (np.diff(scores) <= 0).all() and len({tuple(row) for row in found}) == 4
        assert scores[0] >= log_probability(greedy[0]) - 1e-3


def test_every_engine_finds_the_same_beams():
    case = next(c for c in json.loads((REFERENCE / "beams.json").read_text())["qwen2"] if "batch" in c)
    ids, starts = prompts(case)
    mask = (np.arange(ids.shape[1]) >= starts[:, None]).astype("int64")
    path = str(load_reference("qwen2").path)
    fused = InternVLChatModel.from_pretrained(path, dtype="float32", engine="inference")
    assert cut(fused.generate(None, ids, mask, **options(case)).numpy().tolist(), case["output_ids"]) == case["output_ids"]


QUESTION = "Describe the picture."
BEAMS = dict(num_beams=4, max_new_tokens=10, length_penalty=0.5)


@pytest.mark.parametrize("family", ["qwen2", "phi3"])
def test_chat_batch_and_session_give_the_best(family, chat_pixels):
    model, tokenizer = load_reference(family).model, load_reference(family).tokenizer
    pixels, counts = chat_pixels("image")
    several = model.chat(tokenizer, pixels, QUESTION, BEAMS | {"num_return_sequences": 3})
    best, history = model.chat(tokenizer, pixels, QUESTION, BEAMS, return_history=True)
    assert isinstance(several, list) and len(several) == 3 and several[0] == best
    assert history == [(f"<image>\n{QUESTION}", best)]

    questions = [QUESTION, "Who?"]
    alone = model.chat(tokenizer, None, "Who?", BEAMS)
    patches = [counts, []]
    assert model.batch_chat(tokenizer, pixels, questions, BEAMS, patches) == [best, alone]
    answers, histories = model.batch_chat(
        tokenizer, pixels, questions, BEAMS | {"num_return_sequences": 3}, patches, return_history=True
    )
    assert answers[0] == several and answers[1][0] == alone
    assert [turns[-1][1] for turns in histories] == [best, alone]

    session = ChatSession(model, tokenizer)
    assert list(session.stream(QUESTION, pixels, BEAMS)) == [best]
    # The next round goes on from it, with what is in the cache and without.
    following = session.ask("Why?", None, {"max_new_tokens": 8})
    assert session.cached_tokens > 0
    assert following == model.chat(tokenizer, pixels, "Why?", {"max_new_tokens": 8}, history=history, num_patches_list=counts)
    assert session.ask("And?", None, BEAMS | {"num_return_sequences": 2})[0] == session.history[-1][1]


@pytest.mark.parametrize(
    "settings, told",
    [
        ({"num_beams": 0}, "num_beams is 0"),
        ({"num_beams": 2.0}, "num_beams is 2.0"),
        ({"num_beams": True}, "num_beams is True"),
        ({"num_beams": 10**6}, "num_beams is 1000000"),
        ({"num_return_sequences": 2}, r"num_return_sequences is 2, more than num_beams \(1\)"),
        ({"num_beams": 3, "num_return_sequences": 4}, "more than num_beams"),
        ({"num_beams": 2, "do_sample": True}, "use one of them"),
        ({"num_beams": 2, "length_penalty": float("nan")}, "length_penalty is nan"),
        ({"num_beams": 2, "early_stopping": "always"}, "early_stopping is always"),
        ({"num_beams": 2, "num_beam_groups": 2}, "num_beam_groups.*only 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, told):
    with pytest.raises(PromptError, match=told):
        GenerationConfig.of(settings)
