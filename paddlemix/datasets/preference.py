"""Pairs of answers to one question, of which one is preferred: records, token ids and batches.

A row has ``question``, ``chosen``, ``rejected`` and ``image`` (MMPR); or ``messages``, whose last answer is the chosen one, and
``rejected_response``; or ``prompt``, ``chosen``, ``rejected`` and ``images``, as other trainers have them, also
without ``prompt`` where both answers are whole conversations. Each may have several rounds, ``system`` and a ``video``.
"""

from dataclasses import dataclass, fields, replace

import numpy as np

from paddlemix.errors import DataError
from paddlemix.models.blocks.conversation import IGNORE_INDEX, encode_conversations

from .collate import Collator, padded, usable
from .internvl2.encoding import SampleEncoder, marked
from .records import Record, load_object, read_record


@dataclass(frozen=True)
class PreferenceRecord(Record):
    """A :class:`~.records.Record` that ends in the chosen answer, and the rejected one in its place."""

    rejected: str = ""

    def side(self, chosen):
        """The conversation with one of the two answers."""
        if chosen:
            return self.conversations
        return [*self.conversations[:-1], {"from": "gpt", "value": self.rejected}]


def parse_preference(line, root=""):
    """Read one line of a JSON-lines file of pairs; see :func:`~.records.parse_record`.

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
    if isinstance(template, str):
        from paddlemix.models.internvl2.conversation import get_template

        template = get_template(template)
    if isinstance(record, dict):
        record = read_preference(record)
    sides = [marked(answered(record, chosen), len(record.images), "") for chosen in (True, False)]
    return tuple(encode_conversations(side, tokenizer, template, image_token_counts) for side in sides)


def answered(record, chosen):
    """The record with the chosen or the rejected answer at its end."""
    return record if chosen else replace(record, conversations=record.side(chosen))


class PairCollator(Collator):
    """Batches of pairs: all chosen answers, then all rejected ones, a row each; tiles are there once.

    Beside what :class:`Collator` gives, ``sequence`` ``[B, N]`` is the number of the answer that a label belongs to (the
    chosen ones first, then the rejected ones), -1 for no label, and ``tile_order`` the tiles in the order of the rows.
    """

    def __call__(self, samples):
        """Batch of pairs of :class:`PreferenceEncoder`, two rows each."""
        batch = self.collate_rows([[sample] for sample in usable(samples)], apart=True)
        batch["bad"] = [entry for sample in samples for entry in sample["bad"]]
        return batch

    def collate_rows(self, rows, apart=False):
        """Batch of rows of pairs: the answers of a pair follow each other in its row, or are rows ``apart``."""
        samples = [sample for row in rows for sample in row]
        sides = [
            [("chosen", number) for number in range(len(samples))],
            [("rejected", number) for number in range(len(samples))],
        ]
        if apart:
            placed = [[side] for side in sides[0] + sides[1]]
        else:
            numbers = iter(range(len(samples)))
            placed = [[(kind, n) for n in [next(numbers) for _ in row] for kind in ("chosen", "rejected")] for row in rows]
        if not samples:
            placed = [[("nothing", 0)]] * 2
        ends = np.cumsum([0, *(len(sample["pixel_values"]) for sample in samples)])
        parts, order = [], []
        for row in placed:
            fields = []
            for position, (kind, number) in enumerate(row, start=1):
                prefix = "rejected_" if kind == "rejected" else ""
                sample = samples[number] if samples else self._nothing()
                side = {key: sample[f"{prefix}{key}"] for key in ("input_ids", "labels")}
                field = self._fields(side, position)
                sequence = number + (kind == "rejected") * len(samples)
                field["sequence"] = np.where(side["labels"] == IGNORE_INDEX, -1, sequence)
                field["sequence"][0] = -1  # predicted from nothing
                fields.append(field)
                order += range(ends[number], ends[number + 1]) if samples else ()
            parts.append({key: np.concatenate([field[key] for field in fields]) for key in fields[0]})
        length = max(len(part["input_ids"]) for part in parts)
        filling = {"input_ids": self.pad_token_id, "labels": IGNORE_INDEX, "sequence": -1}
        batch = {key: np.stack([padded(part[key], length, filling.get(key, 0)) for part in parts]) for key in parts[0]}
        if apart:
            del batch["segment_ids"]
        batch.update(self._tiles(samples, len(placed)))
        batch["tile_order"] = np.array(order, np.int64)
        batch["pairs"] = len(samples)
        batch["index"] = np.array([sample.get("index", -1) for sample in samples], np.int64)
        batch["names"] = [sample["name"] for sample in samples]
        batch["bad"] = [entry for sample in samples for entry in sample["bad"]]
        return batch


class PreferenceEncoder(SampleEncoder):
    """Turns :class:`PreferenceRecord` objects into pairs of samples that share their tiles."""

    answers = 2

    def encode_answers(self, record, tiles):
        """As :meth:`SampleEncoder.encode_answers`, and ``rejected_input_ids`` and ``rejected_labels`` beside them."""
        ids, labels = self.encode_text(answered(record, False), tiles)
        rejected = {"rejected_input_ids": np.array(ids, np.int64), "rejected_labels": np.array(labels, np.int64)}
        return {**super().encode_answers(record, tiles), **rejected}
