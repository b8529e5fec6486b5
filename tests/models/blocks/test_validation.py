"""Configurations are hostile input: every field has a rule, and whatever a file holds ends in a configuration or a sentence."""

import copy
import dataclasses
import json
import math
import os
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from paddlemix.errors import ConfigError
from paddlemix.models.blocks import validation
from paddlemix.models.internvl2.configuration import InternVLChatConfig, LanguageConfig, VisionConfig
from paddlemix.validation import Integer, Number, check
from tests.conftest import FAMILIES, REFERENCE

PARTS = {None: validation.CHAT, "vision_config": validation.VISION, "llm_config": validation.DECODER}
VALUES = {
    family: json.loads((REFERENCE / family / "checkpoint" / "config.json").read_text(encoding="utf-8")) for family in FAMILIES
}
# JSON writes the last three too, and Python reads them.
NOT_NUMBERS = (True, False, "3", "", [], [1], {}, math.nan, math.inf, -math.inf)
NOT_WHOLE = (*NOT_NUMBERS, 1.5, 2.0)
# NaN and infinity come through JSON as they are; nesting is bounded so that drawing stays quick.
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=10), children, max_size=4),
    max_leaves=8,
)


def changed(family, part, key, value):
    values = copy.deepcopy(VALUES[family])
    (values if part is None else values[part])[key] = value
    return values


def test_every_field_has_a_rule():
    for cls, rules in (
        (VisionConfig, validation.VISION),
        (LanguageConfig, validation.DECODER),
        (InternVLChatConfig, validation.CHAT),
    ):
        fields = {field.name for field in dataclasses.fields(cls)} - {"extra", "vision_config", "llm_config"}
        assert not fields - rules.keys()


@pytest.mark.parametrize("part", PARTS)
def test_values_of_the_wrong_kind_or_size_name_their_key(part):
    """All numbers of all parts: text, bool, NaN, lists, fractions of whole numbers, and both sides of the bounds."""
    tried = 0
    for key, rule in PARTS[part].items():
        bounds = [inner for inner in (rule, *getattr(rule, "rules", ())) if isinstance(inner, (Integer, Number))]
        for bound in bounds:
            wrong = NOT_WHOLE if isinstance(bound, Integer) else NOT_NUMBERS
            low = bound.low - 1 if isinstance(bound, Integer) or not bound.above else bound.low
            for value in (*wrong, low, -(2**70), bound.high * 2 + 1, 10**7000):
                if rule.accepts(value):  # a list of ids, a bound that is far away
                    continue
                with pytest.raises(ConfigError) as caught:
                    InternVLChatConfig.from_dict(changed("qwen2", part, key, value))
                where = key if part is None else f"{part}.{key}"
                assert re.match(rf"{re.escape(where)}\b", str(caught.value)), (key, value)
                assert len(str(caught.value)) < 300
                tried += 1
    assert tried > 100


