"""Answers in a form: JSON by a schema, one of some choices, or text that a regular expression matches whole.

A :class:`Form` is compiled once; each answer walks its own :class:`Matcher` through it, which tells before each token which
ones the form allows. The grammars are those of ``llguidance`` (https://github.com/guidance-ai/llguidance), imported when the
first form is.
"""

import json
import re
import weakref

import numpy as np

from paddlemix.errors import PromptError

__all__ = ["Form", "Matcher", "compile_form", "grammar_of", "token_bytes"]

_KINDS = ("json_schema", "choices", "regex")
_MAX_DEPTH = 100


def _byte_table():
    """The character that byte-level BPE writes for each byte, the other way round (GPT-2's table)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(b): b for b in plain}
    return table | {chr(256 + n): b for n, b in enumerate(b for b in range(256) if b not in plain)}


def token_bytes(tokenizer, special=False):
    """What each id adds to a text, a list of bytes; empty for special tokens, unless ``special``, and for unused ids."""
    size = max(len(tokenizer), 1)
    names = [tokenizer.convert_ids_to_tokens(i) for i in range(size)]
    specials = set(tokenizer.all_special_ids)
    added = {token.content for token in tokenizer._added_tokens().values()}
    table = _byte_table()
    byte_level = any("\u0120" in (name or "") for name in names)
    found = []
    for i, name in enumerate(names):
        if name is None or (i in specials and not special):
            found.append(b"")
        elif i in specials or name in added:
            found.append(name.encode())
        elif byte_level:
            found.append(bytes(table[c] for c in name) if all(c in table for c in name) else name.encode())
        elif match := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", name):
            found.append(bytes([int(match[1], 16)]))
        else:
            found.append(name.replace("\u2581", " ").encode())
    return found


class _Vocabulary:
    """What llguidance asks of a tokenizer, from its bytes alone: forms hold no special tokens."""

    def __init__(self, tokenizer, stop):
        self.tokens = token_bytes(tokenizer)
        self.eos_token_id, self.bos_token_id = stop, None
        self.tokens[stop] = b"<|end|>"
        self.special_token_ids = [stop]
        self._ids = {}
        for i, value in enumerate(self.tokens):
            if value and i != stop:
                self._ids.setdefault(value, i)
        self._longest = max(map(len, self._ids))

    def __call__(self, text):
        data = text.encode() if isinstance(text, str) else bytes(text)
        ids, at = [], 0
        while at < len(data):
            for end in range(min(len(data), at + self._longest), at, -1):
                if data[at:end] in self._ids:
                    ids.append(self._ids[data[at:end]])
                    at = end
                    break
            else:
                at += 1
        return ids


_vocabularies = weakref.WeakKeyDictionary()


def _vocabulary(tokenizer, stop, size):
    """llguidance's form of a tokenizer, made once for each."""
    try:
        import llguidance
    except ImportError:
        raise PromptError("answers in a form need llguidance: pip install 'paddlemix[serving]'") from None
    kept = _vocabularies.setdefault(tokenizer, {})
    if (stop, size) not in kept:
        made = llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(_Vocabulary(tokenizer, stop)), n_vocab=max(size, len(tokenizer))
        )
        kept[stop, size] = made
    return kept[stop, size]


def _depth(value):
    """How deep lists and dictionaries lie in each other, without recursion."""
    level, depth = [value], 0
    while level:
        depth += 1
        level = [v for x in level if isinstance(x, (dict, list)) for v in (x.values() if isinstance(x, dict) else x)]
        if depth > _MAX_DEPTH:
            break
    return depth


def _references(value):
    stack = [value]
    while stack:
        x = stack.pop()
        if isinstance(x, dict):
            if isinstance(x.get("$ref"), str):
                yield x["$ref"]
            stack += x.values()
        elif isinstance(x, list):
            stack += x


