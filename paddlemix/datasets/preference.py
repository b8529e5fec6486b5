"""Pairs of answers to one question, of which one is preferred: records, token ids and batches.

Three forms of a row are read: ``question``, ``chosen``, ``rejected`` and ``image`` (MMPR); ``messages``, whose last answer is
the chosen one, and ``rejected_response``; ``prompt``, ``chosen``, ``rejected`` and ``images``, as other trainers have them.
"""

import json
from dataclasses import dataclass, replace

import numpy as np

from paddlemix.errors import DataError
from paddlemix.models.blocks.conversation import IGNORE_INDEX, IMAGE_PLACEHOLDER, encode_conversations

from .collate import Collator, _padded
from .internvl2.encoding import SampleEncoder, _marked
from .records import Record, parse_record


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
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        parse_record(line, root)  # says what is wrong with it
        raise DataError("is not valid JSON: write one object in each line") from None
    if not isinstance(row, dict):
        raise DataError("holds no JSON object where a record should be: write one object in each line")
    turns, rejected = _turns(row)
    plain = {key: value for key, value in row.items() if key in ("image", "video", "clip", "width", "height", "length")}
    pictures = row.get("images", row.get("image"))
    if pictures is not None:
        plain["image"] = pictures[0] if isinstance(pictures, list) and len(pictures) == 1 else pictures
    if isinstance(row.get("videos"), list) and len(row["videos"]) == 1:
        plain["video"] = row["videos"][0]
    plain["conversations"] = turns
    record = parse_record(json.dumps(plain, ensure_ascii=False).encode("utf-8", "surrogatepass"), root)
    values = {name: getattr(record, name) for name in record.__dataclass_fields__}
    return PreferenceRecord(**values, rejected=rejected)


_SPEAKERS = {"user": "human", "human": "human", "assistant": "gpt", "gpt": "gpt", "system": "system"}


def _turns(row):
    """(conversation with the chosen answer, rejected answer) of a row in any of the three forms."""
    if "messages" in row:
        turns, rejected = _messages(row["messages"], "messages"), row.get("rejected_response")
    elif "prompt" in row:
        prompt = row["prompt"]
        asked = [{"from": "human", "value": prompt}] if isinstance(prompt, str) else _messages(prompt, "prompt")
        turns = [*asked, {"from": "gpt", "value": _answer(row.get("chosen"), "chosen")}]
        rejected = _answer(row.get("rejected"), "rejected")
    else:
        question = row.get("question")
        if not isinstance(question, str):
            raise DataError("has no 'question', 'messages' or 'prompt': a pair needs one of them")
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": _answer(row.get("chosen"), "chosen")}]
        rejected = row.get("rejected")
    if isinstance(row.get("system"), str) and turns and turns[0]["from"] != "system":
        turns = [{"from": "system", "value": row["system"]}, *turns]
    if not turns or turns[-1]["from"] != "gpt":
        raise DataError("does not end with the chosen answer: the last message must be the assistant's")
    rejected = _answer(rejected, "rejected")
    if rejected == turns[-1]["value"]:
        raise DataError("has two equal answers: a pair must differ in what is chosen and rejected")
    return turns, rejected


def _answer(value, name):
    if isinstance(value, list) and value and isinstance(value[-1], dict):
        value = value[-1].get("content")
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"has no text as '{name}': both answers of a pair must say something")
    return value


def _messages(messages, name):
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise DataError(f"'{name}' must be a list of messages with 'role' and 'content'")
    turns = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, list):
            parts = [part for part in content if isinstance(part, dict)]
            content = "".join(p.get("text", "") if p.get("type") == "text" else f"{IMAGE_PLACEHOLDER}\n" for p in parts)
        if message.get("role") not in _SPEAKERS or not isinstance(content, str):
            raise DataError(f"'{name}' has a message without a known 'role' or without text")
        turns.append({"from": _SPEAKERS[message["role"]], "value": content})
    return turns


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
        turns, rejected = _turns(record)
        record = PreferenceRecord(conversations=turns, images=("",) * len(image_token_counts), rejected=rejected)
    return tuple(
        encode_conversations(
            _marked(_as_record(record, chosen), len(record.images), ""), tokenizer, template, image_token_counts
        )
        for chosen in (True, False)
    )


def _as_record(record, chosen):
    values = {name: getattr(record, name) for name in Record.__dataclass_fields__}
    return replace(Record(**values), conversations=record.side(chosen))


class PairCollator(Collator):
    """Batches of pairs: all chosen answers, then all rejected ones, a row each; tiles are there once.

    Beside what :class:`Collator` gives, ``sequence`` ``[B, N]`` is the number of the answer that a label belongs to (the
    chosen ones first, then the rejected ones), -1 for no label, and ``tile_order`` the tiles in the order of the rows.
    """

    def __call__(self, samples):
        """Batch of pairs of :class:`PreferenceEncoder`, two rows each."""
        return self.collate_rows([[sample] for sample in samples], apart=True)

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
        ends = np.cumsum([0, *(len(sample["pixel_values"]) for sample in samples)])
        parts, order = [], []
        for row in placed:
            fields = []
            for position, (kind, number) in enumerate(row, start=1):
                prefix = "rejected_" if kind == "rejected" else ""
                side = {key: samples[number][f"{prefix}{key}"] for key in ("input_ids", "labels")}
                field = self._fields(side, position)
                sequence = number + (kind == "rejected") * len(samples)
                field["sequence"] = np.where(side["labels"] == IGNORE_INDEX, -1, sequence)
                field["sequence"][0] = -1  # predicted from nothing
                fields.append(field)
                order += range(ends[number], ends[number + 1])
            parts.append({key: np.concatenate([field[key] for field in fields]) for key in fields[0]})
        length = max(len(part["input_ids"]) for part in parts)
        filling = {"input_ids": self.pad_token_id, "labels": IGNORE_INDEX, "sequence": -1}
        batch = {key: np.stack([_padded(part[key], length, filling.get(key, 0)) for part in parts]) for key in parts[0]}
        if apart:
            del batch["segment_ids"]
        batch.update(self._tiles(samples, len(placed)))
        batch["tile_order"] = np.array(order, np.int64)
        batch["pairs"] = len(samples)
        batch["names"] = [sample["name"] for sample in samples]
        batch["bad"] = [entry for sample in samples for entry in sample["bad"]]
        return batch


class PreferenceEncoder(SampleEncoder):
    """Turns :class:`PreferenceRecord` objects into pairs of samples that share their tiles."""

    answers = 2

    def encode(self, record, augment=False, max_dynamic_patch=None, rng=None):
        """As :meth:`SampleEncoder.encode`, with ``rejected_input_ids`` and ``rejected_labels`` beside the chosen ones."""
        seed = np.random.default_rng(rng).integers(2**63)
        chosen = super().encode(_as_record(record, True), augment, max_dynamic_patch, seed)
        pictures = len(chosen["pixel_values"])
        tiles = [pictures] if pictures else []
        if len(record.images) > 1 or record.video:
            opened = self.open_pictures(record, np.random.default_rng(seed))
            bound = self.tile_bound(record, max_dynamic_patch)
            tiles = [self.count_tiles(picture.size, bound, record) for picture in opened]
        ids, labels = self.encode_text(_as_record(record, False), tiles)
        rejected = {"rejected_input_ids": np.array(ids, np.int64), "rejected_labels": np.array(labels, np.int64)}
        return {**chosen, **rejected}
