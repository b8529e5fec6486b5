"""Answers in free text that have to be searched for what they say: MMMU's open questions, MathVista, MIRB."""

import re

from . import field, mean, means_by
from .vqa import tables

# ---------------------------------------------------------------------- MMMU

_BEFORE_KEY = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NUMBERS = (
    r"-?\b\d{1,3}(?:,\d{3})+\b",  # with commas
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",  # scientific
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",  # plain
)


def _key_parts(answer):
    """The parts of an answer that matter: what comes after words such as "so" and "is", or else all of it."""
    answer = answer.strip().strip(".").lower()
    # The source also splits at ". " before capitals, of which none are left.
    lines = answer.split("\n")
    found = []
    for number, line in enumerate(lines):
        words = (*_BEFORE_KEY, "=") if number == len(lines) - 1 else _BEFORE_KEY
        tails = [line.split(word)[-1].strip() for word in words if word in line]
        # The first of the shortest; an empty one is replaced by any later one.
        shortest = None
        for tail in tails:
            if not shortest or len(tail) < len(shortest):
                shortest = tail
        if shortest and shortest not in (":", ",", ".", "!", "?", ";", "'"):
            found.append(shortest)
    return found or [answer]


def _normalized(text):
    """A number rounded to two places, or lower-case text; one character alone gets a blank at either side."""
    text = str(text).strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def mmmu_open_match(answer, truth):
    """Whether a text of the answer contains a true text, or one of its numbers is a true number, by MMMU's own parser."""
    parts = _key_parts(answer)
    parts = parts + [number for part in parts for pattern in _NUMBERS for number in re.findall(pattern, part)]
    said = [value for part in parts for value in _normalized(part)]
    truths = [value for text in (truth if isinstance(truth, list) else [truth]) for value in _normalized(text)]
    texts = [value for value in truths if isinstance(value, str)]
    return any(any(t in value for t in texts) if isinstance(value, str) else value in truths for value in said)


# ---------------------------------------------------------------------- MathVista


def final_answer(text):
    """What follows the first ``Final answer:`` or ``Answer:`` on its line; all of the text without one."""
    found = re.search(r"(Final answer:|Answer:)\s*(.*)", text, re.IGNORECASE)
    return found[2].strip() if found else text


def _extract(answer, reference):
    """The quick extraction of InternVL's MathVista."""
    choices, kind = reference.get("choices"), field(reference, "answer_type")
    if answer == "" or (field(reference, "question_type") == "multi_choice" and answer in choices):
        return answer
    for name, read in (("integer", int), ("float", float)):
        if kind == name:
            try:
                return str(read(answer))
            except ValueError:
                pass
    return final_answer(answer)


def needs_extraction(row):
    """Whether only a judge can tell which answer a row's text gives: it is not empty, an option, or the number asked for."""
    answer, reference = row["answer"], row["reference"]
    kind, choices = reference.get("answer_type"), reference.get("choices") or ()
    if not answer.strip() or (reference.get("question_type") == "multi_choice" and answer in choices):
        return False
    try:
        {"integer": int, "float": float}.get(kind, lambda text: int("none"))(answer)
    except ValueError:
        return True
    return False


def _as_answer(extracted, reference):
    """What was extracted, in the form of the truth; None where it cannot be read."""
    if reference["question_type"] == "multi_choice":
        from rapidfuzz.distance import Levenshtein

        choices, extracted = reference["choices"], extracted.strip()
        marked = re.findall(r"\(([a-zA-Z])\)", extracted)
        extracted = marked[0].upper() if marked else extracted
        place = ord(extracted) - ord("A") if len(extracted) == 1 else -1
        if 0 <= place < len(choices):
            return choices[place]
        return min(choices, key=lambda choice: Levenshtein.distance(extracted, choice))
    try:
        if reference["answer_type"] == "integer":
            return str(int(float(extracted)))
        if reference["answer_type"] == "float":
            return str(round(float(extracted), int(reference["precision"])))
    except (ValueError, OverflowError, TypeError):
        return None
    return extracted


def mathvista(references, answers):
    """MathVista's accuracy without a judge; a judge's extraction is scored by the same rule."""
    each = [
        float(answer is not None and _as_answer(_extract(answer, reference), reference) == field(reference, "answer"))
        for reference, answer in zip(references, answers)
    ]
    return {"accuracy": mean(each)}, each


# ---------------------------------------------------------------------- MIRB

_COUNTED = ("count", "visual_chain", "3d_scene")
_CARDINALS = "zero one two three four five six seven eight nine ten".split()
_ORDINALS = "first second third fourth fifth sixth seventh eighth ninth tenth".split()
_WORDS = {word: str(n) for n, word in enumerate(_CARDINALS)} | {word: str(n) for n, word in enumerate(_ORDINALS, 1)}


def _mirb_match(reference, answer):
    if answer is None:
        return 0
    task, truth = field(reference, "task"), str(field(reference, "answer")).lower()
    said = answer.strip()
    end = said.find("\n") if said.find("\n") > 0 else said.find(".")
    said = (said[:end] if end > 0 else said).lower()
    if task in ("analogy", "attribute") or (task == "sightseeing" and truth in ("yes", "no")):
        return int(truth in ("yes", "no") and ("yes" in said) == (truth == "yes"))
    if task == "sightseeing":
        return int(truth in said)
    if task in _COUNTED:
        number = re.search(r"\d+", said)
        said = number[0] if number else _WORDS.get(said, "")
    return int(said == truth)


def mirb(references, answers):
    """MIRB: the mean over tasks of each of its four groups, and the mean of the groups."""
    each = [_mirb_match(reference, answer) for reference, answer in zip(references, answers)]
    by_task = means_by([field(reference, "task") for reference in references], each)
    scores = {}
    for group, tasks in tables()["mirb_groups"].items():
        values = [by_task[task] for task in tasks if task in by_task]
        scores |= {group: mean(values)} if values else {}
    return {**scores, "mean": mean(scores.values())}, each
