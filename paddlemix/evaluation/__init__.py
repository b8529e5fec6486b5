"""How good a model is: benchmarks of chat models, retrieval, and classification without training.

Names are loaded when they are first used.
"""

import importlib

_HOME = {
    "TASKS": "paddlemix.evaluation.tasks",
    "retrieval_recalls": "paddlemix.evaluation.retrieval",
    "score": "paddlemix.evaluation.tasks",
    "zero_shot_weights": "paddlemix.evaluation.zero_shot",
}
__all__ = sorted(_HOME)


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOME[name]), name)
