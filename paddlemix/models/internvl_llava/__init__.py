"""InternVL-Chat-LLaVA: InternViT-6B and Vicuna in LLaVA's form (arXiv 2304.08485, 2310.03744).

Names are loaded when they are first used, so that reading a configuration costs no framework.
"""

import importlib

_HOME = {
    "LlavaConfig": "paddlemix.models.internvl_llava.configuration",
    "LlavaForCausalLM": "paddlemix.models.internvl_llava.modeling",
    "build_prompt": "paddlemix.models.internvl_llava.conversation",
    "encode_record": "paddlemix.models.internvl_llava.encoding",
    "load_tokenizer": "paddlemix.models.internvl_llava.tokenization",
    "process_images": "paddlemix.processors.clip",
    "tokenize_prompt": "paddlemix.models.internvl_llava.tokenization",
}
__all__ = sorted(_HOME)


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOME[name]), name)
