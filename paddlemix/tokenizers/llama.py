"""Llama 2's tokenizer (transformers 4.44, ``models/llama``)."""

from .slow import SentencePieceTokenizer
from .sources import SPACE


class LlamaTokenizer(SentencePieceTokenizer):
    """Llama 2's, also of Vicuna, Yi and Phi-3.

    With ``legacy`` (the default, as in the original) sentencepiece puts a space before each part between special tokens;
    without, ``add_prefix_space`` puts one before the text as a whole.
    """

    NAME = "LlamaTokenizer"
    DEFAULTS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    # A ModelProto that says normalizer_spec { add_dummy_prefix: false }. Appended to another message it is merged into
    # it (protobuf's encoding, "Last One Wins"), so no schema is needed to change this one field.
    _NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"

    def __init__(self, source):
        legacy = source.config.get("legacy")
        self._legacy = True if legacy is None else legacy
        self._prefix_space = source.config.get("add_prefix_space", True)
        super().__init__(source)
        if not self._legacy:
            # Only now that the model has proved whole: the bytes could pass for the missing end of a truncated one.
            self._model = self._load(source, self._NO_DUMMY_PREFIX)
        self._guard = self.unk_token or "<unk>"
        self._guard_length = len(self._model.encode(self._guard))

    def _tokens(self, text, split_special_tokens):
        if self._legacy or not text:
            return super()._tokens(text, split_special_tokens)
        text = text.replace(SPACE, " ")
        tokens = super()._tokens(SPACE + text if self._prefix_space else text, split_special_tokens)
        return tokens[1:] if len(tokens) > 1 and tokens[0] == SPACE and tokens[1] in self._special else tokens

    def _tokenize(self, text):
        if self._legacy or not text.startswith((SPACE, " ")):
            return self._model.encode(text, out_type=str)
        # Sentencepiece may swallow a leading space; behind other characters it keeps it.
        return self._model.encode(self._guard + text, out_type=str)[self._guard_length :]

    def _join(self, tokens):
        if self._prefix_space and tokens[0].startswith(SPACE):
            tokens = [tokens[0][1:], *tokens[1:]]
        text, run, after_special = "", [], False
        for i, token in enumerate(tokens):
            if token in self._special:
                text += (" " if self._legacy and i and not after_special else "") + self._model.decode(run) + token
                run = []
            else:
                if after_special and i == 1 and self._prefix_space and not token.startswith(SPACE):
                    text += " "
                run.append(token)
            after_special = token in self._special
        return text + self._model.decode(run)
