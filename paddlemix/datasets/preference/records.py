"""Records of pairs of answers to one question, of which one is preferred, and their token ids.

A row has ``question``, ``chosen``, ``rejected`` and ``image`` (MMPR); or ``messages``, whose last answer is the chosen one, and
``rejected_response``; or ``prompt``, ``chosen``, ``rejected`` and ``images``, as other trainers have them, also
without ``prompt`` where both answers are whole conversations. Each may have several rounds, ``system`` and a ``video``.
"""

from dataclasses import dataclass, fields, replace

from paddlemix.datasets.encoding import as_template, marked
from paddlemix.datasets.records import Record, load_object, read_record
from paddlemix.errors import DataError
from paddlemix.models.blocks.conversation import encode_conversations


@dataclass(frozen=True)
class PreferenceRecord(Record):
    """A :class:`~paddlemix.datasets.records.Record` that ends in the chosen answer, and the rejected one in its place."""

    rejected: str = ""

    def side(self, chosen):
        """The conversation with one of the two answers."""
        if chosen:
            return self.conversations
        return [*self.conversations[:-1], {"from": "gpt", "value": self.rejected}]


def parse_preference(line, root=""):
    """Read one line of a JSON-lines file of pairs; see :func:`~paddlemix.datasets.records.parse_record`.

    Raises:
        DataError: what is wrong, without saying where.
    """
    return read_preference(load_object(line), root)


def read_preference(row, root=""):
    """The :class:`PreferenceRecord` of a JSON object in any of the three forms.

    Raises:
        DataError: it is no pair, or its conversation or its pictures cannot be used.
    """
    plain, rejected = _with_chosen(row)
    record = read_record(plain, root)
    if record.conversations[-1]["from"] != "gpt":
        raise DataError("does not end with the chosen answer: the last message must be the assistant's")
    rejected = _answer(rejected, "rejected")
    if rejected == record.conversations[-1]["value"]:
        raise DataError("has two equal answers: a pair must differ in what is chosen and rejected")
    values = {item.name: getattr(record, item.name) for item in fields(Record)}
    return PreferenceRecord(**values, rejected=rejected)


def _with_chosen(row):
    """(the row as a record that ends in the chosen answer, in the form of conversations or of messages; rejected answer)."""
    others = {key: value for key, value in row.items() if key not in ("question", "prompt", "chosen", "rejected", "system")}
    if "messages" in row:
        return _messages(others, row["messages"], row.get("system")), row.get("rejected_response")
    chosen = _answer(row.get("chosen"), "chosen")
    asked = row.get("prompt")
    if asked is None and "question" not in row and all(map(_has_rounds, (row["chosen"], row.get("rejected")))):
        asked = row["chosen"][:-1]
        if asked != row["rejected"][:-1]:
            raise DataError("'chosen' and 'rejected' differ before their last answers: a pair must be of one conversation")
    if asked is not None:
        if isinstance(asked, str):
            asked = [{"role": "user", "content": asked}]
        elif not isinstance(asked, list):
            raise DataError("'prompt' must be a text, or a list of messages with 'role' and 'content'")
        messages = [*asked, {"role": "assistant", "content": chosen}]
        return _messages(others, messages, row.get("system")), row.get("rejected")
    question = row.get("question")
    if not isinstance(question, str):
        raise DataError("has no 'question', 'messages' or 'prompt': a pair needs one of them")
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": chosen}]
    if isinstance(row.get("system"), str):
        turns = [{"from": "system", "value": row["system"]}, *turns]
    image = row.get("image")
    if isinstance(image, list) and len(image) == 1:
        (image,) = image
    return {**others, "conversations": turns, "image": image}, row.get("rejected")


def _messages(others, messages, system):
    """The row in the form of messages; a system text, one picture or one video may stand beside them."""
    if isinstance(system, str) and system and isinstance(messages, list):
        messages = [{"role": "system", "content": system}, *messages]
    named = {}
    for key in ("image", "video"):
        value = others.pop(key, None)
        if value:
            if others.get(f"{key}s"):
                raise DataError(f"has both '{key}' and '{key}s': name each once")
            named[f"{key}s"] = value if isinstance(value, list) else [value]
    return {**others, **named, "messages": messages}


def _has_rounds(value):
    return isinstance(value, list) and len(value) > 1


def _answer(value, name):
    if isinstance(value, list) and value and isinstance(value[-1], dict):
        value = value[-1].get("content")
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"has no text as '{name}': both answers of a pair must say something")
    return value


def encode_preference(record, tokenizer, template, image_token_counts=()):
    """Token ids and labels of both answers to one question.

    Args:
        record: a :class:`PreferenceRecord`, or a dictionary with ``question``, ``chosen`` and ``rejected``.
        tokenizer, template: of the checkpoint that is trained; the template or its name.
        image_token_counts: tokens of each picture, in the order of the ``<image>`` marks.

    Returns:
        ``((ids, labels), (ids, labels))`` of the chosen and of the rejected answer, lists; labels are -100 but for the answer.

    Raises:
        PromptError: as :func:`~paddlemix.models.blocks.conversation.encode_conversations`. DataError: not a pair.
    """
    template = as_template(template)
    if isinstance(record, dict):
        record = read_preference(record)
    sides = [marked(answered(record, chosen), len(record.images), "") for chosen in (True, False)]
    return tuple(encode_conversations(side, tokenizer, template, image_token_counts) for side in sides)


def answered(record, chosen):
    """The record with the chosen or the rejected answer at its end."""
    return record if chosen else replace(record, conversations=record.side(chosen))
