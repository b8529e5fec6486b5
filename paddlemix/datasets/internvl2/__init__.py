"""Training data of the InternVL family: records on disk to batches of arrays. Numpy and Pillow only."""

from .collate import Collator
from .dataset import BadSampleLog, InternVLDataset, measure
from .encoding import DataOptions, SampleEncoder
from .loading import BatchLoader
from .packing import PackedBatches, Packer, rows_per_epoch
from .records import Record, Source, read_meta
from .samplers import SampleOrder, TrainBatchSampler, sequential_batches

__all__ = [
    "BadSampleLog",
    "BatchLoader",
    "Collator",
    "DataOptions",
    "InternVLDataset",
    "PackedBatches",
    "Packer",
    "Record",
    "SampleEncoder",
    "SampleOrder",
    "Source",
    "TrainBatchSampler",
    "measure",
    "read_meta",
    "rows_per_epoch",
    "sequential_batches",
]
