"""Yes or no: MME and POPE."""

import re

from . import field, mean, means_by
from .vqa import tables


def mme_label(answer):
    """``yes``, ``no`` or ``other``: what the first four characters of an answer say."""
    answer = answer.replace("\n", "").replace("不是", "No").replace("是", "Yes").replace("否", "No")
    answer = answer.lower().replace("true", "yes").replace("false", "no")
    start = re.sub("[\u4e00-\u9fa5]", "", answer)[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def mme(references, answers):
    """MME: of each category 100 times accuracy plus 100 times the share of pictures with all questions right; their sums."""
    each = [
        float(answer is not None and mme_label(answer) == field(reference, "answer").strip().lower())
        for reference, answer in zip(references, answers)
    ]
    categories = [field(reference, "category") for reference in references]
    accuracy = means_by(categories, each)
    pictures = {}
    for reference, value in zip(references, each):
        pictures.setdefault((reference["category"], field(reference, "image")), []).append(value)
    plus = means_by([category for category, _ in pictures], [all(values) for values in pictures.values()])
    scores, total = {}, 0.0
    for group, members in tables()["mme"].items():
        found = {name: 100 * (accuracy[name] + plus[name]) for name in members if name in accuracy}
        if found:
            scores |= {**found, group.lower(): sum(found.values())}
            total += sum(found.values())
    return {**scores, "total": total}, each


def pope_label(answer):
    """``no`` where the first sentence has a word No, not or no, else ``yes``."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def pope(references, answers):
    """POPE: F1 and more of each category with yes as the positive class, and the mean of the F1; without an answer: wrong."""
    said, each = [], []
    for reference, answer in zip(references, answers):
        truth = field(reference, "label").strip().lower()
        wrong = "yes" if truth == "no" else "no"
        said.append(wrong if answer is None else pope_label(answer))
        each.append(float(said[-1] == truth))
    scores, all_f1 = {}, []
    categories = [field(reference, "category") for reference in references]
    ordered = [name for name in ("adversarial", "popular", "random") if name in categories]
    for category in [*ordered, *dict.fromkeys(c for c in categories if c not in ordered)]:
        pairs = [(s == "yes", bool(e)) for s, e, c in zip(said, each, categories) if c == category]
        hits = sum(yes and right for yes, right in pairs)
        yes = sum(yes for yes, _ in pairs)
        positives = hits + sum(not yes and not right for yes, right in pairs)
        precision, recall = hits / yes if yes else 0.0, hits / positives if positives else 0.0
        f1 = 2 * precision * recall / (precision + recall) if hits else 0.0
        all_f1.append(f1)
        scores |= {
            f"{category}/f1": f1,
            f"{category}/accuracy": mean(right for _, right in pairs),
            f"{category}/precision": precision,
            f"{category}/recall": recall,
            f"{category}/yes_ratio": yes / len(pairs),
        }
    return {**scores, "f1": mean(all_f1)}, each
