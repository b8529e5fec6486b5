"""InternLM2's tokenizer."""

from .base import Tokenizer, clean_up
from .slow import SentencePieceTokenizer


class InternLM2Tokenizer(SentencePieceTokenizer):
    """InternLM2's, after the tokenization_internlm2.py published with its checkpoints. ``<s>`` goes before a text."""

    NAME = "InternLM2Tokenizer"
    DEFAULTS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    _UNSTABLE = Tokenizer._UNSTABLE_BY_CLEANING  # _join cleans always

    def _tokenize(self, text):
        return self._model.encode(text, out_type=str)

    def _join(self, tokens):
        text, run, after_special = "", [], False
        for token in tokens:
            if token in self._special:
                text += ("" if after_special else " ") + self._model.decode(run) + token
                run = []
            else:
                run.append(token)
            after_special = token in self._special
        return clean_up(text + self._model.decode(run))
