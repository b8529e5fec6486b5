"""Captions: Bleu, ROUGE-L and CIDEr by pycocoevalcap, with a tokenizer that needs no Java.

:func:`tokenize` follows the Penn Treebank tokenizer of Stanford CoreNLP that pycocoevalcap starts, as far as captions go.
METEOR and SPICE are left out: they are Java programs, and SPICE fetches its models from the net.
"""

import contextlib
import io
import re

from . import field, mean

# Tokens that pycocoevalcap leaves out, before its tokens are in lower case, so that "-lrb-" stays.
_DROPPED = {"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"}
_BRACKETS = dict(zip("()[]{}", ("-lrb-", "-rrb-", "-lsb-", "-rsb-", "-lcb-", "-rcb-")))
_ABBREVIATIONS = (
    "mr mrs ms dr prof rev gen sen rep gov capt sgt lt col st ave blvd rd jr sr vs etc inc co corp ltd bros dept est mt ft "
    "jan feb mar apr jun jul aug sept sep oct nov dec mon tue tues wed thu thurs fri sat sun"
)
_SPLIT_WORDS = {
    "cannot": ("can", "not"),
    "gonna": ("gon", "na"),
    "gotta": ("got", "ta"),
    "wanna": ("wan", "na"),
    "lemme": ("lem", "me"),
    "gimme": ("gim", "me"),
}
_TOKEN = re.compile(
    rf"""
      (?P<link>(?:https?://|www\.)[^\s"<>|()]+[^\s"<>|().,!?;:'])
    | (?P<letters>[^\W\d_](?:\.[^\W\d_])+\.?(?![^\W_]))               # U.S., p.m.
    | (?P<short>(?:{"|".join(_ABBREVIATIONS.split())})\.(?!\w))                                       # Mr.
    | (?P<number>[-+]?\d+(?:[.,:]\d+)+(?![\w])|[-+]?\.\d+(?!\w))
    | (?P<clock>[oO]'clock)
    | (?P<word>[^\W_]+(?:[-_]+[^\W_]+)*(?:/[^\W_]+(?:-[^\W_]+)*)*)    # letters and digits, with hyphens, left/right
    | (?P<dots>\.\.+|…)
    | (?P<dashes>--+|[–—])
    | (?P<tail>['’](?:s|m|d|ll|re|ve|t)(?![\w]))                      # of a word with an apostrophe
    | (?P<mark>\S)
    """,
    re.VERBOSE | re.IGNORECASE,
)


def tokenize(text):
    """A caption as the tokens that scores compare, in lower case and without punctuation.

    "a man's hat (blue), U.S." becomes ``a man 's hat -lrb- blue -rrb- u.s.``
    """
    text = text.replace("\n", " ")
    # "don't" is "do n't": the word ends before its n.
    text = re.sub(r"(?i)(?<=\w)n['’]t(?!\w)", " n't ", text)
    tokens = []
    for part in re.split(r"( n't )", text):
        if part == " n't ":
            tokens.append("n't")
            continue
        for match in _TOKEN.finditer(part):
            kind, token = match.lastgroup, match[0].lower()
            if kind == "word":
                tokens += _SPLIT_WORDS.get(token, (token.replace("/", "\\/"),))
            elif kind == "tail":
                tokens.append("'" + token[1:])
            elif kind == "mark":
                tokens.append(_BRACKETS.get(token, {"/": "\\/", "*": "\\*"}.get(token, token)))
            elif kind not in ("dots", "dashes"):
                tokens.append(token)
    return " ".join(token for token in tokens if token not in _DROPPED and token not in '"“”‘’«»')


def captions(references, answers):
    """Bleu 1 to 4, ROUGE-L, CIDEr (document frequencies from the references at hand) and words a caption; each: CIDEr."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    truths = {i: [tokenize(str(text)) for text in field(r, "captions")] for i, r in enumerate(references)}
    given = {i: [tokenize(answer or "")] for i, answer in enumerate(answers)}
    with contextlib.redirect_stdout(io.StringIO()):  # pycocoevalcap prints as it goes
        bleu, _ = Bleu(4).compute_score(truths, given, verbose=0)
        rouge, _ = Rouge().compute_score(truths, given)
        cider, each = Cider().compute_score(truths, given)
    scores = {f"Bleu_{n + 1}": value for n, value in enumerate(bleu)} | {"ROUGE_L": rouge, "CIDEr": cider}
    return {**scores, "average_length": mean(len((answer or "").split()) for answer in answers)}, list(each)
