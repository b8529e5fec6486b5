"""Tokenizers of the InternVL checkpoints: text to ids and back, id for id what the original computes.

:func:`load_tokenizer` reads a checkpoint's own files and runs no code from it. Four kinds are told apart by the
``tokenizer_class`` of tokenizer_config.json and the files that exist:

- :class:`InternLM2Tokenizer` (InternLM2) and :class:`LlamaTokenizer` (Llama 2, Vicuna, Yi, Phi-3): tokenizer.model;
- :class:`Qwen2Tokenizer` (Qwen2, Qwen2.5): vocab.json and merges.txt;
- :class:`FastTokenizer` (Llama 3, or any of the above that lacks its own files): tokenizer.json.

The original loads with ``use_fast=False``, so a class's own files win over a tokenizer.json beside them. The rules are
those of transformers 4.44 (``tokenization_utils.py``, ``models/llama``, ``models/qwen2``) and of the
``tokenization_internlm2.py`` that InternLM2 checkpoints carry, including the places where spaces come and go.
"""

import copy
import dataclasses
import json
import os
import re
import unicodedata

import numpy as np
import sentencepiece
import tokenizers
from tokenizers import AddedToken

from paddlemix.errors import TokenizerError

_CONFIG, _SPECIAL, _ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
_FAST, _MODEL, _VOCAB, _MERGES = "tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt"
_FILES = (_CONFIG, _SPECIAL, _ADDED, _FAST, _MODEL, _VOCAB, _MERGES)
_REMOTE_CODE = re.compile(r"tokenization_\w+\.py")  # carried along for the original's loader; nothing here runs it
_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_MORE = "additional_special_tokens"
_FLAGS = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
_NO_LIMIT = int(1e30)  # model_max_length of a checkpoint that states none, as in the original
_SPACE = "▁"  # how sentencepiece writes a space
# How Qwen2 cuts text into words before merging bytes (transformers 4.44, models/qwen2/tokenization_qwen2.py).
_QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def load_tokenizer(path):
    """The tokenizer of a checkpoint directory.

    Args:
        path: directory with the tokenizer's files, as published or as :meth:`Tokenizer.save_pretrained` wrote them.

    Returns:
        A :class:`Tokenizer`.

    Raises:
        TokenizerError: the directory or a file is missing, broken, or of a kind that is not supported.
    """
    source = _Source.read(os.fspath(path))
    name = str(source.config.get("tokenizer_class") or "").removesuffix("Fast")
    if not name and _VOCAB in source.files and _MERGES in source.files:
        name = "Qwen2Tokenizer"  # no other kind has these files
    kind = _OWN_FILES.get(name)
    if kind and all(file in source.files for file in kind.FILES):
        return kind(source)
    if _FAST in source.files:
        return FastTokenizer(source, kind)
    raise TokenizerError(source.why_unusable(name))


def _clean_up(text):
    """Drop the spaces that word tokenizers leave before English punctuation and contractions."""
    for old in (" .", " ?", " !", " ,"):
        text = text.replace(old, old[1:])
    text = text.replace(" ' ", "'")
    for old in (" n't", " 'm", " 's", " 've", " 're"):
        text = text.replace(old, old[1:])
    return text


def _content(token):
    """Text of a token, which the files write as a str or a dictionary and this module has as an ``AddedToken`` too."""
    return token["content"] if isinstance(token, dict) else getattr(token, "content", token)


def _flags(token, names=_FLAGS):
    return {name: getattr(token, name) for name in names}


def _added_token(token, **flags):
    """An ``AddedToken`` of a token in any form; ``flags`` win over its own."""
    if isinstance(token, str):
        own = {"content": token, "normalized": False, "special": True}
    elif isinstance(token, dict):
        own = {name: token[name] for name in _FLAGS if name in token}
    else:
        own = _flags(token)
    return AddedToken(**(own | flags))


