"""Regular expressions of a tokenizer.json, judged before they run: some take longer than the universe on a short text.

The library searches by backtracking, where a repetition within a repetition, such as ``(a+)+b``, tries every way to cut up
what it cannot match. Patterns of published tokenizers repeat nothing that is repeated, and no repetition in them is
followed by more than one other part that can fail; that is what is asked for here. The grammar is Oniguruma's, as far as
it matters.
"""

import re

from paddlemix.errors import TokenizerError

MOST = 5000  # characters of a pattern; published ones have up to 300
_LONG = 64  # a repetition up to this often counts as bounded
_TOKEN = re.compile(r"\\[pP]\{[^}]*\}|\\x\{[^}]*\}|\\.|\(\?<?[=!]|\(\?>|\(\?[a-zA-Z-]*:|\(\?#[^)]*\)|[()|]|\[|.", re.DOTALL)
_QUANTIFIER = re.compile(r"(?:[*+?]|\{\d*(?:,\d*)?\})[?+]?")


def check_patterns(values, path):
    """Look at every regular expression of a ``tokenizer.json``.

    Args:
        values: the file's JSON object.
        path: the file, for the message.

    Raises:
        TokenizerError: names the key of a pattern that could take for ever.
    """
    for key in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        for where, pattern in _patterns(values.get(key), key, 0):
            problem = judge(pattern)
            if problem:
                raise TokenizerError(f"{path}: {where} {problem}, which can take for ever: get the tokenizer's published files")


def _patterns(value, where, depth):
    if depth > 50:
        raise TokenizerError(f"{where[:60]}... is nested too deep: get the tokenizer's published files")
    if isinstance(value, dict):
        for key, inner in value.items():
            if key == "Regex":
                yield f"{where}.{key}", inner
            else:
                yield from _patterns(inner, f"{where}.{key}", depth + 1)
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from _patterns(inner, f"{where}[{i}]", depth + 1)


def judge(pattern):
    """What is wrong with a regular expression, in words; None for nothing."""
    if not isinstance(pattern, str) or len(pattern) > MOST:
        return f"is no pattern of at most {MOST} characters"
    try:
        _, end = _alternatives(pattern, 0, 0)
    except _Bad as bad:
        return str(bad)
    return None if end == len(pattern) else "has a bracket that was never opened"


class _Bad(Exception):
    """What is wrong with a pattern."""


def _alternatives(pattern, at, depth):
    """Read up to a closing bracket; returns ((can be empty, has an open repetition, has alternatives), next position)."""
    if depth > 50:
        raise _Bad("is nested too deep")
    empty, repeats, count = False, False, 0
    while True:
        (branch_empty, branch_repeats), at = _sequence(pattern, at, depth)
        empty, repeats, count = empty or branch_empty, repeats or branch_repeats, count + 1
        if at >= len(pattern) or pattern[at] == ")":
            return (empty, repeats, count > 1), at
        at += 1  # the bar


def _sequence(pattern, at, depth):
    parts = []  # (can be empty, is or has an open repetition)
    while at < len(pattern) and pattern[at] not in "|)":
        token = _TOKEN.match(pattern, at)[0]
        at += len(token)
        alternatives = inner = False
        empty = False
        if token == "[":
            at = _end_of_class(pattern, at)
        elif token.startswith("(?#"):
            continue
        elif token.startswith("("):
            (empty, inner, alternatives), at = _alternatives(pattern, at, depth + 1)
            if at >= len(pattern):
                raise _Bad("has a bracket that is never closed")
            at += 1
            # Look-around takes no text but can fail, like a part that cannot be empty.
            empty = False if "=" in token or "!" in token else empty
        quantifier = _QUANTIFIER.match(pattern, at)
        while quantifier:  # several in a row are nested
            low, high = _range(quantifier[0])
            at = quantifier.end()
            if high > _LONG and (inner or alternatives or empty):
                raise _Bad("repeats what is repeated or has alternatives")
            empty, inner = empty or low == 0, inner or high > _LONG
            quantifier = _QUANTIFIER.match(pattern, at)
        parts.append((empty, inner))
    open_ones = [i for i, (_, repeated) in enumerate(parts) if repeated]
    failing = [i for i in open_ones if any(not empty for empty, _ in parts[i + 1 :])]
    if len(failing) > 1:
        raise _Bad("has several repetitions before a part that can fail")
    return (all(empty for empty, _ in parts), bool(open_ones)), at


def _range(quantifier):
    if quantifier[0] in "*+?":
        return {"*": (0, 1 << 30), "+": (1, 1 << 30), "?": (0, 1)}[quantifier[0]]
    low, comma, high = quantifier[1 : quantifier.index("}")].partition(",")
    return int(low or 0), int(high) if high else (1 << 30 if comma else int(low or 0))


def _end_of_class(pattern, at):
    """Position behind a character class whose opening bracket has been read; classes nest in Oniguruma."""
    depth, first = 1, at
    while at < len(pattern):
        if pattern[at] == "\\":
            at += 1
        elif pattern[at] == "[":
            depth += 1
        elif pattern[at] == "]" and at not in (first, first + 1 if pattern[first : first + 1] == "^" else first):
            depth -= 1
            if not depth:
                return at + 1
        at += 1
    raise _Bad("has a class that is never closed")
