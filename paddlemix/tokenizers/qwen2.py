"""Qwen2's tokenizer (transformers 4.44, ``models/qwen2``)."""

import unicodedata

import tokenizers

from paddlemix.errors import TokenizerError

from .slow import SlowTokenizer
from .sources import MERGES_FILE, VOCAB_FILE

# How Qwen2 cuts text into words before merging bytes (transformers 4.44, models/qwen2/tokenization_qwen2.py).
_QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Qwen2Tokenizer(SlowTokenizer):
    """Qwen2's byte-level BPE from vocab.json and merges.txt. Nothing frames a text."""

    NAME = "Qwen2Tokenizer"
    FILES = (VOCAB_FILE, MERGES_FILE)
    DEFAULTS = {"unk_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    _SPACES_BETWEEN = False

    def __init__(self, source):
        self._vocab = source.json(VOCAB_FILE)
        try:
            lines = source.files[MERGES_FILE].decode("utf-8").split("\n")
            lines = lines[1:] if lines[0].startswith("#version:") else lines
            merges = [tuple(line.split()) for line in lines if line.strip()]
            if any(len(pair) != 2 for pair in merges):
                raise ValueError("a merge that is not of two tokens")
            self._model = tokenizers.Tokenizer(tokenizers.models.BPE(self._vocab, merges))
        except Exception as error:  # the library raises nothing narrower for a merge of tokens that do not exist
            raise TokenizerError(
                f"{source.path(VOCAB_FILE)} and {MERGES_FILE} do not fit together ({error}): copy both again"
            ) from None
        self._pieces = [None] * (max(self._vocab.values(), default=-1) + 1)
        for token, i in self._vocab.items():
            self._pieces[i] = token
        words = tokenizers.pre_tokenizers.Split(tokenizers.Regex(_QWEN2_WORDS), behavior="isolated")
        to_bytes = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self._model.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([words, to_bytes])
        self._from_bytes = tokenizers.decoders.ByteLevel()
        super().__init__(source, self.DEFAULTS, cleans=False)

    @property
    def _missing(self):
        return self._vocab.get(self.unk_token)

    def _frame(self):
        return [], []

    def _tokens(self, text, split_special_tokens):
        return super()._tokens(unicodedata.normalize("NFC", text), split_special_tokens)

    def _tokenize(self, text):
        return self._model.encode(text).tokens

    def _join(self, tokens):
        return self._from_bytes.decode(tokens)
