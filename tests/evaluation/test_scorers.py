"""Scores equal those of the original's own scorers, whatever the order, and hold for hostile answers."""

import json
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paddlemix.errors import ConfigError, DataError
from paddlemix.evaluation import TASKS, score
from paddlemix.evaluation.scorers import NAMES, scorer
from paddlemix.evaluation.scorers.captions import tokenize
from paddlemix.evaluation.scorers.judged import llava_bench, mmhal
from tests.conftest import DATA

FILES = sorted((DATA / "evaluation").glob("*.json"))


def cases(path):
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_scores_equal_the_original(path):
    case = cases(path)
    predictions, references = case["predictions"], case["references"]
    mixed = random.Random(0).sample(predictions, len(predictions))
    scores, each = score(path.stem, mixed, references, each=True)
    if path.stem == "llava-bench":  # of which the original counts unreadable reviews too
        assert scores["unreadable"] == 13
        return
    assert scores == pytest.approx(case["score"], abs=1e-6)
    assert each == pytest.approx(case.get("each", each), abs=1e-6)
    order = random.Random(1).sample(range(len(references)), len(references))
    again, permuted = score(path.stem, predictions, [references[i] for i in order], each=True)
    assert again == pytest.approx(case["score"], abs=1e-6)
    if path.stem != "caption-coco":  # CIDEr adds up floats
        assert permuted == [each[i] for i in order]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_question_without_an_answer_is_wrong(path):
    case = cases(path)
    scores, each = score(path.stem, [], case["references"], each=True)
    assert not any(each)
    if path.stem not in ("llava-bench", "vqa-chartqa-test"):
        assert not any(value for name, value in scores.items() if not name.endswith("yes_ratio"))


def test_reviews_that_cannot_be_read_do_not_count():
    path = DATA / "evaluation" / "llava-bench.json"
    case = cases(path)
    readable = {"8,9\ny": (8, 9), "8 7\nGood": (8, 7), "7.5 8\n": (7.5, 8)}
    kept = [readable[p["review"]] for p in case["predictions"] if p["review"] in readable]
    theirs, ours = (round(sum(column) / len(kept), 3) for column in zip(*kept))
    scores = score("llava-bench", case["predictions"], case["references"])
    assert scores["all"] == round(100 * ours / theirs, 1)
    assert scores["unreadable"] == len(case["predictions"]) - len(kept)
    assert llava_bench([{"id": 1, "category": "conv"}], [None])[0] == {"unreadable": 1}
    rated = mmhal([{"id": i} for i in range(4)], ["Rating: 6, good", "rating: 2", "rating: 1 or rating: 3", None])[0]
    assert rated == {"average_score": 4, "hallucination_rate": 0.5, "unreadable": 2}


def test_captions_are_cut_into_the_words_that_the_original_compares():
    case = cases(DATA / "evaluation" / "caption-coco.json")
    for reference in case["references"]:
        assert [tokenize(text) for text in reference["captions"]] == case["tokenized"]["references"][str(reference["id"])]
    for prediction in case["predictions"]:
        assert [tokenize(prediction["answer"])] == case["tokenized"]["predictions"][str(prediction["id"])]


@pytest.mark.parametrize(
    "text, tokens",
    [  # of the Penn Treebank's rules
        ("He doesn't, can't and won't.", "he does n't ca n't and wo n't"),
        ("the dogs' 1,000 bones; we'll see...", "the dogs 1,000 bones we 'll see"),
        ("Mr. Smith - at 5:30 p.m. -- paid $5.50 (10%)", "mr. smith at 5:30 p.m. paid $ 5.50 -lrb- 10 % -rrb-"),
        ("I cannot read “this” sign", "i can not read this sign"),
    ],
)
def test_words_of_captions(text, tokens):
    assert tokenize(text) == tokens


