"""Scores made of what a judge, a language model, said about answers."""

import re

from . import field, mean


def read_review(review):
    """The two scores in the first line of a LLaVA-Bench review, or None where there are not exactly two.

    Read as the original reads it: commas are blanks, and two blanks in a row hold something unreadable.
    """
    try:
        first, second = (review or "").split("\n")[0].replace(",", " ").split(" ")
        return float(first), float(second)
    except ValueError:
        return None


def llava_bench(references, reviews):
    """LLaVA-Bench: 100 times the mean of our scores by the mean of theirs, by category and of all.

    What the original counts as -1 for both, a review that cannot be read, is left out here and counted as ``unreadable``.
    """
    pairs = [read_review(review) for review in reviews]
    groups = {"all": [pair for pair in pairs if pair]}
    for reference, pair in zip(references, pairs):
        if pair:
            groups.setdefault(field(reference, "category"), []).append(pair)
    scores = {}
    for name, group in sorted(groups.items()):
        theirs, ours = (round(mean(pair[i] for pair in group), 3) for i in (0, 1))
        if theirs:
            scores[name] = round(100 * ours / theirs, 1)
    return {**scores, "unreadable": pairs.count(None)}, [pair[1] / 10 if pair else 0.0 for pair in pairs]


def read_rating(review):
    """The number of ``rating: 0`` to ``rating: 6`` in a MMHal review, or None where there is not one alone."""
    found = set(re.findall(r"rating:\s*([0-6])", (review or "").lower()))
    return int(found.pop()) if len(found) == 1 else None


def mmhal(references, reviews):
    """MMHal-Bench: mean rating, 0 to 6, and the share below 3, which are hallucinations; unreadable ones are left out."""
    ratings = [read_rating(review) for review in reviews]
    read = [rating for rating in ratings if rating is not None]
    scores = {"average_score": mean(read), "hallucination_rate": mean(rating < 3 for rating in read)}
    kinds = [reference.get("question_type") for reference in references]
    for kind in sorted({kind for kind in kinds if kind}):
        scores[f"type/{kind}"] = mean(r for r, k in zip(ratings, kinds) if k == kind and r is not None)
    return {**scores, "unreadable": ratings.count(None)}, [0.0 if rating is None else rating / 6 for rating in ratings]


def judged(references, reviews):
    """The mean of judgements from 0 to 1 (MM-Vet's scale), read from the last number of each review."""
    values = []
    for review in reviews:
        numbers = re.findall(r"\d+(?:\.\d+)?", review or "")
        values.append(float(numbers[-1]) if numbers and float(numbers[-1]) <= 1 else None)
    read = [value for value in values if value is not None]
    return {"accuracy": mean(read), "unreadable": values.count(None)}, [value or 0.0 for value in values]
