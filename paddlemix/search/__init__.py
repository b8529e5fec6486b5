"""Search in folders of pictures: an index of features, and what finds in it."""

import importlib

_HOME = {"Index": "paddlemix.search.index", "build_index": "paddlemix.search.index", "best": "paddlemix.search.nearest"}
__all__ = sorted(_HOME)


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOME[name]), name)
