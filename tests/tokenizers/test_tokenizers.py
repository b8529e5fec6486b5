"""Tokenizers against the original's ids and texts: tests/data/reference, and tests/data/tokenizers from transformers."""

import json
import os
import pickle
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from paddlemix.errors import TokenizerError
from paddlemix.tokenizers import FastTokenizer, LlamaTokenizer, Qwen2Tokenizer, load_tokenizer

DATA = Path(__file__).parents[1] / "data"
FAMILIES = ("qwen2", "internlm2", "llama_vit6b", "phi3")
CASES = json.loads((DATA / "tokenizers/cases.json").read_text(encoding="utf-8"))
TURNS = {
    "Hermes-2": ("<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>"),
    "internlm2-chat": ("<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>"),
    "phi3-chat": ("<|user|>\n", "<|assistant|>\n", "<|end|>"),
}


def checkpoint(family):
    return DATA / "reference" / family / "checkpoint"


def expected(family):
    return json.loads((DATA / "reference" / family / "expected.json").read_text(encoding="utf-8"))


def copy(source, target, without=(), **config):
    """A writable copy of a checkpoint's tokenizer files, some left out, some values of its configuration changed."""
    target.mkdir(exist_ok=True)
    for file in source.iterdir():
        if "token" in file.name or file.name in ("vocab.json", "merges.txt"):
            shutil.copy(file, target)
    for name in without:
        (target / name).unlink()
    path = target / "tokenizer_config.json"
    if config:
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | config), encoding="utf-8")
    return target


def stream(tokenizer, ids):
    """The pieces of a text that grows id by id, each made from the last few ids as stable_length() describes."""
    window, shown, pieces = [], 0, []
    for i in ids:
        window.append(i)
        text = tokenizer.decode(window, skip_special_tokens=True)
        stable = tokenizer.stable_length(text)
        pieces.append(text[shown:stable])
        shown = max(shown, stable)
        tail = tokenizer.decode(window[-4:], skip_special_tokens=True)
        if shown == len(text) and tail and tokenizer.stable_length(tail) == len(tail):
            window, text, shown = window[-4:], tail, len(tail)
    return [*pieces, text[shown:]]


# The original's ids and texts.


@pytest.mark.parametrize("family", FAMILIES)
def test_reference_texts(family):
    tokenizer, want = load_tokenizer(checkpoint(family)), expected(family)
    assert len(tokenizer) == want["vocab"]
    assert tokenizer.require_token_id("<IMG_CONTEXT>") == want["img_context_token_id"]
    for case in want["tokenizer"]:
        assert tokenizer.encode(case["text"]) == case["ids"]
        assert tokenizer.decode(case["ids"], skip_special_tokens=True) == case["decoded"]


@pytest.mark.parametrize("family", FAMILIES)
def test_reference_chats(family):
    tokenizer, want = load_tokenizer(checkpoint(family)), expected(family)
    for chat in want["chats"]:
        prompt = chat["prompt"]
        for tiles in chat["num_patches_list"] or []:
            context = "<IMG_CONTEXT>" * (tiles * want["num_image_token"])
            prompt = prompt.replace("<img></img>", f"<img>{context}</img>", 1)
        assert tokenizer.encode(prompt) == chat["input_ids"]
        text = tokenizer.batch_decode([chat["output_ids"]], skip_special_tokens=True)[0]
        assert text.strip() == chat["response"]


@pytest.mark.parametrize("family", FAMILIES)
def test_reference_training_samples(family):
    tokenizer, want = load_tokenizer(checkpoint(family)), expected(family)
    user, assistant, end = TURNS[want["template"]]
    system = want["chats"][0]["prompt"].split(user)[0]
    for sample in want["train_samples"]:
        text = system
        for turn in sample["conversations"]:
            text += (user if turn["from"] == "human" else assistant) + turn["value"] + end
        image = "<img>" + "<IMG_CONTEXT>" * (sample["num_tiles"] * want["num_image_token"]) + "</img>"
        ids = tokenizer.encode(text.replace("<image>", image))
        assert ids[: len(sample["input_ids"])] == sample["input_ids"]
        assert tokenizer.decode(ids[len(sample["input_ids"]) :]).strip() == ""


@pytest.fixture
def case(request, tmp_path):
    """A case of cases.json and the tokenizer that it is about."""
    case = CASES[request.param]
    directory = copy(DATA / case["source"], tmp_path / "checkpoint", case["without"])
    if "config" in case:
        (directory / "tokenizer_config.json").write_text(json.dumps(case["config"]), encoding="utf-8")
    return case, load_tokenizer(directory)


