"""Whatever stands in a configuration, a header, a record, a meta file or a template, it is read or refused by a sentence.

Inputs that once ended otherwise stand as examples.
"""

import copy
import json
import struct
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from paddlemix.checkpoints.safetensors_files import read_safetensors
from paddlemix.datasets.records import parse_record, read_meta
from paddlemix.errors import CheckpointError, ConfigError, DataError, PromptError, TokenizerError
from paddlemix.models.internvl2.configuration import InternVLChatConfig
from paddlemix.tokenizers.templates import chat_template, render

REFERENCE = Path(__file__).parents[1] / "data" / "reference"
CONFIGS = {name: json.loads((REFERENCE / name / "checkpoint" / "config.json").read_text()) for name in ("qwen2", "phi3")}
SECONDS = 2

fuzz = settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
leaf = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([0, -1, 2**31, 2**63, 10**30, 1e308, -0.0]),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(
        ["image", "video", "text", "<image>", "human", "gpt", "user", "assistant", "a.jpg", "../a.jpg", "http://x/y"]
    ),
)
anything = st.recursive(
    leaf,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)),
    max_leaves=12,
)


def sentence(error):
    text = str(error)
    assert "\n" not in text and 10 < len(text) < 1500, text
    return text


def refused(kinds, read, *arguments):
    """Read it, in time; what is refused is refused by a sentence."""
    start = time.process_time()
    try:
        read(*arguments)
    except kinds as error:
        sentence(error)
    assert time.process_time() - start < SECONDS


def places(values, path=()):
    """All keys of nested dictionaries."""
    for key, value in values.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from places(value, (*path, key))


def put(values, path, value):
    changed = copy.deepcopy(values)
    inner = changed
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return changed


@fuzz
@given(st.data(), st.sampled_from(sorted(CONFIGS)))
def test_configurations(data, name):
    values = CONFIGS[name]
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.sampled_from(list(places(values))))
        values = put(values, place, data.draw(anything))
    refused(ConfigError, InternVLChatConfig.from_dict, values)


@fuzz
@given(
    st.one_of(st.binary(max_size=60), st.dictionaries(st.text(max_size=6), anything, max_size=3)),
    st.integers(-9, 9),
    st.binary(max_size=40),
)
@example({"a": {"dtype": "F32", "shape": [2, 1 << 40], "data_offsets": [0, 8]}}, 0, b"12345678")
def test_headers(tmp_path, header, wrong, content):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", max(0, len(text) + wrong)) + text + content)
    with open(path, "rb") as file:
        refused(CheckpointError, read_safetensors, file)


entry = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.one_of(st.sampled_from(["F32", "BF16", "F16", "U8", "U16", "I64", "F8_E4M3"]), anything),
        "shape": st.one_of(st.lists(st.integers(-2, 9), max_size=4), anything),
        "data_offsets": st.one_of(st.lists(st.integers(-4, 64), max_size=3), anything),
    },
)


@fuzz
@given(st.dictionaries(st.text(max_size=4), entry, max_size=3), st.integers(0, 64))
def test_headers_that_are_nearly_right(tmp_path, header, size):
    test_headers.hypothesis.inner_test(tmp_path, header, 0, bytes(size))


turn = st.fixed_dictionaries(
    {},
    optional={
        "from": st.one_of(st.sampled_from(["human", "gpt", "system"]), anything),
        "value": st.one_of(st.sampled_from(["<image>", "<video>\nwhat?", ""]), anything),
        "role": st.one_of(st.sampled_from(["user", "assistant", "system", "tool"]), anything),
        "content": st.one_of(
            st.lists(
                st.fixed_dictionaries({}, optional={"type": anything, "text": anything, "image": anything, "path": anything}),
                max_size=3,
            ),
            anything,
        ),
    },
)
record = st.fixed_dictionaries(
    {},
    optional={
        "conversations": st.one_of(st.lists(turn, max_size=4), anything),
        "messages": st.one_of(st.lists(turn, max_size=4), anything),
        **dict.fromkeys(
            ("image", "images", "video", "videos", "clip", "width_list", "height_list", "width", "height", "length"), anything
        ),
    },
)


@fuzz
@given(st.one_of(record, anything))
@example({"messages": [{"role": "user", "content": [{"type": []}]}]})
def test_records(value):
    refused(DataError, parse_record, json.dumps(value).encode(), "/root")


@fuzz
@given(st.binary(max_size=80))
def test_lines_of_bytes(line):
    refused(DataError, parse_record, line)


meta = st.fixed_dictionaries(
    {},
    optional={
        "root": anything,
        "annotation": st.one_of(st.sampled_from(["a.jsonl", "b.json", "none.jsonl"]), anything),
        "shards": st.one_of(
            st.sampled_from(["p/{000..999}.tar", "{9..0}.tar", "{0..99999999999}.tar", "{a..b}.tar"]), anything
        ),
        **dict.fromkeys(("data_augment", "repeat_time", "length", "max_dynamic_patch", "other"), anything),
    },
)


@fuzz
@given(st.one_of(st.dictionaries(st.text(max_size=4), st.one_of(meta, anything), max_size=2), anything))
@example({"\n": {}})
@example({"": {"\n": None}})
def test_meta_files(tmp_path, value):
    path = tmp_path / "meta.json"
    path.write_text(json.dumps(value))
    refused(DataError, read_meta, str(path))


@fuzz
@given(anything)
@example([3])
@example([{"name": "default", "template": []}])
def test_where_a_template_stands(value):
    content = json.dumps({"chat_template": value}).encode()
    refused(TokenizerError, chat_template, {"tokenizer_config.json": content}, lambda name: {"chat_template": value})


pieces = st.sampled_from(
    """{{ }} {% %} {# messages [0] .content .__class__ |join |map for~m~in endfor if endif set~x~= range(9) *9999 ** 'a' x self
    cycler namespace() loop raise_exception('a') -""".split()
).map(lambda piece: " " + piece.replace("~", " ") + " ")


@pytest.mark.slow
@settings(max_examples=40, deadline=None)  # a process each
@given(st.one_of(st.lists(pieces, max_size=12).map("".join), st.text(max_size=30)))
@example("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}")
@example("{{ 'a' * 999999999 }}")
@example("{{ messages.__class__.__mro__[1].__subclasses__() }}")
@example("{{ 9 ** 9 ** 9 }}")
def test_templates(text):
    """``refused`` counts this process's time: the child's is limited by itself."""
    refused((TokenizerError, PromptError), render, text, [{"role": "user", "content": "hi"}], True, {"bos_token": "<s>"}, {})


def test_nests_of_a_meta_file(tmp_path):
    path = tmp_path / "meta.json"
    path.write_text('{"a":' * 60_000 + "1" + "}" * 60_000)
    with pytest.raises(DataError, match="not valid JSON"):
        read_meta(str(path))
