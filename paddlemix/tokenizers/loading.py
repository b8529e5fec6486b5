"""Which tokenizer a checkpoint's files are.

No code from a checkpoint is run. Kinds are told apart by the ``tokenizer_class`` of tokenizer_config.json and the
files that exist:

- :class:`InternLM2Tokenizer`, :class:`InternLM3Tokenizer` and :class:`LlamaTokenizer` (Llama 2, Vicuna, Yi, Phi-3):
  tokenizer.model;
- :class:`Qwen2Tokenizer` (Qwen2, Qwen2.5): vocab.json and merges.txt;
- :class:`FastTokenizer` (Llama 3, or any of the above that lacks its own files): tokenizer.json.

The original loads with ``use_fast=False``, so a class's own files win over a tokenizer.json beside them.
"""

import os

from paddlemix.errors import TokenizerError

from .fast import FastTokenizer
from .internlm2 import InternLM2Tokenizer
from .internlm3 import InternLM3Tokenizer
from .llama import LlamaTokenizer
from .qwen2 import Qwen2Tokenizer
from .sources import FAST_FILE, MERGES_FILE, VOCAB_FILE, Source

# Kinds that have files of their own, by what tokenizer_config.json calls them. A new kind is a file and an entry here.
KINDS = {kind.NAME: kind for kind in (InternLM2Tokenizer, InternLM3Tokenizer, LlamaTokenizer, Qwen2Tokenizer)}


def load_tokenizer(path):
    """The tokenizer of a checkpoint directory.

    Args:
        path: directory with the tokenizer's files, as published or as :meth:`Tokenizer.save_pretrained` wrote them.

    Returns:
        A :class:`Tokenizer`.

    Raises:
        TokenizerError: the directory or a file is missing, broken, or of a kind that is not supported.
    """
    source = Source.read(os.fspath(path))
    # A folder in transformers' layout names a stand-in there, and under the other key the class that the model was made with.
    name = str(source.config.get("internvl_tokenizer_class") or source.config.get("tokenizer_class") or "").removesuffix("Fast")
    if not name and VOCAB_FILE in source.files and MERGES_FILE in source.files:
        name = "Qwen2Tokenizer"  # no other kind has these files
    kind = KINDS.get(name)
    if kind and all(file in source.files for file in kind.FILES):
        return kind(source)
    if FAST_FILE in source.files:
        return FastTokenizer(source, kind)
    raise TokenizerError(source.why_unusable(name, KINDS))
