"""Which of several answers to a question are right, and pairs of a right and a wrong one."""

import itertools
import random
import re

from paddlemix.completions import complete

# The benchmark authors' prompts are other people's texts: a short one of ours.
PROMPT = (
    "Question: {question}\nRight answer: {truth}\nAnswer to judge: {answer}\n\nDoes the answer to judge come to the same as "
    "the right answer? Reply with yes or no alone."
)
_FINAL = re.compile(r"(?:final answer|answer)\s*[:：]\s*(.+)", re.IGNORECASE)
_BOXED = re.compile(r"\\boxed\{([^{}]*)\}")


def final_answer(text):
    """What an answer comes to: behind the last ``Answer:`` of its line, in the last ``\\boxed{}``, or all of it."""
    for pattern in (_BOXED, _FINAL):
        found = pattern.findall(text)
        if found:
            return found[-1].strip()
    return text.strip()


def is_right(truth, answer):
    """Whether the final answers are alike, but for case, white space, what encloses them, and how a number is written."""
    ours, theirs = (_plain(final_answer(text)) for text in (truth, answer))
    if ours == theirs:
        return True
    try:
        return float(ours.replace(",", "")) == float(theirs.replace(",", ""))
    except ValueError:
        return False


def _plain(text):
    return " ".join(text.casefold().split()).strip(" .。*\"'()[]$")


def verdict(url, model, question, truth, answer, pause=1.0):
    """What a judge behind an OpenAI-compatible address says: True, False, or None where its reply is neither yes nor no.

    Raises:
        DataError: as :func:`~paddlemix.completions.complete`.
    """
    content = PROMPT.format(question=question, truth=truth, answer=answer)
    reply = complete(url, model, [{"role": "user", "content": content}], 16, pause)
    found = re.search(r"\b(yes|no)\b", reply, re.IGNORECASE)
    return None if found is None else found[1].lower() == "yes"


def pair(right, wrong, most, key):
    """At most ``most`` (right, wrong) pairs of different texts, drawn by ``key``; a text comes again when all others did.

    Args:
        right, wrong: lists of texts; what is in both is in neither pair.
        most: pairs.
        key: what tells this question from others, and seeds from each other.
    """
    rng = random.Random(repr(key))
    right, wrong = sorted(set(right) - set(wrong)), sorted(set(wrong) - set(right))
    rng.shuffle(right)
    rng.shuffle(wrong)
    if not right or not wrong:
        return []
    # Diagonals of the table of all pairs: each is every text of the longer side once.
    shorter, longer = min(len(right), len(wrong)), max(len(right), len(wrong))
    diagonals = (((i + turn) % shorter, i) for turn in range(shorter) for i in range(longer))
    swap = len(right) > len(wrong)
    return [(right[j], wrong[i]) if swap else (right[i], wrong[j]) for i, j in itertools.islice(diagonals, most)]
