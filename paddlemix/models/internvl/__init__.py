"""InternVL 1.0: InternVL-C (contrastive) and InternVL-G (generative), and vision towers alone (arXiv 2312.14238).

Names are loaded when they are first used, so that reading a configuration costs no framework.
"""

import importlib

_HOME = {
    "InternVLConfig": "paddlemix.models.internvl.configuration",
    "InternVLModel": "paddlemix.models.internvl.modeling",
    "InternVisionModel": "paddlemix.models.internvl.tower",
    "load_tokenizer": "paddlemix.models.internvl.tokenization",
    "transform": "paddlemix.processors.transforms",
}
__all__ = sorted(_HOME)


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOME[name]), name)
