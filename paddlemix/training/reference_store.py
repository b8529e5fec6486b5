"""What the reference says of every pair, computed once and kept on the disk, so that no step needs the reference any more."""

import hashlib
import os

import numpy as np
import paddle

from paddlemix.errors import TrainingError
from paddlemix.files import check_regular

_EVERY = 50  # pairs, after which what was computed is on the disk


class ReferenceStore:
    """Log-probabilities of the chosen and the rejected answers of a data set, in ``reference-KEY.npy`` of the output directory.

    The key tells data, encoding and reference apart, so that a resumed run takes over what is there, also half of it.

    Args:
        name: directory or name of the reference; None for a model that was put together.
    """

    def __init__(self, name):
        self.name = name

    def fill(self, objective, trainer, data):
        """Compute what is not known yet, each process its share.

        Args:
            objective: whose reference is asked.
            trainer: :class:`~.trainer.Trainer`.
            data: the training batches; their data set must be the same in every epoch.

        Returns:
            float32 ``[samples, 2]``, mapped from the disk; infinite where a pair cannot be used.

        Raises:
            TrainingError: another process could not do its share.
        """
        dataset, processes = data.dataset, trainer.processes
        path = os.path.join(trainer.args.output_dir, f"reference-{self._key(dataset)}.npy")
        processes.first_then_others(lambda: None if os.path.exists(path) else _start(path, len(dataset)))
        values = np.load(path, mmap_mode="r+")
        first, last = (len(values) * rank // processes.world for rank in (processes.rank, processes.rank + 1))
        steps = -(-len(values) // processes.world)  # as many in all processes: with stage 3 they compute together
        for step in range(steps):
            place = min(first + step, last - 1)
            (missing,) = processes.sum([bool(np.isnan(values[place]).any())])
            if missing:
                values[place] = _ask(objective, trainer, data, place)
            if step % _EVERY == _EVERY - 1:
                values.flush()
        values.flush()
        processes.wait()
        known = np.load(path, mmap_mode="r")
        if np.isnan(known).any():
            raise TrainingError(f"{path} is not complete: all processes must have the same output directory")
        return known

    def _key(self, dataset):
        encoder = dataset.encoder
        facts = [[*source.stamp(), source.max_dynamic_patch, source.data_augment] for source in dataset.sources]
        facts += [encoder.options, encoder.template, len(encoder.tokenizer), dataset.seed, self.name]
        if self.name and os.path.isdir(self.name):
            for entry in sorted(os.listdir(self.name)):
                if entry.endswith((".safetensors", ".bin", ".pdparams")):
                    status = check_regular(os.path.join(self.name, entry))
                    facts.append([entry, status.st_size, status.st_mtime_ns])
        return hashlib.sha256(repr(facts).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _start(path, count):
    values = np.full([count, 2], np.nan, np.float32)
    unfinished = f"{path}.tmp"
    with open(unfinished, "wb") as file:
        np.save(file, values)
    os.replace(unfinished, path)


@paddle.no_grad()
def _ask(objective, trainer, data, place):
    """What the reference says of one pair: (chosen, rejected)."""
    batch = data.collate([data.dataset[place]])
    with trainer.autocast(), objective._tower_once(trainer.model, batch, update=False) as pixels:
        chosen, rejected = objective._reference_logps(trainer.model, batch, pixels, update=False)
    return (float(chosen), float(rejected)) if batch["pairs"] else (np.inf, np.inf)
