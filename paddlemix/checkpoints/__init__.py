"""Checkpoints: their files and their safety, the names of their tensors, their layouts, and where they come from."""

import importlib

_HOME = {
    "ARRAY_DTYPES": "tensors",
    "Checkpoint": "checkpoint",
    "DTYPES": "tensors",
    "INDEX_FILES": "files",
    "LAYOUTS": "checkpoint",
    "OutgoingTensor": "safetensors_files",
    "SINGLE_FILES": "files",
    "StoredTensor": "tensors",
    "WEIGHT_SUFFIXES": "files",
    "blocks": "tensors",
    "convert_checkpoint": "checkpoint",
    "convert_dtype": "tensors",
    "find_weight_files": "files",
    "load_checkpoint": "checkpoint",
    "name_some": "tensors",
    "open_weight_file": "files",
    "parse_size": "safetensors_files",
    "read_parameters": "checkpoint",
    "resolve": "hub",
    "rows_per_block": "tensors",
    "save_checkpoint": "checkpoint",
    "write_safetensors": "safetensors_files",
}
__all__ = sorted(_HOME)


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
