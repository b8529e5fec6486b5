"""The tokenizer files of a checkpoint, and what they say of special and added tokens."""

import dataclasses
import os
import re

from tokenizers import AddedToken

from paddlemix.errors import TokenizerError
from paddlemix.files import parse_json, read_regular

CONFIG_FILE, SPECIAL_FILE, ADDED_FILE = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
FAST_FILE, MODEL_FILE, VOCAB_FILE, MERGES_FILE = "tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt"
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
FILES = (*TEMPLATE_FILES, CONFIG_FILE, SPECIAL_FILE, ADDED_FILE, FAST_FILE, MODEL_FILE, VOCAB_FILE, MERGES_FILE)
REMOTE_CODE = re.compile(r"tokenization_\w+\.py")  # carried along for the original's loader; nothing here runs it
NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
MORE = "additional_special_tokens"
FLAGS = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
MOST_BYTES = 256 << 20  # of a file; published ones have up to 30 MB
NO_LIMIT = int(1e30)  # model_max_length of a checkpoint that states none, as in the original
SPACE = "▁"  # how sentencepiece writes a space


def content_of(token):
    """Text of a token, which the files write as a str or a dictionary and this module has as an ``AddedToken`` too."""
    return token["content"] if isinstance(token, dict) else getattr(token, "content", token)


def flags_of(token, names=FLAGS):
    return {name: getattr(token, name) for name in names}


def added_token(token, **flags):
    """An ``AddedToken`` of a token in any form; ``flags`` win over its own."""
    if isinstance(token, str):
        own = {"content": token, "normalized": False, "special": True}
    elif isinstance(token, dict):
        own = {name: token[name] for name in FLAGS if name in token}
    else:
        own = flags_of(token)
    return AddedToken(**(own | flags))


@dataclasses.dataclass
class Source:
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
            if name in FILES or REMOTE_CODE.fullmatch(name):
                try:
                    source.files[name] = read_regular(source.path(name), MOST_BYTES)
                except OSError as error:
                    raise TokenizerError(f"{source.path(name)} cannot be read: {error.strerror}") from None
        if CONFIG_FILE in source.files:
            source.config = source.json(CONFIG_FILE)
        return source

    def path(self, name):
        return os.path.join(self.directory, name)

    def json(self, name):
        """The JSON object in a file."""
        return parse_json(self.files[name], self.path(name), TokenizerError)

    def why_unusable(self, name, kinds):
        """What keeps these files from being a tokenizer, in one sentence."""
        if name in kinds:
            missing = [file for file in kinds[name].FILES if file not in self.files]
            return f"{self.path(missing[0])} is missing: a {name} needs it, or else a {FAST_FILE}"
        if name and name != "PreTrainedTokenizer":
            return f"{self.path(CONFIG_FILE)} names tokenizer_class '{name}': supported are {', '.join(kinds)}"
        if MODEL_FILE in self.files:
            return f"{self.path(CONFIG_FILE)} names no tokenizer_class that says how to use {MODEL_FILE}: add it, as published"
        for present, absent in ((VOCAB_FILE, MERGES_FILE), (MERGES_FILE, VOCAB_FILE)):
            if present in self.files:
                return f"{self.path(absent)} is missing: {present} is of no use without it"
        return f"{self.directory} has no {FAST_FILE}, no {MODEL_FILE} and no {VOCAB_FILE}: copy the tokenizer's files there"

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
            raise TokenizerError(f"the special tokens in {self.path(CONFIG_FILE)} are malformed ({error!r})") from None

    def _special_tokens(self, defaults):
        tokens = defaults | {k: v for k, v in self.config.items() if k in NAMES or k == MORE}
        more = list(tokens.get(MORE) or [])
        added, known = {}, {}
        if "added_tokens_decoder" in self.config:
            # Files since transformers 4.34 have everything here, and then the other files do not count.
            added = {int(i): added_token(token) for i, token in self.config["added_tokens_decoder"].items()}
            known = {token.content: token for token in added.values()}
        else:
            special = self.json(SPECIAL_FILE) if SPECIAL_FILE in self.files else {}
            tokens |= {k: v for k, v in special.items() if k in NAMES}
            more += special.get(MORE) or []
            names = {content_of(token) for token in [*(tokens.get(k) for k in NAMES), *more]}
            for text, i in (self.json(ADDED_FILE) if ADDED_FILE in self.files else {}).items():
                added[int(i)] = added_token(text, normalized=text not in names, special=text in names)
            for token in self.json(FAST_FILE)["added_tokens"] if FAST_FILE in self.files else []:
                added[int(token["id"])] = known[token["content"]] = added_token(token)

        named = {name: tokens.get(name) for name in NAMES}
        named = {k: v and added_token(known.get(content_of(v), v), special=True) for k, v in named.items()}
        additional = {}
        for token in more:
            if not isinstance(token, str):
                additional[content_of(token)] = added_token(token, special=True)
            else:  # of a token that is listed twice, the flags count
                additional.setdefault(token, token)
        return named, list(additional.values()), added