@pytest.mark.parametrize(
    "part, key, value, message",
    [
        ("llm_config", "num_hidden_layers", 10**6, "num_hidden_layers is 1000000: it must be a whole number from 1 to 1024"),
        ("llm_config", "hidden_size", 2**40, "hidden_size is 1099511627776"),
        ("vision_config", "image_size", 10**6, "image_size is 1000000"),
        ("vision_config", "patch_size", 200, "must have 1 to 512 patches"),
        (None, "force_image_size", 100, "must be a multiple of 28"),
        (None, "downsample_ratio", 0.3, "1 divided by a whole number"),
        (None, "max_dynamic_patch", 10**7, "max_dynamic_patch is 10000000"),
        (None, "min_dynamic_patch", 13, "more than max_dynamic_patch"),
        (None, "template", ["Hermes-2"], "template is "),
        ("llm_config", "num_attention_heads", 64, "need an even width"),
        ("llm_config", "rope_scaling", {"type": ["linear"]}, r"rope_scaling has type \['linear'\]"),
        ("llm_config", "rope_scaling", {"type": "dynamic"}, "rope_scaling.factor is missing"),
        ("llm_config", "rope_scaling", {"type": "linear", "factor": math.nan}, "rope_scaling.factor is nan"),
        ("llm_config", "rope_scaling", {"type": "su", "short_factor": [1.0], "long_factor": [1.0]}, "it must have 8"),
        ("llm_config", "architectures", "Qwen2ForCausalLM", "architectures is 'Qwen2ForCausalLM'"),
        ("llm_config", "architectures", [["Qwen2ForCausalLM"]], "architectures is "),
        ("llm_config", "sliding_window", "all", "sliding_window is 'all'"),
        ("llm_config", "eos_token_id", [2, None], "eos_token_id is "),
    ],
)
def test_sizes_and_relations_are_one_sentence(part, key, value, message):
    with pytest.raises(ConfigError, match=message) as caught:
        InternVLChatConfig.from_dict(changed("qwen2", part, key, value))
    assert key in str(caught.value)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_whatever_stands_in_a_config_is_a_configuration_or_a_sentence(data):
    """Several values replaced at once; a configuration that comes out is usable: its sizes are whole and bounded."""
    family = data.draw(st.sampled_from(FAMILIES))
    values = copy.deepcopy(VALUES[family])
    for _ in range(data.draw(st.integers(1, 3))):
        part = data.draw(st.sampled_from([*PARTS]))
        keys = sorted(PARTS[part]) if part else [*sorted(PARTS[part]), "vision_config", "llm_config"]
        key = data.draw(st.sampled_from(keys))
        value = data.draw(ANYTHING | st.sampled_from([0, -1, 1, 2, 3, 2**31, 10**30, 1e308]))
        target = values if part is None else values.get(part)
        if isinstance(target, dict):
            target[key] = value
    try:
        config = InternVLChatConfig.from_dict(values)
    except ConfigError as error:
        assert len(str(error)) < 2000 and "\n" not in str(error)
        return
    assert type(config.num_image_token) is int and config.num_image_token >= 1
    assert type(config.llm_config.context_length) is int and config.llm_config.context_length >= 1
    assert config.llm_config.head_dim * config.llm_config.num_attention_heads == config.llm_config.hidden_size
    assert InternVLChatConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    "content, message",
    [
        (b"[" * 60_000, "nested too deep"),
        (b'{"a":' * 60_000, "nested too deep"),
        (b"\xef\xbb\xbf{}", "not valid JSON"),
        (b"\xff\xfe{\x00}\x00", "not valid JSON"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "not valid JSON"),
        (b"null", "no JSON object"),
        (b'{"vision_config": null, "llm_config": null}', "'vision_config' is missing"),
        (b'{"vision_config": [], "llm_config": {}}', "'vision_config' is missing"),
        (b" " * (33 << 20), "at most 33554432 make sense"),
        (b"", "not valid JSON"),
    ],
)
def test_files_that_are_no_configuration(tmp_path, content, message):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        InternVLChatConfig.from_pretrained(str(tmp_path))
    assert str(tmp_path / "config.json") in str(caught.value)


def test_names_that_are_no_files(tmp_path):
    """A pipe that nobody writes to would hang, a device would never end."""
    path = tmp_path / "config.json"
    for make, message in (
        (lambda: os.mkfifo(path), "named pipe"),
        (lambda: path.symlink_to("/dev/zero"), "device"),
        (lambda: path.symlink_to(path), "symbolic links"),
        (lambda: path.symlink_to("/proc/self/mem"), "not valid JSON"),
        (lambda: path.mkdir(), "folder"),
    ):
        make()
        with pytest.raises(ConfigError, match=message):
            InternVLChatConfig.from_pretrained(str(tmp_path))
        path.rmdir() if path.is_dir() else path.unlink()


def test_rules_say_what_they_accept():
    check({"a": 3, "unknown": object()}, {"a": Integer(1, 3), "b": Integer(1, 1)})
    assert str(Number(0, 1, above=True)) == "a number above 0 and at most 1"
    assert str(Number(0, 1, below=True)) == "a number from 0 and below 1"
    assert not Number(0, 1, above=True).accepts(0) and Number(0, 1).accepts(0)
    assert not Number(0, math.inf).accepts(math.nan)
