"""Tokenizers of the published checkpoints: one file a family behind :func:`load_tokenizer`."""

import importlib

_HOME = {
    "FastTokenizer": "fast",
    "InternLM2Tokenizer": "internlm2",
    "LlamaTokenizer": "llama",
    "Qwen2Tokenizer": "qwen2",
    "Tokenizer": "base",
    "load_tokenizer": "loading",
}
__all__ = sorted(_HOME)


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
