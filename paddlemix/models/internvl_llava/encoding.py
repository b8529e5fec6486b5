"""Training samples of LLaVA: its records to token ids and labels, a picture being one id of -200."""

from paddlemix.errors import DataError, PromptError
from paddlemix.models.blocks.conversation import IGNORE_INDEX, IMAGE_PLACEHOLDER, encode_rounds

from .conversation import TEMPLATES, get_template
from .tokenization import IM_END, IM_START, IMAGE_TOKEN_INDEX, tokenize_prompt

_ROLES = ("human", "gpt")


def encode_record(record, tokenizer, version, start_end=False):
    """Token ids and labels of a record.

    Args:
        record: ``{"conversations": [{"from": "human" | "gpt", "value": text}, ...]}``, and ``image`` where there is one.
        tokenizer: of the model.
        version: how text is written: ``plain`` for a picture and its caption alone, ``v1``, ``v0``, or a template's name.
        start_end: whether ``<im_start>`` and ``<im_end>`` stand around a picture (``mm_use_im_start_end``).

    Returns:
        ``(input_ids, labels)``, lists of equal length; labels are -100 where nothing is learned.

    Raises:
        PromptError: there is no such version. DataError: the record cannot be used.
    """
    template, turns, has_picture = _prepared(record, version, start_end)
    if template.version == "plain":
        ids, labels = _plain(turns, tokenizer)
    elif template.version.startswith("v0"):
        ids, labels = _headed(turns, tokenizer, template)
    else:
        ids, labels = _rounds(turns, tokenizer, template)
    pictures = ids.count(IMAGE_TOKEN_INDEX)
    if pictures != has_picture:
        raise DataError(
            f"has {pictures} {IMAGE_PLACEHOLDER} mark(s) but {int(has_picture)} picture(s): a record has one picture"
        )
    if all(label == IGNORE_INDEX for label in labels[1:]):
        raise DataError("has no answer to learn: add one")
    return ids, labels


def _prepared(record, version, start_end):
    """(template, ``(role, text)`` turns with marks in place, whether there is a picture)."""
    if version not in TEMPLATES:
        raise PromptError(f"--version is '{version}': it must be one of {', '.join(TEMPLATES)}")
    template = get_template(version)
    turns = _turns(record)
    has_picture = bool(record.get("image"))
    marks = sum(text.count(IMAGE_PLACEHOLDER) for role, text in turns if role == "human")
    if marks and not has_picture:
        raise DataError(f"has {IMAGE_PLACEHOLDER} in its text but no 'image': remove the mark, or name the picture")
    if has_picture:
        if not marks:  # a picture that nothing points to goes before the first question
            first = next((i for i, (role, _) in enumerate(turns) if role == "human"), 0)
            turns[first] = (turns[first][0], f"{IMAGE_PLACEHOLDER}\n{turns[first][1]}")
        turns = [(role, _mark_first(text, template.version, start_end)) for role, text in turns]
    return template, turns, has_picture


def check_record(record, version):
    """What :func:`encode_record` finds wrong with a record, without a tokenizer.

    Raises:
        PromptError, DataError: as there.
    """
    template, turns, has_picture = _prepared(record, version, False)
    if template.version == "plain":
        _check_plain(turns)
    elif not template.version.startswith("v0"):
        _pairs(turns)
    marks = sum(text.count(IMAGE_PLACEHOLDER) for _, text in turns)
    if template.version != "plain" and marks != has_picture:
        raise _wrong_number(marks, has_picture)


def _wrong_number(marks, has_picture):
    return DataError(f"has {marks} {IMAGE_PLACEHOLDER} mark(s) but {int(has_picture)} picture(s): a record has one picture")


def _turns(record):
    turns = record.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise DataError("needs 'conversations', a list of turns with 'from' and 'value'")
    for i, turn in enumerate(turns):
        if not isinstance(turn, dict) or turn.get("from") not in _ROLES or not isinstance(turn.get("value"), str):
            raise DataError(f"turn {i + 1} must have 'from' ({' or '.join(_ROLES)}) and 'value', a text")
    return [(turn["from"], turn["value"]) for turn in turns]


def _mark_first(text, version, start_end):
    """``text`` with its mark, if it has any, moved to its beginning."""
    if IMAGE_PLACEHOLDER not in text:
        return text
    mark = f"{IM_START}{IMAGE_PLACEHOLDER}{IM_END}" if start_end else IMAGE_PLACEHOLDER
    if "mmtag" in version:
        mark = f"<Image>{mark}</Image>"
    rest = text.replace(IMAGE_PLACEHOLDER, "").strip()
    return f"{mark}\n{rest}".strip()


def _plain(turns, tokenizer):
    """A picture and its caption: all of the caption and its newline is learned."""
    _check_plain(turns)
    ids = tokenize_prompt(IMAGE_PLACEHOLDER + turns[1][1] + "\n", tokenizer)
    start = ids.index(IMAGE_TOKEN_INDEX) + 1
    return ids, [IGNORE_INDEX] * start + ids[start:]


def _check_plain(turns):
    if [role for role, _ in turns] != list(_ROLES) or IMAGE_PLACEHOLDER not in turns[0][1]:
        raise DataError("must have exactly two turns, a picture's and its caption, for --version plain")


def _pairs(turns):
    """(question, answer) pairs of turns that alternate."""
    if turns[0][0] != "human":
        turns = turns[1:]
    for i, (role, _) in enumerate(turns):
        if role != _ROLES[i % 2]:
            raise DataError(f"turn {i + 1} is from '{role}' where '{_ROLES[i % 2]}' should speak")
    pairs = [(turns[i][1], turns[i + 1][1]) for i in range(0, len(turns) - 1, 2)]
    if not pairs:
        raise DataError("has no answer to learn: add one")
    return pairs


def _rounds(turns, tokenizer, template):
    """Rounds whose answers end in a token: the answers and these tokens are learned."""
    pairs = _pairs(turns)
    stop = tokenizer.require_token_id(template.stop)
    return encode_rounds(template, pairs, lambda text, start: tokenize_prompt(text, tokenizer, start), {stop})


def _headed(turns, tokenizer, template):
    """``### Human: ...`` and ``### Assistant: ...``, learned but for what the original masks.

    It counts every turn with a token of its own before it, so that what it leaves out moves to the right from turn to turn.
    """
    texts = [f"### {'Human' if role == 'human' else 'Assistant'}: {text}\n" for role, text in turns]
    header = template.system_message + "\n\n"
    ids = tokenize_prompt(header + "".join(texts) + "### ", tokenizer)
    labels, at = list(ids), len(tokenize_prompt(header, tokenizer))
    labels[:at] = [IGNORE_INDEX] * at
    for (role, _), text in zip(turns, texts):
        count = len(tokenize_prompt(text, tokenizer))
        if role == "human":
            for place in range(at + 2, min(at + count, len(labels))):
                labels[place] = IGNORE_INDEX
        at += count
    return ids, labels