def grammar_of(spec):
    """The text of a form's grammar.

    Args:
        spec: ``{"json_schema": dict, bool or JSON text}``, ``{"choices": [text, ...]}`` or ``{"regex": text}``.

    Raises:
        PromptError: it is none of these, or refers to what lies outside of it.
    """
    import llguidance

    if not isinstance(spec, dict) or len(spec) != 1 or next(iter(spec)) not in _KINDS:
        raise PromptError(f"a form must be one of {', '.join(_KINDS)}, with what belongs to it")
    ((kind, value),) = spec.items()
    if kind == "json_schema":
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                raise PromptError("the JSON schema is not JSON") from None
        if not isinstance(value, (dict, bool)):
            raise PromptError("a JSON schema must be an object, or true")
        if _depth(value) > _MAX_DEPTH:
            raise PromptError(f"the JSON schema is more than {_MAX_DEPTH} levels deep: make it simpler")
        if any(not ref.startswith("#") for ref in _references(value)):
            raise PromptError("the JSON schema refers to what lies outside of it: only references with # are followed")
        value = {"type": "object"} if value is True else value
        # Without free white space: small models would write blanks for ever.
        options = {"whitespace_flexible": False}
        return _grammar(llguidance.LLMatcher.grammar_from_json_schema, value, overrides=options)
    if kind == "regex":
        if not isinstance(value, str) or not value:
            raise PromptError("a regular expression must be a text that is not empty")
        return _grammar(llguidance.LLMatcher.grammar_from_regex, value)
    if not isinstance(value, (list, tuple)) or not value or not all(isinstance(c, str) and c for c in value):
        raise PromptError("choices must be a list of texts that are not empty")
    return llguidance.LLMatcher.grammar_from_lark("start: " + " | ".join(json.dumps(c, ensure_ascii=False) for c in value))


def _grammar(make, value, **options):
    try:
        return make(value, **options)
    except Exception as error:  # ValueError, and what its parser panics with
        raise PromptError(f"the form of the answer cannot be compiled: {_first_line(error)}") from None


class Form:
    """A compiled form; :meth:`matcher` makes one walk through it."""

    def __init__(self, first, stop):
        self._first, self._stop = first, stop

    def matcher(self):
        """A new :class:`Matcher` at the beginning."""
        return Matcher(self._first.deep_copy(), self._stop)


class Matcher:
    """One answer's place in a form."""

    def __init__(self, walk, stop):
        self._walk, self.stop, self.complete = walk, stop, False

    def allowed(self, size):
        """Which of ``size`` ids may come next, ``[size]`` bool.

        Raises:
            PromptError: the form turned out to be beyond what can be followed.
        """
        bits = np.frombuffer(self._walk.compute_bitmask(), np.uint8)
        if self._walk.is_error():
            raise PromptError("the form of the answer is too complex to follow: make it simpler")
        mask = np.unpackbits(bits, bitorder="little")[:size].astype(bool)
        if mask.size < size:
            mask = np.pad(mask, (0, size - mask.size))
        if not mask.any():
            mask[self.stop] = True
        return mask

    def accept(self, token):
        """Go on by one token; sets ``complete`` when nothing but the end can follow."""
        if token == self.stop:
            self.complete = True
            return
        self._walk.consume_token(token)
        self.complete = self._walk.is_stopped()


def compile_form(spec, tokenizer, stop, size=0):
    """Compile a form, or return it if it is compiled.

    Args:
        spec: as :func:`grammar_of` takes it.
        tokenizer: whose tokens the answer is made of.
        stop: id of the token that ends an answer.
        size: of the model's vocabulary.

    Raises:
        PromptError: it cannot be compiled, or needs ``llguidance``, which is not installed.
    """
    if isinstance(spec, Form):
        return spec
    vocabulary = _vocabulary(tokenizer, stop, size)
    from .form_limits import check_limits

    check_limits(spec)
    return Form(compile_grammar(grammar_of(spec), vocabulary), stop)


def compile_grammar(grammar, vocabulary):
    """A walk through a grammar at its beginning.

    Raises:
        PromptError: it cannot be compiled.
    """
    import llguidance

    try:
        walk = llguidance.LLMatcher(vocabulary, grammar)
    except Exception as error:  # the library raises ValueError, and what its parser panics with
        raise PromptError(f"the form of the answer cannot be compiled: {_first_line(error)}") from None
    if walk.is_error():
        raise PromptError(f"the form of the answer cannot be compiled: {_first_line(walk.get_error())}")
    return walk


def _first_line(error):
    text = str(error).strip().splitlines()
    return (text[0] if text else "its grammar is not valid")[:200]
