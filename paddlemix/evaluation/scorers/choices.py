"""Multiple choice: the letter that an answer means, and what benchmarks make of it."""

import re

from . import field, mean, means_by
from .vqa import tables


def choose(answer, options):
    """The option that an answer means.

    Args:
        answer: text; None for none.
        options: ``{letter: text}``.

    Returns:
        The first character if it is a letter of ``options`` or all there is, else the first option whose text occurs in the
        answer, else the answer itself. No rule reads "The answer is B", as none of the original does.
    """
    answer = (answer or "").strip()
    if len(answer) <= 1 or answer[0] in options:
        return answer[:1]
    return next((letter for letter, text in options.items() if str(text) in answer), answer)


def _is_right(reference, answer):
    return float(answer is not None and choose(answer, field(reference, "options")) == field(reference, "answer"))


def letter(references, answers):
    """Accuracy by :func:`choose`; by category too, where the references have ``category``."""
    each = [_is_right(reference, answer) for reference, answer in zip(references, answers)]
    scores = {"accuracy": mean(each)}
    if all(reference.get("category") is not None for reference in references):
        by_category = means_by([str(reference["category"]) for reference in references], each)
        scores |= {f"category/{name}": by_category[name] for name in sorted(by_category)}
    return scores, each


def scienceqa(references, answers):
    """As :func:`letter`; what is no option may be a letter with a dot or in parentheses."""

    def one(reference, answer):
        if answer is None:
            return 0.0
        chosen = choose(answer, field(reference, "options"))
        bare = re.fullmatch(r"(.)\.|\((.)\)", chosen, re.DOTALL)
        return float((bare[1] or bare[2] if bare else chosen) == field(reference, "answer"))

    each = [one(reference, answer) for reference, answer in zip(references, answers)]
    return {"accuracy": mean(each)}, each


