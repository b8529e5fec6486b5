"""What every tokenizer does: text to ids and back, id for id what the original computes.

The rules are those of transformers 4.44 (``tokenization_utils.py``), including the places where spaces come and go.
"""

import json
import os

import numpy as np

from paddlemix.errors import TokenizerError

from .sources import ADDED_FILE, CONFIG_FILE, FAST_FILE, FLAGS, MORE, NO_LIMIT, SPECIAL_FILE, added_token, content_of, flags_of


def clean_up(text):
    """Drop the spaces that word tokenizers leave before English punctuation and contractions."""
    for old in (" .", " ?", " !", " ,"):
        text = text.replace(old, old[1:])
    text = text.replace(" ' ", "'")
    for old in (" n't", " 'm", " 's", " 've", " 're"):
        text = text.replace(old, old[1:])
    return text


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
    #   _install(added, named, additional)  take over what Source.special_tokens found
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
    _UNSTABLE_BY_CLEANING = "\ufffd 'nvr"  # also all that the patterns of clean_up have before their last character

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
        self.model_max_length = self._stated_length = NO_LIMIT if length is None else length
        self.split_special_tokens = config.get("split_special_tokens", False)
        self._source = source
        self._cleans = cleans
        self._unstable = self._UNSTABLE_BY_CLEANING if cleans else self._UNSTABLE
        self._changed = False
        named, additional, added = source.special_tokens(defaults)
        self._named = {name: token and token.content for name, token in named.items()}
        self.additional_special_tokens = [content_of(token) for token in additional]
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
            self._add([added_token(token, normalized=not special, special=special) for token in tokens])
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

        if padding and (padding != "max_length" or limit < NO_LIMIT):
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

    # Conversations.

    def apply_chat_template(self, messages, add_generation_prompt=False, **variables):
        """The prompt that the folder's own Jinja template writes, as text.

        It may differ from what :meth:`model.chat` sends, which is the original's: published templates add no system message.

        Args:
            messages: ``[{"role": "system" | "user" | "assistant", "content": text or list of parts}, ...]``; a part is
                ``{"type": "text", "text": ...}``, ``{"type": "image"}`` or ``{"type": "video"}``.
            add_generation_prompt: end it where the assistant speaks.
            variables: what else the template may ask for, such as ``enable_thinking``.

        Raises:
            TokenizerError: the folder has no template, or the template fails, asks for attributes that it must not have,
                takes more than two seconds, or writes more than a megabyte.
            PromptError: messages are of no such form.
        """
        from . import templates  # here, because most never need it

        text = templates.chat_template(self._source.files, self._source.json)
        tokens = {name: token for name, token in self._named.items() if token is not None}
        return templates.render(text, messages, add_generation_prompt, tokens, variables)

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
        described = {token.content: flags_of(token, FLAGS[:-1]) for token in added.values()}  # special by being listed
        config = {"tokenizer_class": self.NAME, **self._source.config, **self._named, MORE: more}
        config["model_max_length"] = self.model_max_length
        config["added_tokens_decoder"] = {str(i): flags_of(token) for i, token in added.items()}
        special = {name: described.get(token, token) for name, token in self._named.items() if token is not None}
        files = {
            CONFIG_FILE: config,
            SPECIAL_FILE: special | {MORE: [described.get(token, token) for token in more]},
            ADDED_FILE: {token.content: i for i, token in added.items() if i >= self.vocab_size},
        }
        if FAST_FILE in self._source.files:
            # Not what the library would write: its older versions, which the original needs, could not read that.
            files[FAST_FILE] = content = self._source.json(FAST_FILE)
            listed = {token["content"] for token in content["added_tokens"]}
            new = [(i, token) for i, token in added.items() if token.content not in listed]
            content["added_tokens"] += [{"id": i, **flags_of(token)} for i, token in new]
        return {name: json.dumps(value, ensure_ascii=False, indent=2) + "\n" for name, value in files.items()}
