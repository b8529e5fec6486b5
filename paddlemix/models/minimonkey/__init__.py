"""Mini-Monkey: InternVL2 with tiles at two scales and compression of the finer one. Names are loaded when first used."""

import importlib

_HOME = {"MiniMonkeyChatModel": "modeling", "MiniMonkeySession": "modeling"}
__all__ = sorted(_HOME)


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
