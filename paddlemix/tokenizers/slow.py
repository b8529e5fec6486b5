"""The original's slow tokenizers (transformers 4.44, ``tokenization_utils.py``), alone and around a sentencepiece model."""

import re

import sentencepiece
from tokenizers import AddedToken

from paddlemix.errors import TokenizerError

from .base import Tokenizer, clean_up
from .sources import MODEL_FILE, added_token


class SlowTokenizer(Tokenizer):
    """The original's slow tokenizers: text is split at added tokens first, then each part by the model itself.

    A subclass sets ``_vocab`` (token to id), ``_pieces`` (id to token) and ``_missing`` (id of an unknown token), and has
    ``_tokenize`` (tokens of a text without added ones) and ``_join`` (text of a list of at least one token).
    """

    FILES = ()  # without these it is no such tokenizer
    _SPACES_BETWEEN = True

    def _install(self, added, named, additional):
        self._added = added
        self._added_ids = {token.content: i for i, token in added.items()}
        # A token that is listed by its text alone keeps the flags it was added with.
        additional = [token for token in additional if isinstance(token, AddedToken) or token not in self._added_ids]
        for token in [*named, *additional]:
            self._put(added_token(token))

    def _put(self, token):
        i = self._added_ids.get(token.content, self._vocab.get(token.content))
        i = len(self) if i is None else i
        self._added[i], self._added_ids[token.content] = token, i

    def _add(self, tokens):
        for token in tokens:
            self._put(token)
            if token.special and token.content not in self.all_special_tokens:
                self.additional_special_tokens.append(token.content)

    def _refresh(self):
        super()._refresh()
        self._by_text = {token.content: token for token in self._added.values()}
        longest_first = sorted(filter(None, self._by_text), key=len, reverse=True)
        self._splitter = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if longest_first else None
        # Tokens that stand by themselves in a text; the others go through the model's own rules.
        new = {token for token in self.additional_special_tokens if self._added_ids[token] >= self.vocab_size}
        self._apart = (self._by_text.keys() - self._special) | new

    def __len__(self):
        # An added token may sit on a piece of the model, by its id or by its text.
        hidden = {i for i in self._added if i < self.vocab_size} | {self._vocab.get(text) for text in self._added_ids}
        return len(self._vocab) - len(hidden - {None}) + len(self._added_ids)

    @property
    def vocab_size(self):
        """Size of the vocabulary without the added tokens."""
        return len(self._vocab)

    def _token(self, i):
        if i in self._added:
            return self._added[i].content
        return self._pieces[i] if 0 <= i < len(self._pieces) else None

    def _id(self, token):
        return self._added_ids.get(token, self._vocab.get(token, self._missing))

    def _has(self, token):
        return token in self._added_ids or token in self._vocab

    def _added_tokens(self):
        return dict(sorted(self._added.items()))

    def _tokens(self, text, split_special_tokens):
        if split_special_tokens or self._splitter is None:
            return self._tokenize(text) if text else []
        parts = [part for part in self._splitter.split(text) if part]
        for i, part in enumerate(parts):
            token = self._by_text.get(part)
            if token is None:
                continue
            left = parts[i - 1] if i else ""
            right = parts[i + 1] if i + 1 < len(parts) else ""
            if token.rstrip and right:
                parts[i + 1] = right.lstrip()
            if token.lstrip and left:
                parts[i - 1] = left.rstrip()
            if token.single_word and left and left[-1] != " ":
                parts[i - 1], parts[i] = parts[i - 1] + part, ""
            elif token.single_word and right and right[0] != " ":
                parts[i + 1], parts[i] = part + parts[i + 1], ""
        tokens = []
        for part in filter(None, parts):
            tokens += [part] if part in self._by_text else self._tokenize(part)
        return tokens

    def _ids(self, text, split_special_tokens):
        return [self._id(token) for token in self._tokens(text, split_special_tokens)]

    def _text(self, ids, skip_special_tokens, spaces_between_special_tokens):
        texts, run = [], []
        for i in ids:
            if skip_special_tokens and i in self._special_ids:
                continue
            token = self._token(i)
            if token not in self._apart:
                run.append(token)
                continue
            text = self._join(run) if run else ""
            texts += [text, token] if text else [token]
            run = []
        if run:
            texts.append(self._join(run))
        spaces = self._SPACES_BETWEEN if spaces_between_special_tokens is None else spaces_between_special_tokens
        text = (" " if spaces else "").join(texts)
        return clean_up(text) if self._cleans else text


class SentencePieceTokenizer(SlowTokenizer):
    """A slow tokenizer around a sentencepiece model."""

    FILES = (MODEL_FILE,)

    def __init__(self, source):
        self._model = self._load(source)
        self._pieces = self._model.id_to_piece(list(range(self._model.get_piece_size())))
        self._vocab = {piece: i for i, piece in enumerate(self._pieces)}
        self._missing = self._model.unk_id()
        self._adds_bos = source.config.get("add_bos_token", True)
        self._adds_eos = source.config.get("add_eos_token", False)
        super().__init__(source, self.DEFAULTS, source.config.get("clean_up_tokenization_spaces", False))

    def _load(self, source, overrides=b""):
        model = sentencepiece.SentencePieceProcessor()
        try:
            model.LoadFromSerializedProto(source.files[MODEL_FILE] + overrides)
        except RuntimeError:
            raise TokenizerError(f"{source.path(MODEL_FILE)} is damaged or no sentencepiece model: copy it again") from None
        return model

    def _frame(self):
        before = [self.bos_token_id] if self._adds_bos and self.bos_token is not None else []
        after = [self.eos_token_id] if self._adds_eos and self.eos_token is not None else []
        return before, after
