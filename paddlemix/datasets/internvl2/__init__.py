"""Training data of the InternVL family: records on disk to batches of arrays. Numpy and Pillow only."""

from paddlemix.datasets.collate import Collator
from paddlemix.datasets.dataset import BadSampleLog, InternVLDataset, costs, measure
from paddlemix.datasets.encoding import DataOptions, SampleEncoder
from paddlemix.datasets.loading import BatchLoader
from paddlemix.datasets.packing import PackedBatches, Packer, rows_per_epoch
from paddlemix.datasets.records import Record, Source, read_meta
from paddlemix.datasets.samplers import SampleOrder, TrainBatchSampler, sequential_batches

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
    "costs",
    "measure",
    "read_meta",
    "rows_per_epoch",
    "sequential_batches",
]