@pytest.mark.parametrize("case", CASES, indirect=True)
def test_vocabulary_of_transformers(case):
    case, tokenizer = case
    assert (len(tokenizer), tokenizer.vocab_size) == (case["length"], case["vocab_size"])
    for name, (token, token_id) in case["tokens"].items():
        assert getattr(tokenizer, name) == token
        assert getattr(tokenizer, f"{name}_id") == token_id
    assert set(tokenizer.all_special_ids) == set(case["special_ids"])
    assert tokenizer.convert_tokens_to_ids("<no such token>") == case["unknown"]


@pytest.mark.parametrize("case", CASES, indirect=True)
def test_ids_of_transformers(case):
    case, tokenizer = case
    for text, ids, split in case["encode"]:
        assert tokenizer.encode(text) == ids, text
        assert tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True) == split, text


@pytest.mark.parametrize("case", CASES, indirect=True)
def test_texts_of_transformers(case):
    case, tokenizer = case
    for ids, text, without_special in case["decode"]:
        assert tokenizer.decode(ids) == text, ids
        assert tokenizer.decode(np.array(ids), skip_special_tokens=True) == without_special, ids


@pytest.mark.parametrize("case", [name for name in CASES if "batch" in CASES[name]], indirect=True)
def test_batches_of_transformers(case):
    case, tokenizer = case
    want, tokenizer.padding_side = case["batch"], "left"
    texts = want["texts"]
    assert tokenizer(texts, padding=True).items() <= want["longest"].items()
    assert tokenizer(texts, padding="max_length", max_length=16, truncation=True).items() <= want["exact"].items()
    assert tokenizer(texts, max_length=7).items() <= want["cut"].items()


@pytest.mark.parametrize("case", CASES, indirect=True)
def test_added_tokens_of_transformers(case, tmp_path):
    case, tokenizer = case
    known, length, text, ids, decoded, without_special = case["added"]
    before = len(tokenizer)
    new = tokenizer.add_tokens(["<tool>", known, "the"]) + tokenizer.add_tokens(["two words"], special=False)
    assert len(tokenizer) == before + new == length
    tokenizer.save_pretrained(tmp_path / "saved")
    for tok in (tokenizer, load_tokenizer(tmp_path / "saved"), pickle.loads(pickle.dumps(tokenizer))):
        assert len(tok) == length
        assert tok.encode(text) == ids
        assert tok.decode(ids) == decoded
        assert tok.decode(ids, skip_special_tokens=True) == without_special


# Which files are read.


def test_qwen2_is_the_same_from_either_form(tmp_path):
    slow = load_tokenizer(copy(checkpoint("qwen2"), tmp_path / "slow", ["tokenizer.json"]))
    fast = load_tokenizer(copy(checkpoint("qwen2"), tmp_path / "fast", ["vocab.json", "merges.txt"]))
    assert isinstance(slow, Qwen2Tokenizer) and isinstance(fast, FastTokenizer)
    want = expected("qwen2")
    texts = [case["text"] for case in want["tokenizer"]] + [chat["prompt"] for chat in want["chats"]]
    texts += [text for case in CASES.values() for text, *_ in case["encode"]]
    for text in texts:
        ids = slow.encode(text)
        assert fast.encode(text) == ids
        assert fast.decode(ids) == slow.decode(ids)
    assert [case["ids"] for case in want["tokenizer"]] == [fast.encode(case["text"]) for case in want["tokenizer"]]


def test_kind_is_that_of_the_files_not_of_the_name(tmp_path):
    directory = copy(checkpoint("phi3"), tmp_path / "InternVL2-76B-Qwen2-internlm2")
    shutil.copy(checkpoint("qwen2") / "tokenizer.json", directory)  # the original prefers the slow tokenizer
    tokenizer = load_tokenizer(directory)
    assert isinstance(tokenizer, LlamaTokenizer)
    assert [tokenizer.encode(case["text"]) for case in expected("phi3")["tokenizer"]] == [
        case["ids"] for case in expected("phi3")["tokenizer"]
    ]


def test_internlm2_draws_punctuation_to_the_word():
    # tokenization_internlm2.py of the published checkpoints: convert_tokens_to_string ends in clean_up_tokenization.
    tokenizer = load_tokenizer(checkpoint("internlm2"))
    ids = tokenizer.encode("I do n't know , you 've ' no ' idea !")
    assert tokenizer.decode(ids, skip_special_tokens=True) == "I don't know, you've'no'idea!"


