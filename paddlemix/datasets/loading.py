"""Reading samples ahead, in worker processes, in the order that was asked for.

Paddle's ``DataLoader`` starts the workers and hands arrays over in shared memory. What it cannot hand over is done here: an
exception with its sentence (it would become "Blocking queue is killed"), and an array without elements.
"""

import traceback

import numpy as np

from paddlemix.errors import UserError


class BatchLoader:
    """Batches of a data set, arrays of numpy, the same ones for any number of workers.

    Args:
        dataset: :class:`InternVLDataset`.
        batch_sampler: iterable of lists of keys, such as :class:`TrainBatchSampler`.
        collate: makes a batch of a list of samples, such as :class:`Collator`.
        num_workers: processes that load samples; 0 loads them in this one.
    """

    def __init__(self, dataset, batch_sampler, collate, num_workers=0):
        self.dataset, self.batch_sampler, self.collate, self.num_workers = dataset, batch_sampler, collate, num_workers

    def __len__(self):
        return len(self.batch_sampler)

    def __iter__(self):
        if self.num_workers == 0:
            return (self.collate([self.dataset[key] for key in keys]) for keys in self.batch_sampler)
        return self._from_workers()

    def _from_workers(self):
        from paddle import CPUPlace
        from paddle.io import DataLoader

        loader = DataLoader(
            _Caught(self.dataset),
            batch_sampler=self.batch_sampler,
            collate_fn=_Portable(self.collate),
            num_workers=self.num_workers,
            places=[CPUPlace()],
            return_list=True,
        )
        for batch in loader:
            if batch["error"] is not None:
                raise batch["error"]
            arrays = {key: value.numpy() for key, value in batch["arrays"].items()}
            empty = {key: np.empty(shape, dtype) for key, shape, dtype in batch["empty"]}
            yield {**batch["others"], **arrays, **empty}


class _Caught:
    """A data set that returns exceptions instead of raising them."""

    def __init__(self, dataset):
        self._dataset = dataset

    def __len__(self):
        return len(self._dataset)

    def __getitem__(self, key):
        try:
            return self._dataset[key]
        except UserError as error:
            return error
        except Exception:  # a fault of this package: not every exception can be sent, but its traceback can
            return RuntimeError(f"a worker failed while loading sample {key}:\n{traceback.format_exc()}")


class _Portable:
    """A collate function whose result passes between processes: what is not an array with elements is set apart."""

    def __init__(self, collate):
        self._collate = collate

    def __call__(self, samples):
        error = next((sample for sample in samples if isinstance(sample, Exception)), None)
        # At least one array must pass.
        batch = {"": np.zeros(1)} if error else self._collate(samples)
        arrays = {key: value for key, value in batch.items() if isinstance(value, np.ndarray)}
        return {
            "error": error,
            "arrays": {key: value for key, value in arrays.items() if value.size},
            "empty": [(key, value.shape, value.dtype.str) for key, value in arrays.items() if not value.size],
            "others": {key: value for key, value in batch.items() if key not in arrays},
        }
