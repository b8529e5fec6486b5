"""The InternVL chat models. Names are loaded when they are first used, so that reading a configuration costs no framework."""

import importlib

_HOME = {
    "ChatSession": "paddlemix.models.blocks.chat",
    "GenerationConfig": "paddlemix.models.blocks.generation",
    "InternVLChatConfig": "paddlemix.models.internvl2.configuration",
    "InternVLChatModel": "paddlemix.models.internvl2.modeling",
    "encode_conversations": "paddlemix.models.blocks.conversation",
    "get_template": "paddlemix.models.internvl2.conversation",
    "published_shapes": "paddlemix.models.internvl2.checkpoint",
    "load_tokenizer": "paddlemix.tokenizers.loading",
}
__all__ = sorted(_HOME)


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOME[name]), name)