def test_reads_without_any_framework():
    code = (
        "import sys; from paddlemix.tokenizers import load_tokenizer; load_tokenizer(sys.argv[1]); "
        "print({'torch', 'transformers', 'paddle', 'paddlenlp'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", code, str(checkpoint("phi3"))]
    env = os.environ | {"PYTHONPATH": str(DATA.parents[1])}
    assert subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.strip() == "set()"


# Calls.


def test_padding_sides_and_masks():
    tokenizer = load_tokenizer(checkpoint("qwen2"))
    long, short = tokenizer.encode("the panda eats"), tokenizer.encode("the")
    missing = len(long) - len(short)
    for side, pad in (("right", lambda ids, fill: ids + fill), ("left", lambda ids, fill: fill + ids)):
        tokenizer.padding_side = side
        batch = tokenizer(["the panda eats", "the"], padding=True, return_tensors="np")
        assert batch["input_ids"].dtype == np.int64
        assert batch["input_ids"].tolist() == [long, pad(short, [tokenizer.pad_token_id] * missing)]
        assert batch["attention_mask"].tolist() == [[1] * len(long), pad([1] * len(short), [0] * missing)]
    assert tokenizer("the", return_tensors="np")["input_ids"].shape == (1, len(short))
    assert tokenizer("the", return_attention_mask=False) == {"input_ids": short}


def test_truncation_keeps_the_frame():
    tokenizer = load_tokenizer(checkpoint("internlm2"))
    ids = tokenizer.encode("the panda eats bamboo")
    assert tokenizer("the panda eats bamboo", truncation=True, max_length=4)["input_ids"] == ids[:4]
    tokenizer.truncation_side = "left"
    assert tokenizer("the panda eats bamboo", truncation=True, max_length=4)["input_ids"] == [ids[0], *ids[-3:]]
    tokenizer.model_max_length = 3
    assert len(tokenizer("the panda eats bamboo", truncation=True)["input_ids"]) == 3


@pytest.mark.parametrize("family", FAMILIES)
def test_literal_special_tokens_can_be_plain_text(family):
    tokenizer = load_tokenizer(checkpoint(family))
    text = "say <IMG_CONTEXT> or <|im_end|>"
    assert tokenizer.require_token_id("<IMG_CONTEXT>") in tokenizer.encode(text)
    ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    assert not set(ids) & set(tokenizer.all_special_ids)
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    tokenizer.split_special_tokens = True
    assert tokenizer([text], add_special_tokens=False)["input_ids"] == [ids]


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_and_ids_are_inverse(family):
    tokenizer = load_tokenizer(checkpoint(family))
    ids = list(range(len(tokenizer)))
    tokens = tokenizer.convert_ids_to_tokens(ids)
    assert tokenizer.convert_tokens_to_ids(tokens) == ids
    assert tokenizer.convert_ids_to_tokens(len(tokenizer)) is None
    special = [tokenizer.convert_ids_to_tokens(i) for i in tokenizer.all_special_ids]
    assert set(tokens) - set(tokenizer.convert_ids_to_tokens(ids, skip_special_tokens=True)) == set(special)
    # A model whose embeddings are padded can produce ids that have no token.
    assert tokenizer.decode([ids[300], len(tokenizer) + 5]) == tokenizer.decode(ids[300])


@pytest.mark.parametrize("name", [*FAMILIES, "llama3", "cleaning", "plain tokens"])
def test_text_that_grows(name, tmp_path):
    if name == "llama3":
        tokenizer = load_tokenizer(DATA / "tokenizers/llama3")
    elif name == "cleaning":
        tokenizer = load_tokenizer(copy(checkpoint("llama_vit6b"), tmp_path, clean_up_tokenization_spaces=True))
    else:
        tokenizer = load_tokenizer(checkpoint("internlm2" if name == "plain tokens" else name))
    if name == "plain tokens":
        tokenizer.add_tokens(["<tool>", "</tool>"], special=False)
    rng = random.Random(0)
    words = [" ", "'", "n", "t", "s", ".", ",", " ' ", " n't", "ve", "▁", "🐼", "图", "<tool>", "Hello"]
    for _ in range(150):
        ids = [rng.randrange(len(tokenizer)) for _ in range(12)]
        ids += tokenizer.encode("".join(rng.choices(words, k=12)))
        ids += [rng.randrange(len(tokenizer)) for _ in range(6)]
        text = tokenizer.decode(ids, skip_special_tokens=True)
        for k in range(len(ids)):
            part = tokenizer.decode(ids[:k], skip_special_tokens=True)
            assert text.startswith(part[: tokenizer.stable_length(part)]), (ids, k)
        assert "".join(stream(tokenizer, ids)) == text


