"""The InternVL chat models. Names are loaded when they are first used, so that reading a configuration costs no framework."""

import importlib

_HOME = {
    "ChatSession": "chat",
    "GenerationConfig": "generation",
    "InternVLChatConfig": "configuration",
    "InternVLChatModel": "modeling",
    "encode_conversations": "conversation",
    "get_template": "conversation",
    "load_tokenizer": "tokenization",
}
__all__ = sorted(_HOME)


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
