"""Patterns that take for ever are refused by their key; those of published tokenizers pass."""

import json
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paddlemix.errors import TokenizerError
from paddlemix.models.internvl2 import load_tokenizer
from paddlemix.tokenizers.patterns import judge

# GPT-2; Llama 3; Qwen2; GPT-4o (o200k), from their published files.
PUBLISHED = [
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r" {2,}",
    r"[]a]+|[^]b]*",
]
FOR_EVER = [
    r"(a+)+$",
    r"(a*)*b",
    r"(a|a)*b",
    r"(a|ab)+c",
    r"((a)+)+b",
    r"(?:(?:a+)b?)*c",
    r"(x+x+)+y",
    r".*.*.*=.*",
    r"a+a+b",
    r"(?:a{2,}){3,}b",
    r"a**b",
    r"(?=(a+)+b)",
    r"(a",
    r"a)",
    r"[a",
    "(" * 1000,
    "a" * 10_000,
    None,
    3,
]


@pytest.mark.parametrize("pattern", PUBLISHED)
def test_published_patterns_pass(pattern):
    assert judge(pattern) is None


@pytest.mark.parametrize("pattern", FOR_EVER)
def test_patterns_that_take_for_ever_are_refused(pattern):
    assert judge(pattern)


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="ab()[]{}|*+?\\^$.,:!<=123ip", max_size=40))
def test_any_text_is_judged(pattern):
    assert judge(pattern) is None or isinstance(judge(pattern), str)


@pytest.mark.parametrize("place", ["normalizer", "pre_tokenizer", "decoder"])
def test_the_key_is_named(place, tmp_path):
    import tokenizers

    model = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, []))
    values = json.loads(model.to_str())
    evil = {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "b"}
    if place == "pre_tokenizer":
        evil = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
        values[place] = {"type": "Sequence", "pretokenizers": [evil]}
        key = "pre_tokenizer.pretokenizers[0].pattern.Regex"
    else:
        values[place], key = evil, f"{place}.pattern.Regex"
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(TokenizerError) as caught:
        load_tokenizer(str(tmp_path))
    assert key in str(caught.value) and str(tmp_path / "tokenizer.json") in str(caught.value)
    shutil.rmtree(tmp_path)