@dataclasses.dataclass
class _Source:
    """The tokenizer files of a checkpoint, held as bytes so that they can be saved when the directory is gone."""

    directory: str
    files: dict
    config: dict

    @classmethod
    def read(cls, directory):
        if not os.path.isdir(directory):
            raise TokenizerError(f"{directory} is not a directory: pass the directory of a checkpoint")
        source = cls(directory, {}, {})
        for name in sorted(os.listdir(directory)):
            if name in _FILES or _REMOTE_CODE.fullmatch(name):
                try:
                    with open(source.path(name), "rb") as file:
                        source.files[name] = file.read()
                except OSError as error:
                    raise TokenizerError(f"{source.path(name)} cannot be read: {error.strerror}") from None
        if _CONFIG in source.files:
            source.config = source.json(_CONFIG)
        return source

    def path(self, name):
        return os.path.join(self.directory, name)

    def json(self, name):
        """The JSON object in a file."""
        try:
            value = json.loads(self.files[name].decode("utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise TokenizerError(f"{self.path(name)} is not valid JSON ({error}): download or copy it again") from None
        if not isinstance(value, dict):
            raise TokenizerError(f"{self.path(name)} holds no JSON object: download or copy it again")
        return value

    def why_unusable(self, name):
        """What keeps these files from being a tokenizer, in one sentence."""
        if name in _OWN_FILES:
            missing = [file for file in _OWN_FILES[name].FILES if file not in self.files]
            return f"{self.path(missing[0])} is missing: a {name} needs it, or else a {_FAST}"
        if name and name != "PreTrainedTokenizer":
            return f"{self.path(_CONFIG)} names tokenizer_class '{name}': supported are {', '.join(_OWN_FILES)}"
        if _MODEL in self.files:
            return f"{self.path(_CONFIG)} names no tokenizer_class that says how to use {_MODEL}: add it, as published"
        for present, absent in ((_VOCAB, _MERGES), (_MERGES, _VOCAB)):
            if present in self.files:
                return f"{self.path(absent)} is missing: {present} is of no use without it"
        return f"{self.directory} has no {_FAST}, no {_MODEL} and no {_VOCAB}: copy the tokenizer's files there"

    def special_tokens(self, defaults):
        """What the files say of special and added tokens.

        Returns:
            ``(named, additional, added)``: name to ``AddedToken`` or None; list of ``AddedToken``, or str where the
            files give no flags; id to ``AddedToken``.
        """
        try:
            return self._special_tokens(defaults)
        except TokenizerError:
            raise
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise TokenizerError(f"the special tokens in {self.path(_CONFIG)} are malformed ({error!r})") from None

    def _special_tokens(self, defaults):
        tokens = defaults | {k: v for k, v in self.config.items() if k in _NAMES or k == _MORE}
        more = list(tokens.get(_MORE) or [])
        added, known = {}, {}
        if "added_tokens_decoder" in self.config:
            # Files since transformers 4.34 have everything here, and then the other files do not count.
            added = {int(i): _added_token(token) for i, token in self.config["added_tokens_decoder"].items()}
            known = {token.content: token for token in added.values()}
        else:
            special = self.json(_SPECIAL) if _SPECIAL in self.files else {}
            tokens |= {k: v for k, v in special.items() if k in _NAMES}
            more += special.get(_MORE) or []
            names = {_content(token) for token in [*(tokens.get(k) for k in _NAMES), *more]}
            for text, i in (self.json(_ADDED) if _ADDED in self.files else {}).items():
                added[int(i)] = _added_token(text, normalized=text not in names, special=text in names)
            for token in self.json(_FAST)["added_tokens"] if _FAST in self.files else []:
                added[int(token["id"])] = known[token["content"]] = _added_token(token)

        named = {name: tokens.get(name) for name in _NAMES}
        named = {k: v and _added_token(known.get(_content(v), v), special=True) for k, v in named.items()}
        additional = {}
        for token in more:
            if not isinstance(token, str):
                additional[_content(token)] = _added_token(token, special=True)
            else:  # of a token that is listed twice, the flags count
                additional.setdefault(token, token)
        return named, list(additional.values()), added


def _token_property(name):
    def get(self):
        return self._named[name]

    def set(self, token):
        self.require_token_id(token)
        self._named[name] = token
        self._changed = True
        self._refresh()

    return property(get, set, doc=f"Text of the {name.replace('_', ' ')}, or None. It can be set to a token that exists.")


def _id_property(name):
    def get(self):
        token = self._named[name]
        return None if token is None else self.convert_tokens_to_ids(token)

    return property(get, doc=f"Id of the {name.replace('_', ' ')}, or None.")


class Tokenizer:
    """What every tokenizer does. Make one with :func:`load_tokenizer`.

    Attributes:
        padding_side, truncation_side: ``"right"`` or ``"left"``.
        model_max_length: the length that ``truncation=True`` and ``padding="max_length"`` take when none is given; 1e30
            when the checkpoint states none.
        split_special_tokens: default of the argument of :meth:`encode`.
        additional_special_tokens: list of str, beside the named ones.
        directory: where the files came from.
    """

    # A kind of tokenizer provides ``__len__`` (size of the vocabulary with the added tokens, the id of the next one),
    # ``vocab_size`` (without them) and
    #   _install(added, named, additional)  take over what _Source.special_tokens found
    #   _add(tokens)                        add a list of AddedToken
    #   _added_tokens()                     id to AddedToken, in the order of the ids
    #   _token(i)                           token of an id, or None
    #   _id(token), _has(token)             id of a token, or what stands for an unknown one; whether it exists
    #   _frame()                            ids that go before and after every text, two lists
    #   _ids(text, split_special_tokens)    ids of a text without those
    #   _text(ids, skip, spaces)            text of ids that exist

    NAME = ""  # what tokenizer_config.json calls it
    DEFAULTS = {}  # special tokens that the original's class assumes where the checkpoint is silent
    # Characters that a further id can change or remove when a decoded text ends in them.
    _UNSTABLE = "\ufffd"
    _UNSTABLE_BY_CLEANING = "\ufffd 'nvr"  # also all that the patterns of _clean_up have before their last character

    bos_token, bos_token_id = _token_property("bos_token"), _id_property("bos_token")
    eos_token, eos_token_id = _token_property("eos_token"), _id_property("eos_token")
    unk_token, unk_token_id = _token_property("unk_token"), _id_property("unk_token")
    pad_token, pad_token_id = _token_property("pad_token"), _id_property("pad_token")

    def __init__(self, source, defaults, cleans):
        config = source.config
        self.directory = source.directory
        self.padding_side = config.get("padding_side", "right")
        self.truncation_side = config.get("truncation_side", "right")
        length = config.get("model_max_length")
        self.model_max_length = self._stated_length = _NO_LIMIT if length is None else length
        self.split_special_tokens = config.get("split_special_tokens", False)
        self._source = source
        self._cleans = cleans
        self._unstable = self._UNSTABLE_BY_CLEANING if cleans else self._UNSTABLE
        self._changed = False
        named, additional, added = source.special_tokens(defaults)
        self._named = {name: token and token.content for name, token in named.items()}
        self.additional_special_tokens = [_content(token) for token in additional]
        self._install(added, [token for token in named.values() if token], additional)
        self._refresh()

    def _refresh(self):
        """Bring what is derived from the special tokens up to date."""
        self._special = set(self.all_special_tokens)
        self._special_ids = set(self.all_special_ids)

    # Vocabulary.

    @property
    def all_special_tokens(self):
        """Texts of the named and the additional special tokens, without doubles."""
        named = [token for token in self._named.values() if token is not None]
        return list(dict.fromkeys(named + self.additional_special_tokens))

    @property
    def all_special_ids(self):
        """Ids of :attr:`all_special_tokens`."""
        return self.convert_tokens_to_ids(self.all_special_tokens)

    def convert_tokens_to_ids(self, tokens):
        """Id of a token, or list of ids of a list. An unknown one gives the id of the unknown token, or None."""
        return self._id(tokens) if isinstance(tokens, str) else [self._id(token) for token in tokens]

    def convert_ids_to_tokens(self, ids, skip_special_tokens=False):
        """Token of an id, or list of tokens of a list of ids. An id outside the vocabulary gives None."""
        if isinstance(ids, (int, np.integer)):
            return self._token(int(ids))
        return [self._token(i) for i in map(int, ids) if not (skip_special_tokens and i in self._special_ids)]

    def require_token_id(self, token):
        """Id of a token that must exist.

        Raises:
            TokenizerError: it does not.
        """
        if not self._has(token):
            raise TokenizerError(f"the tokenizer in {self.directory} has no token '{token}': take that of your model")
        return self._id(token)

    def add_tokens(self, tokens, special=True):
        """Add tokens, inside of which text is then never split; new ones get the ids from ``len(tokenizer)`` on.

        Args:
            tokens: list of str. Those that were added before are left alone.
            special: whether decoding with ``skip_special_tokens`` leaves them out.

        Returns:
            How many ids are new: by so many rows the embeddings have to grow.
        """
        before, known = len(self), {token.content for token in self._added_tokens().values()}
        tokens = [token for token in dict.fromkeys(tokens) if token and token not in known]
        if tokens:
            self._add([_added_token(token, normalized=not special, special=special) for token in tokens])
            self._changed = True
            self._refresh()
        return len(self) - before

    # Text to ids.

    def encode(self, text, add_special_tokens=True, split_special_tokens=None):
        """Ids of one text.

        Args:
            text: str.
            add_special_tokens: frame it as the checkpoint says, for instance with ``<s>``.
            split_special_tokens: take special tokens in the text for ordinary characters, when it comes from somebody who
                must not be able to write them. None takes the attribute of that name.

        Returns:
            list of int.

        Raises:
            TokenizerError: ``text`` is not a str, or not valid Unicode.
        """
        before, after = self._frame() if add_special_tokens else ([], [])
        return [*before, *self._plain_ids(text, split_special_tokens), *after]

    def __call__(
        self,
        text,
        padding=False,
        truncation=None,
        max_length=None,
        add_special_tokens=True,
        return_attention_mask=True,
        return_tensors=None,
        split_special_tokens=None,
    ):
        """Ids of a text or of a list of texts.

        Args:
            text: str or list of str.
            padding: False; True or ``"longest"`` for the longest of the list; ``"max_length"``.
            truncation: whether to cut to ``max_length`` ids, framing tokens included. None means yes if ``max_length``
                is given and ``padding`` is not.
            max_length: in ids; ``model_max_length`` if None.
            add_special_tokens, split_special_tokens: as for :meth:`encode`.
            return_attention_mask: whether to return it: 1 for ids of the text, 0 for padding.
            return_tensors: None, or ``"np"`` for int64 arrays [B, L] (B is 1 for a single str).

        Returns:
            dict with ``input_ids`` and ``attention_mask``: lists of int for a str, lists of those for a list.

        Raises:
            TokenizerError: a text is not a str, padding without a padding token, or rows that form no array.
        """
        if padding not in (False, True, "longest", "max_length"):
            raise TokenizerError(f"padding is '{padding}': it must be False, True, 'longest' or 'max_length'")
        if return_tensors not in (None, "np"):
            raise TokenizerError(f"return_tensors is '{return_tensors}': it must be None or 'np'")
        if truncation is None:
            truncation = max_length is not None and not padding
        limit = self.model_max_length if max_length is None else max_length

        before, after = self._frame() if add_special_tokens else ([], [])
        rows = []
        single = not isinstance(text, (list, tuple))
        for item in [text] if single else text:
            ids = self._plain_ids(item, split_special_tokens)
            if truncation:
                room = max(0, min(len(ids), limit - len(before) - len(after)))
                ids = ids[len(ids) - room :] if self.truncation_side == "left" else ids[:room]
            rows.append([*before, *ids, *after])
        masks = [[1] * len(row) for row in rows]

        if padding and (padding != "max_length" or limit < _NO_LIMIT):
            if self.pad_token is None:
                raise TokenizerError(f"the tokenizer in {self.directory} has no padding token: set its pad_token")
            width = limit if padding == "max_length" else max(map(len, rows), default=0)
            rows = [self._pad(row, self.pad_token_id, width) for row in rows]
            masks = [self._pad(mask, 0, width) for mask in masks]

        result = {"input_ids": rows, "attention_mask": masks} if return_attention_mask else {"input_ids": rows}
        if return_tensors == "np":
            if len({len(row) for row in rows}) > 1:
                raise TokenizerError("the texts differ in length and form no array: pass padding=True")
            return {key: np.array(value, dtype=np.int64) for key, value in result.items()}
        return {key: value[0] for key, value in result.items()} if single else result

    def _pad(self, row, value, width):
        filling = [value] * (width - len(row))
        return filling + row if self.padding_side == "left" else row + filling

    def _plain_ids(self, text, split_special_tokens):
        if not isinstance(text, str):
            raise TokenizerError(f"text to encode must be a str, not {type(text).__name__}")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise TokenizerError(f"character {error.start} of the text is half a surrogate pair: repair the text") from None
        return self._ids(text, self.split_special_tokens if split_special_tokens is None else split_special_tokens)

    # Ids to text.

    def decode(self, ids, skip_special_tokens=False, spaces_between_special_tokens=None):
        """Text of ids, at a cost linear in their number: see :meth:`stable_length` for text that grows id by id.

        Args:
            ids: int, or a list or array of int. Ids outside the vocabulary have no text.
            skip_special_tokens: leave special tokens out.
            spaces_between_special_tokens: put a space around added tokens. None does what the original does whatever
                tokenizer_config.json says: yes for InternLM2 and Llama, no for the others.

        Raises:
            TokenizerError: a negative id, such as the -100 of an ignored label.
        """
        ids = [int(ids)] if isinstance(ids, (int, np.integer)) else [int(i) for i in ids]
        if ids and min(ids) < 0:
            raise TokenizerError(f"id {min(ids)} cannot be decoded: remove ignored labels first")
        ids = [i for i in ids if self._token(i) is not None]
        return self._text(ids, skip_special_tokens, spaces_between_special_tokens)

    def batch_decode(self, sequences, skip_special_tokens=False, spaces_between_special_tokens=None):
        """List of the texts of several lists of ids."""
        return [self.decode(ids, skip_special_tokens, spaces_between_special_tokens) for ids in sequences]

    def stable_length(self, text):
        """How many characters of a decoded text are final, whatever ids follow.

        A later id may complete a character whose bytes are spread over ids, or draw a punctuation mark to the word before
        it. With ``text = decode(ids, skip_special_tokens=True)``, ``text[:stable_length(text)]`` is a prefix of
        ``decode(ids + more, skip_special_tokens=True)``. And where all of ``text`` is stable, ``more`` adds to it what it
        adds to the text of the last few ids, if these have text and all of that is stable: so a stream can decode each
        new id at constant cost.
        """
        return len(text.rstrip(self._unstable))

    # Files.

    def save_pretrained(self, directory):
        """Write the tokenizer's files; :func:`load_tokenizer` and the original read them back.

        They are copies of the files this tokenizer was made from, except for what :meth:`add_tokens`, another
        ``model_max_length`` or a newly set special token make different. Each file is replaced as a whole.
        """
        os.makedirs(directory, exist_ok=True)
        files = dict(self._source.files)
        if self._changed or self.model_max_length != self._stated_length:
            files |= {name: content.encode("utf-8") for name, content in self._changed_files().items()}
        for name, content in files.items():
            path = os.path.join(directory, name)
            with open(path + ".tmp", "wb") as file:
                file.write(content)
            os.replace(path + ".tmp", path)

    def _changed_files(self):
        added, more = self._added_tokens(), self.additional_special_tokens
        described = {token.content: _flags(token, _FLAGS[:-1]) for token in added.values()}  # special by being listed
        config = {"tokenizer_class": self.NAME, **self._source.config, **self._named, _MORE: more}
        config["model_max_length"] = self.model_max_length
        config["added_tokens_decoder"] = {str(i): _flags(token) for i, token in added.items()}
        special = {name: described.get(token, token) for name, token in self._named.items() if token is not None}
        files = {
            _CONFIG: config,
            _SPECIAL: special | {_MORE: [described.get(token, token) for token in more]},
            _ADDED: {token.content: i for i, token in added.items() if i >= self.vocab_size},
        }
        if _FAST in self._source.files:
            # Not what the library would write: its older versions, which the original needs, could not read that.
            files[_FAST] = content = self._source.json(_FAST)
            listed = {token["content"] for token in content["added_tokens"]}
            new = [(i, token) for i, token in added.items() if token.content not in listed]
            content["added_tokens"] += [{"id": i, **_flags(token)} for i, token in new]
        return {name: json.dumps(value, ensure_ascii=False, indent=2) + "\n" for name, value in files.items()}


class _SlowTokenizer(Tokenizer):
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
            self._put(_added_token(token))

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
        return _clean_up(text) if self._cleans else text


class _SentencePieceTokenizer(_SlowTokenizer):
    """A slow tokenizer around a sentencepiece model."""

    FILES = (_MODEL,)

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
            model.LoadFromSerializedProto(source.files[_MODEL] + overrides)
        except RuntimeError:
            raise TokenizerError(f"{source.path(_MODEL)} is damaged or no sentencepiece model: copy it again") from None
        return model

    def _frame(self):
        before = [self.bos_token_id] if self._adds_bos and self.bos_token is not None else []
        after = [self.eos_token_id] if self._adds_eos and self.eos_token is not None else []
        return before, after


class InternLM2Tokenizer(_SentencePieceTokenizer):
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
        return _clean_up(text + self._model.decode(run))


class LlamaTokenizer(_SentencePieceTokenizer):
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
        text = text.replace(_SPACE, " ")
        tokens = super()._tokens(_SPACE + text if self._prefix_space else text, split_special_tokens)
        return tokens[1:] if len(tokens) > 1 and tokens[0] == _SPACE and tokens[1] in self._special else tokens

    def _tokenize(self, text):
        if self._legacy or not text.startswith((_SPACE, " ")):
            return self._model.encode(text, out_type=str)
        # Sentencepiece may swallow a leading space; behind other characters it keeps it.
        return self._model.encode(self._guard + text, out_type=str)[self._guard_length :]

    def _join(self, tokens):
        if self._prefix_space and tokens[0].startswith(_SPACE):
            tokens = [tokens[0][1:], *tokens[1:]]
        text, run, after_special = "", [], False
        for i, token in enumerate(tokens):
            if token in self._special:
                text += (" " if self._legacy and i and not after_special else "") + self._model.decode(run) + token
                run = []
            else:
                if after_special and i == 1 and self._prefix_space and not token.startswith(_SPACE):
                    text += " "
                run.append(token)
            after_special = token in self._special
        return text + self._model.decode(run)


class Qwen2Tokenizer(_SlowTokenizer):
    """Qwen2's byte-level BPE from vocab.json and merges.txt. Nothing frames a text."""

    NAME = "Qwen2Tokenizer"
    FILES = (_VOCAB, _MERGES)
    DEFAULTS = {"unk_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    _SPACES_BETWEEN = False

    def __init__(self, source):
        self._vocab = source.json(_VOCAB)
        try:
            lines = source.files[_MERGES].decode("utf-8").split("\n")
            lines = lines[1:] if lines[0].startswith("#version:") else lines
            merges = [tuple(line.split()) for line in lines if line.strip()]
            if any(len(pair) != 2 for pair in merges):
                raise ValueError("a merge that is not of two tokens")
            self._model = tokenizers.Tokenizer(tokenizers.models.BPE(self._vocab, merges))
        except Exception as error:  # the library raises nothing narrower for a merge of tokens that do not exist
            raise TokenizerError(
                f"{source.path(_VOCAB)} and {_MERGES} do not fit together ({error}): copy both again"
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


class FastTokenizer(Tokenizer):
    """A tokenizer that is all in tokenizer.json, which says how to split, merge, frame and decode.

    Args:
        source: the files.
        kind: the class named by the checkpoint if its own files are missing: its defaults hold.
    """

    NAME = "PreTrainedTokenizerFast"

    def __init__(self, source, kind=None):
        try:
            self._model = tokenizers.Tokenizer.from_str(source.files[_FAST].decode("utf-8"))
        except Exception as error:  # the library raises nothing narrower
            raise TokenizerError(f"{source.path(_FAST)} is no tokenizer ({error}): download or copy it again") from None
        self._model.no_truncation()
        self._model.no_padding()
        config = source.config
        cleans = kind is not Qwen2Tokenizer and config.get("clean_up_tokenization_spaces", True)
        super().__init__(source, kind.DEFAULTS if kind else {}, cleans)
        if kind and issubclass(kind, _SentencePieceTokenizer):
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
        special = {_content(token) for token in [*named, *additional]}
        for token in map(_added_token, [*(added[i] for i in sorted(added)), *named, *additional]):
            if token.content not in listed:
                listed.add(token.content)
                self._add([_added_token(token, special=token.special or token.content in special)])
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
        return _clean_up(text) if self._cleans else text


_OWN_FILES = {kind.NAME: kind for kind in (InternLM2Tokenizer, LlamaTokenizer, Qwen2Tokenizer)}
