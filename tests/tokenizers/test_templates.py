"""Chat templates of a folder: what transformers renders, and templates that mean harm."""

import json
import shutil

import pytest

from paddlemix.errors import PromptError, TokenizerError
from paddlemix.tokenizers import load_tokenizer
from tests.conftest import REFERENCE

FOLDER = REFERENCE / "internvl3"


@pytest.mark.parametrize("family", ["hf_qwen3", "hf_gpt_oss"])
def test_prompts_equal_those_of_transformers(family):
    tokenizer = load_tokenizer(str(FOLDER / family / "checkpoint"))
    for chat in json.loads((FOLDER / family / "expected.json").read_text())["chats"]:
        assert tokenizer.apply_chat_template(chat["messages"], add_generation_prompt=True) == chat["prompt"]


@pytest.fixture
def with_template(tmp_path):
    shutil.copytree(FOLDER / "hf_qwen3" / "checkpoint", tmp_path, dirs_exist_ok=True)

    def render(text, messages=()):
        (tmp_path / "chat_template.jinja").write_text(text)
        return load_tokenizer(str(tmp_path)).apply_chat_template(list(messages))

    return render


@pytest.mark.parametrize(
    "text, message",
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "2 seconds"),
        ("{% for a in range(9999) %}{{ 'x' * 9999 }}{% endfor %}", "more than 1048576 bytes"),
        ("{{ ('x' * 999999999) | length }}", "memory"),
        ("{{ ''.__class__.__mro__ }}", "__class__"),
        ("{{ messages.append('x') }}", "append"),
        ("{{ [].__class__ }}", "attribute '__class__'"),
        ("{% include 'other' %}", "cannot be rendered"),
        ("{% if %}", "cannot be rendered"),
        ("{{ raise_exception('no pictures, please') }}", "no pictures, please"),
    ],
)
def test_templates_that_mean_harm_end_in_a_sentence(with_template, text, message):
    with pytest.raises(TokenizerError, match=message):
        with_template(text)


def test_messages_of_no_such_form(with_template):
    with pytest.raises(PromptError, match="messages must be"):
        with_template("{{ messages }}", [object()])


def test_a_folder_without_a_template_says_so():
    with pytest.raises(TokenizerError, match="no chat template"):
        load_tokenizer(str(FOLDER / "qwen3" / "checkpoint")).apply_chat_template([])
