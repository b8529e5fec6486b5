"""InternLM3's tokenizer."""

from .slow import SentencePieceTokenizer
from .sources import SPACE


class InternLM3Tokenizer(SentencePieceTokenizer):
    """InternLM3's, after the class of that name published with its checkpoints: texts go to sentencepiece as they are.

    ``<s>`` goes before a text; of the first token of a text the leading space is dropped if ``add_prefix_space``.
    """

    NAME = "InternLM3Tokenizer"
    DEFAULTS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}

    def __init__(self, source):
        self._prefix_space = source.config.get("add_prefix_space", True)
        super().__init__(source)

    def _tokenize(self, text):
        return self._model.encode(text, out_type=str)

    def _join(self, tokens):
        if self._prefix_space and tokens[0].startswith(SPACE):
            tokens = [tokens[0][1:], *tokens[1:]]
        text, run = "", []
        for token in tokens:
            if token in self._special:
                text, run = text + self._model.decode(run) + token, []
            else:
                run.append(token)
        return text + self._model.decode(run)