def mmvp(references, answers):
    """MMVP: both questions of a pair right. Pairs are neighbours by number, or share ``pair`` where references have it."""
    each = [_is_right(reference, answer) for reference, answer in zip(references, answers)]
    order = sorted(range(len(references)), key=lambda i: _number_first(references[i]["id"]))
    pairs = {}
    for place, i in enumerate(order):
        pairs.setdefault(references[i].get("pair", ("at", place // 2)), []).append(each[i])
    return {"pair_accuracy": mean(len(pair) == 2 and all(pair) for pair in pairs.values())}, each


def _number_first(identity):
    return (0, int(identity), "") if str(identity).isdigit() else (1, 0, str(identity))


def seed(references, answers):
    """SEED-Bench: the first character; by type, of pictures (types 1 to 9) and of videos (10 to 12)."""
    each = [float(answer is not None and answer[:1] == field(r, "answer")) for r, answer in zip(references, answers)]
    kinds = [int(field(reference, "question_type_id")) for reference in references]
    by_kind = means_by(kinds, each)
    scores = {f"type_{kind}": by_kind[kind] for kind in sorted(by_kind)} | {"accuracy": mean(each)}
    for name, matches in (("image", lambda kind: kind <= 9), ("video", lambda kind: kind >= 10)):
        values = [value for kind, value in zip(kinds, each) if matches(kind)]
        scores |= {name: mean(values)} if values else {}
    return scores, each


def mmiu(references, answers):
    """MMIU: accuracy by task, and the mean over the tasks."""
    each = [_is_right(reference, answer) for reference, answer in zip(references, answers)]
    by_task = means_by([field(reference, "task") for reference in references], each)
    known = {task: by_task[task] for task in tables()["mmiu_tasks"] if task in by_task}
    return {**known, "accuracy": mean(known.values())}, each


def mantis(references, answers):
    """Mantis-Eval: equal to the option's letter or text, or to the short answer without case; each kind and all."""

    def one(reference, answer):
        truth = field(reference, "answer")
        if answer is None:
            return 0.0
        if field(reference, "question_type") != "multi-choice":
            return float(answer.lower() == truth.lower())
        if len(answer) == 3 and answer[0] == "(" and answer[2] == ")":
            answer = answer[1]
        options, place = field(reference, "options"), ord(truth[:1] or "A") - ord("A")
        texts = list(options.values()) if isinstance(options, dict) else options
        return float(answer == truth or (0 <= place < len(texts) and answer == texts[place]))

    each = [one(reference, answer) for reference, answer in zip(references, answers)]
    by_kind = means_by([field(reference, "question_type") for reference in references], each)
    return {**by_kind, "overall": mean(each)}, each


def mvbench(references, answers):
    """MVBench, in per cent by task and over all questions.

    The first word of the answer without dots has to be contained in that of the truth, ``(b)``, or the other way, so that an
    empty answer is right in the original and here; the report counts those.
    """

    def one(reference, answer):
        if answer is None:
            return 0
        place = field(reference, "candidates").index(field(reference, "answer"))
        truth = f"({chr(ord('a') + place)})"
        word = answer.replace("Answer: ", "").lower().split(" ")[0]
        return int(word.replace(".", "") in truth or truth in word)

    each = [one(reference, answer) for reference, answer in zip(references, answers)]
    by_task = means_by([field(reference, "task_type") for reference in references], each)
    return {**{task: 100 * value for task, value in by_task.items()}, "Avg": 100 * mean(each)}, each


# The fifth is two phrases that a missing comma joins in the original.
_PHRASES = (
    "The best answer is",
    "The correct answer is",
    "The answer is",
    "The answer",
    "The best option isThe correct option is",
    "Best answer:",
    "Best option:",
)


def realworld_choice(answer, options):
    """The letter that an answer to MME-RealWorld means; empty where it means none."""
    answer = answer.strip()
    for phrase in _PHRASES:
        answer = answer.replace(phrase, "")
    found = re.search("[ABCDE]", answer)
    if found:
        return found[0]
    if len(answer.split()) > 10:
        return ""
    return next((option[1:2] for option in options if answer.lower() in option.lower()), "")


def mme_realworld(references, answers):
    """MME-RealWorld: accuracy by task and category, by task, and of all."""
    each = [
        int(answer is not None and realworld_choice(answer, field(reference, "options")) == field(reference, "answer"))
        for reference, answer in zip(references, answers)
    ]
    by_task = means_by([field(reference, "task") for reference in references], each)
    by_category = means_by([f"{r['task']}/{field(r, 'category')}" for r in references], each)
    scores = {"accuracy": mean(each)}
    scores |= {f"{name}/accuracy": value for name, value in sorted({**by_task, **by_category}.items())}
    return scores, each


def mmmu(references, answers):
    """MMMU: accuracy by subject, by domain and overall, the last two by number of questions."""
    from .open_answers import mmmu_open_match

    each = []
    for reference, answer in zip(references, answers):
        if field(reference, "question_type") == "multiple-choice":
            each.append(_is_right(reference, answer))
        else:
            each.append(float(answer is not None and mmmu_open_match(answer, field(reference, "answer"))))
    subjects = [str(reference["id"]).split("_", 1)[1].rsplit("_", 1)[0] for reference in references]
    scores = means_by(subjects, each)
    for domain, members in tables()["mmmu_domains"].items():
        values = [value for subject, value in zip(subjects, each) if subject in members]
        scores |= {f"Overall-{domain}": mean(values)} if values else {}
    return {**scores, "Overall": mean(each)}, each


def mmmu_pro(references, answers):
    """MMMU-Pro: accuracy by setting, and the mean of the settings."""
    each = [
        float(answer is not None and choose(last_letter(answer), field(reference, "options")) == field(reference, "answer"))
        for reference, answer in zip(references, answers)
    ]
    by_setting = means_by([reference.get("setting", "standard") for reference in references], each)
    if len(by_setting) == 1:
        return {"accuracy": mean(each)}, each
    return {**by_setting, "accuracy": mean(by_setting.values())}, each


def last_letter(answer):
    """What follows the last "Answer:", as the benchmark's instruction asks for."""
    found = re.findall(r"Answer:\s*\(?([A-Z])\b", answer)
    return found[-1] if found else answer


def vlmeval(references, answers):
    """Files of VLMEvalKit's kind: by letter, yes or no, or containment, as each question's ``kind`` says."""

    def one(reference, answer):
        if answer is None:
            return 0.0
        kind = field(reference, "kind")
        if kind == "letter":
            return _is_right(reference, answer)
        truths = field(reference, "answers")
        if kind == "yes/no":
            words = re.findall(r"[a-z]+", answer.lower())
            said = next((word for word in words if word in ("yes", "no")), None)
            return float(said == str(truths[0]).strip().lower())
        squeezed = re.sub(r"\s+", " ", answer.lower())
        return float(any(re.sub(r"\s+", " ", str(truth).strip().lower()) in squeezed for truth in truths))

    each = [one(reference, answer) for reference, answer in zip(references, answers)]
    scores = {"accuracy": mean(each)}
    if all(reference.get("category") is not None for reference in references):
        by_category = means_by([str(reference["category"]) for reference in references], each)
        scores |= {f"category/{name}": by_category[name] for name in sorted(by_category)}
    return scores, each
