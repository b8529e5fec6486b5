"""A tokenizer that is all in tokenizer.json."""

import copy

import tokenizers

from paddlemix.errors import TokenizerError

from .base import Tokenizer, clean_up
from .patterns import check_patterns
from .qwen2 import Qwen2Tokenizer
from .slow import SentencePieceTokenizer
from .sources import FAST_FILE, added_token, content_of


class FastTokenizer(Tokenizer):
    """A tokenizer that is all in tokenizer.json, which says how to split, merge, frame and decode.

    Args:
        source: the files.
        kind: the class named by the checkpoint if its own files are missing: its defaults hold.
    """

    NAME = "PreTrainedTokenizerFast"

    def __init__(self, source, kind=None):
        check_patterns(source.json(FAST_FILE), source.path(FAST_FILE))
        try:
            self._model = tokenizers.Tokenizer.from_str(source.files[FAST_FILE].decode("utf-8"))
        except Exception as error:  # the library raises nothing narrower
            raise TokenizerError(f"{source.path(FAST_FILE)} is no tokenizer ({error}): download or copy it again") from None
        self._model.no_truncation()
        self._model.no_padding()
        config = source.config
        cleans = kind is not Qwen2Tokenizer and config.get("clean_up_tokenization_spaces", True)
        super().__init__(source, kind.DEFAULTS if kind else {}, cleans)
        if kind and issubclass(kind, SentencePieceTokenizer):
            # The original rewrites the frame of these by the configuration.
            before = [self.bos_token_id] if config.get("add_bos_token", True) and self.bos_token else []
            after = [self.eos_token_id] if config.get("add_eos_token", False) and self.eos_token else []
        else:
            sample = self._model.encode("a")
            text = [k for k, special in enumerate(sample.special_tokens_mask) if not special]
            before, after = sample.ids[: text[0]], sample.ids[text[-1] + 1 :]
        self._framing = before, after

    def _install(self, added, named, additional):
        listed = {token.content for token in self._model.get_added_tokens_decoder().values()}
        special = {content_of(token) for token in [*named, *additional]}
        for token in map(added_token, [*(added[i] for i in sorted(added)), *named, *additional]):
            if token.content not in listed:
                listed.add(token.content)
                self._add([added_token(token, special=token.special or token.content in special)])
        self._splitting_model = None

    def _add(self, tokens):
        for token in tokens:
            (self._model.add_special_tokens if token.special else self._model.add_tokens)([token])
        self._splitting_model = None

    def __len__(self):
        return self._model.get_vocab_size(with_added_tokens=True)

    @property
    def vocab_size(self):
        """Size of the vocabulary without the added tokens."""
        return self._model.get_vocab_size(with_added_tokens=False)

    def _token(self, i):
        return self._model.id_to_token(i)

    def _id(self, token):
        i = self._model.token_to_id(token)
        return self.unk_token_id if i is None and token != self.unk_token else i

    def _has(self, token):
        return self._model.token_to_id(token) is not None

    def _added_tokens(self):
        return dict(sorted(self._model.get_added_tokens_decoder().items()))

    def _frame(self):
        return self._framing

    def _ids(self, text, split_special_tokens):
        model = self._model
        if split_special_tokens:
            if self._splitting_model is None:  # a second one, because the setting belongs to the whole object
                self._splitting_model = copy.deepcopy(self._model)
                self._splitting_model.encode_special_tokens = True
            model = self._splitting_model
        return model.encode(text, add_special_tokens=False).ids

    def _text(self, ids, skip_special_tokens, spaces_between_special_tokens):
        text = self._model.decode(ids, skip_special_tokens=skip_special_tokens)
        return clean_up(text) if self._cleans else text
