"""Short answers: accuracy over annotators, edit distance, numbers with a tolerance, equality.

Rules: EvalAI's answer processor (as in Pythia, LLaVA and InternVL), DocVQA's ANLS, ChartQA's relaxed accuracy as Qwen-VL
writes it, LVLM-eHub's containment, RSVQA's ranges.
"""

import functools
import json
import re
from pathlib import Path

from paddlemix.errors import DataError

from . import field, mean, means_by

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_PERIOD = re.compile(r"\.(?!\d)")  # the look-behind that the source means is written so that it always holds
_COMMA_IN_NUMBER = re.compile(r"(?<=\d),+(?=\d)")
_WORDS = "zero one two three four five six seven eight nine ten".split()
_NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_WORDS)}
_ARTICLES = {"a", "an", "the"}


@functools.cache
def tables():
    """Lists that scorers and loaders need, of ``tables.json``."""
    return json.loads((Path(__file__).parents[1] / "tables.json").read_text(encoding="utf-8"))


@functools.lru_cache(1 << 16)  # intervals score the same answers many times
def normalize_answer(text):
    """An answer as EvalAI's processor of VQA answers leaves it."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return normalize_words(text)


@functools.lru_cache(1 << 16)
def normalize_words(text):
    """The part of :func:`normalize_answer` after lower case: punctuation, number words, articles and contractions."""
    text = text.replace("\n", " ").replace("\t", " ").strip()
    in_number = _COMMA_IN_NUMBER.search(text) is not None
    cleaned = text
    for mark in _PUNCTUATION:
        beside_blank = f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if beside_blank or in_number else " ")
    cleaned = _PERIOD.sub("", cleaned, count=32)  # the source passes a flag, 32, where the count belongs
    words = (_NUMBERS.get(word, word) for word in cleaned.lower().split())
    contractions = tables()["contractions"]
    return " ".join(contractions.get(word, word) for word in words if word not in _ARTICLES)


def vqa(references, answers):
    """VQA accuracy: mean over ten annotators of min(1, equal answers among the nine others / 3)."""

    def one(reference, answer):
        if answer is None:
            return 0.0
        truths = [normalize_answer(str(truth)) for truth in field(reference, "answers")]
        if len(truths) != 10:
            raise DataError(f"question {reference['id']!r} has {len(truths)} answers: VQA accuracy is defined for exactly 10")
        equal = truths.count(normalize_answer(answer))
        others = len(truths) - equal
        # An annotator who gave this answer is not counted for himself.
        return (equal * min(1, (equal - 1) / 3) + others * min(1, equal / 3)) / len(truths) if equal else 0.0

    return _average("accuracy", one, references, answers)


def anls(references, answers):
    """Average normalised Levenshtein similarity, best over the true answers; below one half it counts 0."""
    from rapidfuzz.distance import Levenshtein

    def distance(answer, truth):
        collapsed = [" ".join(text.strip().lower().split()) for text in (truth, answer)]
        longest = max(len(truth.upper()), len(answer.upper()))  # of the texts before blanks are collapsed
        return Levenshtein.distance(*collapsed) / longest if longest else 0.0

    def one(reference, answer):
        if answer is None:
            return 0.0
        value = 1 - min((distance(answer, str(truth)) for truth in field(reference, "answers")), default=1)
        return value if value >= 0.5 else 0.0

    return _average("anls", one, references, answers)


def _number(text):
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def relaxed_match(answer, truth):
    """Whether an answer is within 5 per cent of the truth: of the answer itself, as the original's published figures have it.

    It passes the two to its function in the wrong order, so the difference is divided by the answer.
    """
    answer = answer.strip()
    given, wanted = _number(answer), _number(truth)
    if wanted is not None and given:
        return abs(wanted - given) / abs(given) <= 0.05
    return answer.lower() == truth.lower()


def relaxed(references, answers):
    """ChartQA: relaxed accuracy of each half and their average."""
    each = [_best(relaxed_match, reference, answer) for reference, answer in zip(references, answers)]
    halves = means_by([reference.get("split", "all") for reference in references], each)
    if set(halves) == {"all"}:
        return {"accuracy": halves["all"]}, each
    ordered = {half: halves[half] for half in ("human", "augmented") if half in halves}
    return {**halves, **ordered, "average": mean(halves.values())}, each


def exact(references, answers):
    """Equality without case and outer blanks, best over the true answers."""
    match = functools.partial(_best, lambda answer, truth: answer.strip().lower() == truth.strip().lower())
    return _average("accuracy", match, references, answers)


def gqa(references, answers):
    """GQA: equality, where only the answer loses its final dots and its case."""
    match = functools.partial(_best, lambda answer, truth: answer.rstrip(".").lower() == truth)
    return _average("accuracy", match, references, answers)


def contains(references, answers):
    """Whether a true answer is contained, without case."""
    match = functools.partial(_best, lambda answer, truth: truth.strip().lower() in answer.lower())
    return _average("accuracy", match, references, answers)


def tiny_lvlm(references, answers):
    """TinyLVLM: whether a true answer occurs in whole words, both normalised; ``overall`` is the sum of the groups."""

    def match(answer, truth):
        return re.search(rf"\b{re.escape(normalize_words(truth))}\b", normalize_words(answer)) is not None

    each = [_best(match, reference, answer) for reference, answer in zip(references, answers)]
    groups = means_by([field(reference, "group") for reference in references], each)
    return {**groups, "overall": sum(groups.values())}, each


def _size_class(number):
    """Sizes that RSVQA takes for alike, by a number; None for none."""
    if number < 0:
        return None
    return sum(number > limit for limit in (0, 100, 1000))


def _rsvqa_match(reference, answer):
    if answer is None:
        return 0
    kind, truth = field(reference, "type"), str(field(reference, "answer"))
    if kind in ("count", "area"):
        try:
            given, wanted = int(answer), int(truth.rstrip("m2") if kind == "area" else truth)
        except ValueError:
            return 0
        return int(_size_class(given) is not None and _size_class(given) == _size_class(wanted))
    return int(bool(answer) and answer.lower() == truth.lower())


def rsvqa(references, answers):
    """RSVQA: accuracy by type, of all, and (the published one) of all but counts and areas."""
    each = [_rsvqa_match(reference, answer) for reference, answer in zip(references, answers)]
    kinds = [field(reference, "type") for reference in references]
    by_kind = means_by(kinds, each)
    scores = {f"{kind}/accuracy": by_kind[kind] for kind in sorted(by_kind)}
    useful = [value for kind, value in zip(kinds, each) if kind not in ("count", "area")]
    return {**scores, "accuracy": mean(each), "useful_accuracy": mean(useful)}, each


def _best(match, reference, answer):
    """1 where ``match(answer, truth)`` holds for one of the true answers, else 0."""
    if answer is None:
        return 0.0
    truths = field(reference, "answers")
    return float(any(match(answer, str(truth)) for truth in ([truths] if isinstance(truths, str) else truths)))


def _average(name, one, references, answers):
    each = [one(reference, answer) for reference, answer in zip(references, answers)]
    return {name: mean(each)}, each