def test_growing_text_is_shown_as_it_comes():
    tokenizer = load_tokenizer(checkpoint("qwen2"))
    pieces = stream(tokenizer, tokenizer.encode("Hi 🐼!"))
    assert "".join(pieces) == "Hi 🐼!" and not any("\ufffd" in piece for piece in pieces)
    assert pieces[0] == "H" and pieces[-2:] == ["!", ""]


# Files that are written.


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_files_are_copies_until_something_changes(family, tmp_path):
    copy(checkpoint(family), tmp_path / "source")
    (tmp_path / "source/tokenization_custom.py").write_text("raise SystemExit('this must not run')")
    tokenizer = load_tokenizer(tmp_path / "source")
    before = {file.name: file.read_bytes() for file in (tmp_path / "source").iterdir()}
    shutil.rmtree(tmp_path / "source")
    tokenizer.save_pretrained(tmp_path / "saved/deep")
    assert {file.name: file.read_bytes() for file in (tmp_path / "saved/deep").iterdir()} == before
    tokenizer.model_max_length = 77
    tokenizer.save_pretrained(tmp_path / "saved/deep")
    again = load_tokenizer(tmp_path / "saved/deep")
    assert again.model_max_length == 77
    assert again.all_special_ids == tokenizer.all_special_ids
    assert [again.encode(case["text"]) for case in expected(family)["tokenizer"]] == [
        case["ids"] for case in expected(family)["tokenizer"]
    ]


