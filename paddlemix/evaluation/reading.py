"""What answers were read as: the labels that scorers of choices see in them, and the groups that questions belong to."""

from .scorers.boxes import dior_box, refcoco_box
from .scorers.choices import choose, last_letter, realworld_choice
from .scorers.yes_no import mme_label, pope_label

# Fields of references that group the questions of a benchmark, the first that is there.
_GROUPS = ("category", "task_type", "task", "setting", "split", "group", "type", "question_type_id", "question_type", "kind")


def labels(scorer, reference, answer):
    """(what the answer was read as, the truth) where ``scorer`` compares labels: letters, or yes and no.

    Args:
        scorer: a name of :mod:`.scorers`.
        reference: of the question.
        answer: text.

    Returns:
        Two texts, the first None where the answer says none of the labels; None where the scorer compares no labels.
    """
    truth, options = str(reference.get("answer")), reference.get("options")
    if scorer == "mme":
        label = mme_label(answer)
        return None if label == "other" else label, truth.strip().lower()
    if scorer == "pope":
        return pope_label(answer), str(reference.get("label")).strip().lower()
    if scorer == "seed":
        return answer[:1] if answer[:1] in set("ABCD") else None, truth
    if scorer == "mme_realworld":
        return realworld_choice(answer, options) or None, truth
    by_letter = scorer in ("letter", "scienceqa", "mmvp", "mmmu", "mmmu_pro", "mmiu", "vlmeval")
    if not by_letter or not isinstance(options, dict) or reference.get("question_type", "") == "open":
        return None
    chosen = choose(last_letter(answer) if scorer == "mmmu_pro" else answer, options)
    chosen = chosen.strip("().") if scorer == "scienceqa" else chosen
    return chosen if chosen in options else None, truth


def is_unreadable(scorer, reference, answer):
    """Whether an answer that is not empty says nothing that ``scorer`` could read: no option, no box."""
    if not answer.strip():
        return False
    found = labels(scorer, reference, answer)
    if found is not None:
        return found[0] is None
    if scorer == "refcoco":
        return not refcoco_box(answer, 1, 1).any()
    return scorer == "dior" and dior_box(answer, 1, 1) is None


def group_of(reference, identity):
    """The name of the group that a question belongs to, such as its category; None where its benchmark has none."""
    if {"question_type", "options"} <= set(reference) and str(identity).count("_") >= 2:
        return str(identity).split("_", 1)[1].rsplit("_", 1)[0]  # MMMU's ids name the subject
    name = next((name for name in _GROUPS if reference.get(name) is not None), None)
    return None if name is None else str(reference[name])
