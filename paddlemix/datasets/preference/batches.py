"""Samples and batches of pairs: both answers of a pair stand in one batch, and share their tiles."""

import numpy as np

from paddlemix.datasets.collate import Collator, padded, usable
from paddlemix.datasets.encoding import SampleEncoder
from paddlemix.models.blocks.conversation import IGNORE_INDEX

from .records import answered


class PreferenceEncoder(SampleEncoder):
    """Turns :class:`~.records.PreferenceRecord` objects into pairs of samples that share their tiles."""

    answers = 2

    def encode_answers(self, record, tiles):
        """As :meth:`SampleEncoder.encode_answers`, and ``rejected_input_ids`` and ``rejected_labels`` beside them."""
        ids, labels = self.encode_text(answered(record, False), tiles)
        rejected = {"rejected_input_ids": np.array(ids, np.int64), "rejected_labels": np.array(labels, np.int64)}
        return {**super().encode_answers(record, tiles), **rejected}


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