def test_added_tokens_reach_every_file(tmp_path):
    tokenizer = load_tokenizer(checkpoint("qwen2"))
    first = len(tokenizer)
    assert tokenizer.add_tokens(["<tool>", "<img>", "<tool>"]) == 1
    tokenizer.pad_token = "<tool>"
    tokenizer.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved/added_tokens.json").read_text())["<tool>"] == first
    fast = load_tokenizer(copy(tmp_path / "saved", tmp_path / "fast", ["vocab.json", "merges.txt"]))
    slow = load_tokenizer(copy(tmp_path / "saved", tmp_path / "slow", ["tokenizer.json", "added_tokens.json"]))
    for again in (fast, slow):
        assert again.encode("a<tool><img>b") == tokenizer.encode("a<tool><img>b")
        assert again.pad_token_id == first == len(again) - 1
        assert again.decode([first], skip_special_tokens=True) == ""


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    tokenizer = load_tokenizer(copy(checkpoint("qwen2"), tmp_path / "source"))
    tokenizer.add_tokens(["<tool>"])

    def full(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        tokenizer.save_pretrained(tmp_path / "source")
    for file in checkpoint("qwen2").iterdir():
        if (tmp_path / "source" / file.name).exists():
            assert (tmp_path / "source" / file.name).read_bytes() == file.read_bytes()


# Mistakes.


def broken(*names, content=b"{", without=()):
    def make(directory):
        for name in names:
            (directory / name).write_bytes(content)
        for name in without:
            (directory / name).unlink()

    return make


def cut(name, fraction):
    def make(directory):
        content = (directory / name).read_bytes()
        (directory / name).write_bytes(content[: int(len(content) * fraction)])

    return make


@pytest.mark.parametrize(
    ("family", "spoil", "message"),
    [
        ("qwen2", broken("tokenizer_config.json"), "tokenizer_config.json is not valid JSON"),
        ("qwen2", broken("tokenizer_config.json", content=b"\xff\xfe{}"), "tokenizer_config.json is not valid JSON"),
        ("qwen2", broken("tokenizer_config.json", content=b"[]"), "tokenizer_config.json holds no JSON object"),
        ("qwen2", broken("vocab.json"), "vocab.json is not valid JSON"),
        ("qwen2", broken("tokenizer.json", without=["vocab.json", "merges.txt"]), "tokenizer.json is not valid JSON"),
        ("qwen2", cut("merges.txt", 0.501), "vocab.json and merges.txt do not fit together"),
        ("qwen2", broken("merges.txt", content=b"#version: 0.2\nnot there\n"), "do not fit together"),
        ("qwen2", broken(without=["tokenizer.json", "merges.txt"]), "merges.txt is missing"),
        ("qwen2", broken(without=["tokenizer.json", "merges.txt", "tokenizer_config.json"]), "merges.txt is missing"),
        ("qwen2", broken(without=["tokenizer.json", "vocab.json"]), "vocab.json is missing"),
        ("phi3", broken("tokenizer_config.json", content=b"{}"), "names no tokenizer_class"),
        ("phi3", broken("tokenizer_config.json", content=b'{"tokenizer_class": "T5Tokenizer"}'), "'T5Tokenizer'"),
        ("phi3", broken(without=["tokenizer.model"]), "tokenizer.model is missing"),
        ("phi3", broken("tokenizer.model", content=b""), "tokenizer.model is damaged"),
        ("internlm2", cut("tokenizer.model", 0.5), "tokenizer.model is damaged"),
        (
            "phi3",
            broken("tokenizer_config.json", content=b'{"tokenizer_class": "LlamaTokenizer", "added_tokens_decoder": [1]}'),
            "special tokens in .*tokenizer_config.json are malformed",
        ),
    ],
)
def test_broken_files_are_named(family, spoil, message, tmp_path):
    spoil(copy(checkpoint(family), tmp_path))
    with pytest.raises(TokenizerError, match=message) as error:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("family", ["internlm2", "phi3"])
def test_a_truncated_model_is_noticed_wherever_it_ends(family, tmp_path):
    content = (copy(checkpoint(family), tmp_path) / "tokenizer.model").read_bytes()
    for end in [*range(1, len(content) - 50, 97), *range(len(content) - 12, len(content))]:
        (tmp_path / "tokenizer.model").write_bytes(content[:end])
        with pytest.raises(TokenizerError, match="tokenizer.model is damaged"):
            load_tokenizer(tmp_path)


def test_directories_without_a_tokenizer(tmp_path):
    with pytest.raises(TokenizerError, match="nowhere is not a directory"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(TokenizerError, match="no tokenizer.json, no tokenizer.model and no vocab.json"):
        load_tokenizer(tmp_path)


def test_wrong_arguments_are_named():
    tokenizer = load_tokenizer(DATA / "tokenizers/llama3")
    with pytest.raises(TokenizerError, match="has no token '<box>'"):
        tokenizer.require_token_id("<box>")
    with pytest.raises(TokenizerError, match="has no padding token"):
        tokenizer(["a", "b c"], padding=True)
    with pytest.raises(TokenizerError, match="has no token '<pad>'"):
        tokenizer.pad_token = "<pad>"
    tokenizer.pad_token = tokenizer.eos_token
    assert tokenizer(["a", "a"], padding=True)["input_ids"][0] == tokenizer.encode("a")
    with pytest.raises(TokenizerError, match="differ in length"):
        tokenizer(["a", "a b c"], return_tensors="np")
    with pytest.raises(TokenizerError, match="must be a str, not NoneType"):
        tokenizer(None)
    with pytest.raises(TokenizerError, match="must be a str, not int"):
        tokenizer(["a", 1])
    with pytest.raises(TokenizerError, match="character 2 of the text is half a surrogate pair"):
        tokenizer.encode("ab\ud83d")
    with pytest.raises(TokenizerError, match="id -100 cannot be decoded"):
        tokenizer.decode([5, -100])
    with pytest.raises(TokenizerError, match="padding is 'left'"):
        tokenizer("a", padding="left")
    with pytest.raises(TokenizerError, match="return_tensors is 'pt'"):
        tokenizer("a", return_tensors="pt")


def test_internlm3_gives_texts_to_sentencepiece_as_they_are(tmp_path):
    import sentencepiece

    folder = copy(checkpoint("internlm2"), tmp_path / "files", tokenizer_class="InternLM3Tokenizer")
    tokenizer = load_tokenizer(str(folder))
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for text in ("Hello, world", " two  spaces", "你好", "a\nb"):
        ids = model.encode(text)
        assert tokenizer.encode(text) == [tokenizer.bos_token_id, *ids]
        assert tokenizer.encode(f"{text}<|im_end|>{text}", add_special_tokens=False) == [*ids, end, *ids]
        if text[0] == " ":  # the first of which is taken for sentencepiece's own
            continue
        assert tokenizer.decode(ids) == model.decode(ids)
        whole = tokenizer.decode([*ids, end, *ids], spaces_between_special_tokens=False)
        assert whole == model.decode(ids) + "<|im_end|>" + model.decode(ids)
        assert tokenizer.decode([*ids, end], skip_special_tokens=True) == model.decode(ids)
