"""Scores of answers, as the evaluation code of InternVL computes them, to the last rule. No scorer knows a model.

A scorer is a function ``(references, answers) -> (scores, each)``: ``references`` are dictionaries, ``answers`` the text for
each of them or None where there is none, which is wrong; ``scores`` maps names to numbers and ``each`` holds a number for
every question, as far as the score is made of such. Rules that look like mistakes are those of the original, whose
published figures were made with them; each is told where it is.
"""

import importlib

from paddlemix.errors import DataError

# Where each scorer is.
_HOME = {
    "vqa": "vqa",
    "anls": "vqa",
    "relaxed": "vqa",
    "exact": "vqa",
    "gqa": "vqa",
    "contains": "vqa",
    "tiny_lvlm": "vqa",
    "rsvqa": "vqa",
    "letter": "choices",
    "scienceqa": "choices",
    "mmvp": "choices",
    "seed": "choices",
    "mmmu": "choices",
    "mmmu_pro": "choices",
    "mmiu": "choices",
    "mantis": "choices",
    "mvbench": "choices",
    "mme_realworld": "choices",
    "vlmeval": "choices",
    "mathvista": "open_answers",
    "mirb": "open_answers",
    "mme": "yes_no",
    "pope": "yes_no",
    "refcoco": "boxes",
    "dior": "boxes",
    "captions": "captions",
    "llava_bench": "judged",
    "mmhal": "judged",
    "judged": "judged",
}
NAMES = tuple(_HOME)


def scorer(name):
    """The scorer of that name."""
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def mean(values):
    """Mean of numbers; 0 of none."""
    values = list(values)
    return sum(values) / len(values) if values else 0.0


def means_by(groups, each):
    """``{group: mean of its numbers}`` in the order in which groups come up."""
    found = {}
    for group, value in zip(groups, each):
        found.setdefault(group, []).append(value)
    return {group: mean(values) for group, values in found.items()}


def field(reference, name):
    """A field of a reference.

    Raises:
        DataError: it has none of that name.
    """
    try:
        return reference[name]
    except KeyError:
        raise DataError(f"the reference of question {reference.get('id')!r} has no '{name}': it cannot be scored") from None


def texts_of(predictions, references, key="answer"):
    """The text for each reference, or None where there is none, as scorers take them.

    Args:
        predictions: dictionaries with ``id`` and ``key``, in any order; ids without a reference are ignored.
        references: a list of dictionaries with ``id``.

    Raises:
        DataError: a prediction or reference has no id, or two of one kind have the same.
    """
    given = {}
    for number, prediction in enumerate(predictions):
        if not isinstance(prediction, dict) or "id" not in prediction:
            raise DataError(f"prediction {number + 1} has no 'id': each needs one, to be joined with its reference")
        if _join(prediction["id"]) in given:
            raise DataError(f"two predictions have the id {prediction['id']!r}: leave one out")
        answer = prediction.get(key)
        given[_join(prediction["id"])] = None if answer is None else str(answer)
    seen = set()
    for number, reference in enumerate(references):
        if not isinstance(reference, dict) or "id" not in reference:
            raise DataError(f"reference {number + 1} has no 'id': each needs one, to be joined with its prediction")
        if _join(reference["id"]) in seen:
            raise DataError(f"two references have the id {reference['id']!r}: leave one out")
        seen.add(_join(reference["id"]))
    return [given.get(_join(reference["id"])) for reference in references]


def score_with(name, predictions, references, each=False, key="answer"):
    """Scores by the scorer ``name``, or by a function like one.

    Args:
        predictions, key: see :func:`texts_of`.
        references: dictionaries with ``id`` and what the scorer asks for.
        each: return ``(scores, one number a question)``.

    Raises:
        DataError: a prediction or reference has no id, or two of one kind have the same; or there are no references.
    """
    references = list(references)
    texts = texts_of(predictions, references, key)
    if not references:
        raise DataError("there are no references: nothing can be scored")
    scores, values = (name if callable(name) else scorer(name))(references, texts)
    scores = {key: float(value) for key, value in scores.items()}
    return (scores, [float(value) for value in values]) if each else scores


def _join(identity):
    """Ids are equal where their text is: files of other programs write 7 as "7"."""
    return str(identity)
