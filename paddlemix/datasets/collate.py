"""Samples to batches: rows of one sample each, or of several one after the other (packing).

Everything goes by the lengths of the samples. Token ids say nothing about padding: 0 is a word of Qwen2's.
"""

import numpy as np

from paddlemix.errors import ConfigError
from paddlemix.models.blocks.conversation import IGNORE_INDEX

# What a label counts in the loss, by the number of labels of its sample.
LOSS_REDUCTIONS = {
    "token": lambda labels: 1.0,
    "sample": lambda labels: 1.0 / labels,
    "square": lambda labels: labels**-0.5,
}


class Collator:
    """Makes batches of samples, a row each; also callable on rows of several samples: :meth:`collate_rows`.

    Args:
        pad_token_id: id that fills up rows; any will do, since nothing attends to it or learns it.
        loss_reduction: ``token`` weighs all labels alike, ``sample`` all samples alike, ``square`` in between (the weight of a
            sample is the square root of its number of labels).
        tiles_per_row: fill the batch up to so many tiles a row with blank ones, flagged 0, for a constant amount of
            work; None for no filling.
        blank_tile: whether a batch without pictures gets one blank tile. Needed where parameters that only pictures reach
            are trained by several processes, which would wait for each other's gradients.
        tile_size: side of a blank tile in pixels, where there is no other to tell it.

    Raises:
        ConfigError: there is no such reduction.
    """

    def __init__(self, pad_token_id=0, loss_reduction="token", tiles_per_row=None, blank_tile=False, tile_size=448):
        if loss_reduction not in LOSS_REDUCTIONS:
            raise ConfigError(f"loss_reduction is '{loss_reduction}': it must be one of {', '.join(LOSS_REDUCTIONS)}")
        self.pad_token_id, self.loss_reduction = pad_token_id, loss_reduction
        self.tiles_per_row, self.blank_tile, self.tile_size = tiles_per_row, blank_tile, tile_size

    def __call__(self, samples):
        """Batch of samples, one a row; see :meth:`collate_rows`. Those that were skipped leave their ``bad`` alone."""
        batch = self.collate_rows([[sample] for sample in usable(samples)] or [[]])
        batch["bad"] = [entry for sample in samples for entry in sample["bad"]]
        del batch["segment_ids"]  # alone in its row, every sample is isolated
        return batch

    def collate_rows(self, rows):
        """Batch of rows, each a list of samples of :class:`InternVLDataset`; one without samples becomes a token of padding.

        Returns:
            Arguments of the model's ``forward``, N the length of the longest row:

            - ``input_ids``, ``labels``, ``attention_mask``, ``position_ids`` (restarting with every sample) and
              ``segment_ids`` (0 for padding, 1, 2, ... for the samples of a row), [B, N] int64;
            - ``pixel_values`` [T, 3, size, size] float32 and ``image_flags`` [T] int64, unless there is no tile;
            - ``loss_weight`` [B, N] float32, unless all labels count alike;

            and, to be taken out before, ``names`` (``file:line`` of every sample) and ``bad`` (for :class:`BadSampleLog`).
        """
        samples = [sample for row in rows for sample in row]
        parts = [
            [self._fields(sample, number) for number, sample in enumerate(row or [self._nothing()], start=1)] for row in rows
        ]
        joined = [{key: np.concatenate([part[key] for part in row]) for key in row[0]} for row in parts]
        length = max(len(row["input_ids"]) for row in joined)
        padding = {"input_ids": self.pad_token_id, "labels": IGNORE_INDEX}
        batch = {key: np.stack([padded(row[key], length, padding.get(key, 0)) for row in joined]) for key in joined[0]}
        batch.update(self._tiles(samples, len(rows)))
        batch["names"] = [sample["name"] for sample in samples]
        batch["bad"] = [entry for sample in samples for entry in sample["bad"]]
        return batch

    def _nothing(self):
        """What stands in the place of a sample where there is none: a token that teaches nothing."""
        return {"input_ids": np.array([self.pad_token_id], dtype=np.int64), "labels": np.array([IGNORE_INDEX], dtype=np.int64)}

    def _fields(self, sample, number):
        """Arrays [N] of one sample, ``number`` in its row."""
        labels = sample["labels"]
        count = len(labels)
        fields = {
            "input_ids": sample["input_ids"],
            "labels": labels,
            "attention_mask": np.ones(count, dtype=np.int64),
            "position_ids": np.arange(count, dtype=np.int64),
            "segment_ids": np.full(count, number, dtype=np.int64),
        }
        if self.loss_reduction != "token":
            learned = int((labels != IGNORE_INDEX).sum())
            weight = LOSS_REDUCTIONS[self.loss_reduction](learned) if learned else 0.0
            fields["loss_weight"] = np.full(count, weight, dtype=np.float32)
        return fields

    def _tiles(self, samples, rows):
        pixels = [sample["pixel_values"] for sample in samples]
        flags = [sample["image_flags"] for sample in samples]
        blank = (self.tiles_per_row or 0) * rows - sum(map(len, pixels))
        if self.blank_tile and blank <= 0 and not any(map(len, pixels)):
            blank = 1
        if blank > 0:
            shape = pixels[0].shape[1:] if pixels else (3, self.tile_size, self.tile_size)
            pixels.append(np.zeros((blank, *shape), dtype=np.float32))
            flags.append(np.zeros(blank, dtype=np.int64))
        if not any(map(len, pixels)):
            return {}
        return {"pixel_values": np.concatenate(pixels), "image_flags": np.concatenate(flags)}


def usable(samples):
    """Those of ``samples`` that were not skipped."""
    return [sample for sample in samples if "input_ids" in sample]


def padded(values, length, filling):
    """``values [N]`` with ``filling`` behind them, ``[length]``."""
    return np.pad(values, (0, length - len(values)), constant_values=filling)