ROWS = {
    "vqa": {"answers": ["a"] * 10},
    "letter": {"options": {"A": "x", "B": "y"}, "answer": "A"},
    "mmmu": {"question_type": "open", "answer": ["5", "five"]},
    "mmmu_pro": {"options": {"A": "x"}, "answer": "A"},
    "mmiu": {"options": {"A": "x"}, "answer": "A", "task": "point_tracking"},
    "mantis": {"options": ["(A) x"], "answer": "A", "question_type": "multi-choice"},
    "mathvista": {
        "question_type": "multi_choice",
        "answer_type": "text",
        "choices": ["x", "y"],
        "answer": "x",
        "precision": None,
    },
    "mirb": {"task": "count", "answer": "3"},
    "mvbench": {"task_type": "t", "candidates": ["x", "y"], "answer": "x"},
    "mme_realworld": {"options": ["(A) x"], "answer": "A", "category": "c", "task": "t"},
    "vlmeval": {"kind": "yes/no", "answers": ["yes"]},
    "seed": {"question_type_id": 1, "answer": "A"},
    "mme": {"category": "count", "image": "1.jpg", "answer": "Yes"},
    "pope": {"category": "random", "label": "yes"},
    "refcoco": {"bbox": [1, 2, 30, 40], "width": 100, "height": 50},
    "dior": {"bbox": [1, 2, 30, 40], "width": 100, "height": 50},
    "rsvqa": {"answer": "12m2", "type": "area"},
    "tiny_lvlm": {"group": "g", "answers": ["x"]},
    "captions": {"captions": ["a cat", "the cat"]},
    "llava_bench": {"category": "conv"},
}
ROWS |= dict.fromkeys(("scienceqa", "mmvp"), ROWS["letter"]) | {"mmhal": {}, "judged": {}}
ROWS |= {name: {"answers": ["1.5", "yes"]} for name in ("anls", "relaxed", "exact", "gqa", "contains")}


@pytest.mark.medium
@pytest.mark.parametrize("name", NAMES)
@given(
    answer=st.one_of(
        st.text(max_size=60),
        st.text(alphabet="0123456789.,[](){}%-eE :\nABnaifAnswer", max_size=40),
        st.sampled_from(["[[1e999,1,1,1]]", "[[nan,nan,nan,nan]]", "[[[[[[" * 2000, "9" * 5000, "١٢", "1_0", "inf%"]),
    )
)
@settings(max_examples=15, deadline=None)
def test_no_answer_upsets_a_scorer(name, answer):
    identity = "validation_Art_1"
    scores, each = scorer(name)([{"id": identity, **ROWS[name]}], [answer])
    assert all(math.isfinite(value) for value in [*scores.values(), *each])


def test_what_cannot_be_scored_is_named():
    references = [{"id": 1, "answers": ["a"]}]
    with pytest.raises(DataError, match="prediction 1 has no 'id'"):
        score("vqa-ai2d-test", [{"answer": "a"}], references)
    with pytest.raises(DataError, match="two predictions have the id '1'"):
        score("vqa-ai2d-test", [{"id": 1, "answer": "a"}, {"id": "1", "answer": "b"}], references)
    with pytest.raises(DataError, match="two references have the id 1"):
        score("vqa-ai2d-test", [], references * 2)
    with pytest.raises(DataError, match="question 1 has no 'answers'"):
        score("vqa-ai2d-test", [{"id": 1, "answer": "a"}], [{"id": 1}])
    with pytest.raises(DataError, match="exactly 10"):
        score("vqa-textvqa-val", [{"id": 1, "answer": "a"}], references)
    with pytest.raises(ConfigError, match="server"):
        score("vqa-docvqa-test", [], references)
    with pytest.raises(ConfigError, match="'nothing' is not known"):
        score("nothing", [], references)


def test_ids_join_as_text_and_others_are_left_out():
    predictions = [{"id": "7", "answer": " A "}, {"id": "elsewhere", "answer": "a"}]
    assert score("vqa-ai2d-test", predictions, [{"id": 7, "answers": ["a"]}]) == {"accuracy": 1}


def test_tasks_are_those_of_evaluate_sh():
    llava = [name for name, task in TASKS.items() if task.source == "llava"]
    # The 62 splits, the two halves of ChartQA, and MMMU-Pro's settings together; and LLaVA's own ten.
    assert (len(TASKS) - len(llava), len(llava)) == (65, 10)
    for name, task in TASKS.items():
        assert task.name == name and task.loader and task.files and task.max_new_tokens >= 10
        assert callable(task.scorer) or task.scorer in (*NAMES, None)
        assert task.scorer or task.submission
        assert bool(task.metric) == bool(task.scorer)
