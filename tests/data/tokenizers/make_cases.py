"""Make llama3/ and cases.json: what transformers computes on tokenizers that tests/data/reference does not have.

``python -m venv /tmp/venv && /tmp/venv/bin/pip install transformers==4.44.2 sentencepiece protobuf``, and then
``/tmp/venv/bin/python tests/data/tokenizers/make_cases.py``. The InternLM2 tokenizer is not part of transformers.
"""

import copy
import json
import random
import shutil
import tempfile
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer, Qwen2TokenizerFast

HERE = Path(__file__).parent
REFERENCE = HERE.parent / "reference"
PIECES = [
    "Hello", "the panda", "它在吃竹子", "émoji", "🐼", "👩‍👩‍👧", "שלום", "한국어", "1234567", "3.14", "don't", "It's",
    "n't", "'", " ,", " .", "?!", "e\u0301", "\u00a0", "\u3000", "▁", "\t", "\n", "\r\n\n", " ", "   ", "\x00", "\ufffd",
    "def f(x):\n    return x",
]  # fmt: skip
WORDS = [
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", r"[^\r\n\p{L}\p{N}]?\p{L}+", r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n]*", r"\s*[\r\n]+",
    r"\s+(?!\S)", r"\s+",
]  # fmt: skip


def write(path, value):
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def make_llama3(directory):
    """A small tokenizer built as that of Llama 3 is, with the tokens that InternVL adds."""
    directory.mkdir(exist_ok=True)
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    words = pre_tokenizers.Split(Regex("|".join(WORDS)), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    text = (REFERENCE / "README.md").read_text(encoding="utf-8")
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([text], trainer)
    bos, eos, *more = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    more += ["<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>"]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in [bos, eos, *more]])
    frame = processors.TemplateProcessing(
        single=[bos, "$A"], pair=[bos, "$A", bos, "$B"], special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), frame])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        additional_special_tokens=more[3:],
        clean_up_tokenization_spaces=True,
        model_max_length=2048,
    )
    fast.save_pretrained(directory)


def variants():
    """Name, source directory, class of the original, tokenizer_config.json, and files to leave out."""

    def read(name):
        return json.loads((REFERENCE / name / "checkpoint/tokenizer_config.json").read_text(encoding="utf-8"))

    def changed(config, flags=(), without=(), **values):
        config = copy.deepcopy(config) | values
        for token in config["added_tokens_decoder"].values():
            token |= dict(flags).get(token["content"], {})
        return {k: v for k, v in config.items() if k not in without}

    phi3, llama, qwen2 = read("phi3"), read("llama_vit6b"), read("qwen2")
    strips = {
        "<img>": {"lstrip": True, "rstrip": True},
        "</img>": {"single_word": True},
        "<ref>": {"lstrip": True},
        "</s>": {"rstrip": True},
    }
    plain = {token: {"special": False, "normalized": True} for token in ("<ref>", "</ref>", "<box>")}
    fewer = [token for token in llama["additional_special_tokens"] if token not in plain]
    old = {"without": ["added_tokens_decoder"]}
    llama3 = json.loads((HERE / "llama3/tokenizer_config.json").read_text(encoding="utf-8"))
    return [
        ("llama3", "tokenizers/llama3", PreTrainedTokenizerFast, llama3, ()),
        ("phi3", "reference/phi3/checkpoint", LlamaTokenizer, phi3, ()),
        ("phi3, old files", "reference/phi3/checkpoint", LlamaTokenizer, changed(phi3, **old), ()),
        ("phi3, no prefix", "reference/phi3/checkpoint", LlamaTokenizer, changed(phi3, add_prefix_space=False), ()),
        ("llama", "reference/llama_vit6b/checkpoint", LlamaTokenizer, llama, ()),
        (
            "llama, not legacy",
            "reference/llama_vit6b/checkpoint",
            LlamaTokenizer,
            changed(llama, legacy=False, add_bos_token=True, add_eos_token=True, clean_up_tokenization_spaces=True),
            (),
        ),
        ("llama, stripping", "reference/llama_vit6b/checkpoint", LlamaTokenizer, changed(llama, strips), ()),
        (
            "llama, plain tokens",
            "reference/llama_vit6b/checkpoint",
            LlamaTokenizer,
            changed(llama, plain, additional_special_tokens=fewer, legacy=False),
            (),
        ),
        ("qwen2", "reference/qwen2/checkpoint", Qwen2Tokenizer, qwen2, ()),
        ("qwen2, fast", "reference/qwen2/checkpoint", Qwen2TokenizerFast, qwen2, ("vocab.json", "merges.txt")),
    ]


def cases(kind, directory):
    """Texts, ids, batches and added tokens as the original has them."""
    rng = random.Random(0)
    tokenizer = kind.from_pretrained(directory)
    special = list(tokenizer.get_added_vocab())
    chosen = [token for token in special if token in ("<img>", "</img>", "<ref>", "</s>", "<|end|>", "<|im_end|>")]
    texts = [
        "",
        " ",
        "\n",
        "▁",
        " a",
        "a ",
        *(f"a{token}b" for token in chosen),
        *(f"a {token} b" for token in chosen),
        *(f"{token}\n x" for token in chosen),
    ]
    for _ in range(25):
        words = [rng.choice(special) if rng.random() < 0.3 else rng.choice(PIECES) for _ in range(rng.randint(2, 8))]
        texts.append("".join(word + rng.choice(["", "", " "]) for word in words))
    ids = [[rng.randrange(len(tokenizer)) for _ in range(rng.randint(1, 10))] for _ in range(25)]
    ids += [[rng.choice([*tokenizer.all_special_ids, 300]) for _ in range(rng.randint(1, 5))] for _ in range(10)]
    ids += [tokenizer.encode(text) for text in texts if text]
    result = {
        "length": len(tokenizer),
        "vocab_size": tokenizer.vocab_size,
        "tokens": {
            token: [getattr(tokenizer, token), getattr(tokenizer, f"{token}_id")]
            for token in ("bos_token", "eos_token", "pad_token", "unk_token")
        },
        "special_ids": sorted(tokenizer.all_special_ids),
        "unknown": tokenizer.convert_tokens_to_ids("<no such token>"),
        "encode": [
            [
                text,
                tokenizer.encode(text),
                tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"],
            ]
            for text in texts
        ],
        "decode": [[row, tokenizer.decode(row), tokenizer.decode(row, skip_special_tokens=True)] for row in ids],
    }
    batch = texts[-5:]
    if tokenizer.pad_token:
        tokenizer.padding_side = "left"
        result["batch"] = {
            "texts": batch,
            "longest": dict(tokenizer(batch, padding=True)),
            "exact": dict(tokenizer(batch, padding="max_length", max_length=16, truncation=True)),
            "cut": dict(tokenizer(batch, max_length=7)),
        }
    tokenizer.add_tokens(["<tool>", chosen[0], "the"], special_tokens=True)
    tokenizer.add_tokens(["two words"])
    text = f"a <tool>b the two words {chosen[0]} c"
    row = tokenizer.encode(text)
    decoded = [tokenizer.decode(row), tokenizer.decode(row, skip_special_tokens=True)]
    result["added"] = [chosen[0], len(tokenizer), text, row, *decoded]
    return result


def main():
    make_llama3(HERE / "llama3")
    result = {}
    for name, source, kind, config, without in variants():
        with tempfile.TemporaryDirectory() as directory:
            for file in (HERE.parent / source).iterdir():
                if "token" in file.name or file.name in ("vocab.json", "merges.txt"):
                    shutil.copy(file, directory)
            for file in without:
                (Path(directory) / file).unlink()
            write(Path(directory) / "tokenizer_config.json", config)
            published = json.loads((HERE.parent / source / "tokenizer_config.json").read_text(encoding="utf-8"))
            own = {} if config == published else {"config": config}
            result[name] = {"source": source, "without": list(without), **own, **cases(kind, directory)}
    # One case a line: small, and a change shows where it is.
    lines = []
    for name, value in result.items():
        fields = []
        for key, field in value.items():
            if key in ("encode", "decode"):
                rows = ",\n".join(json.dumps(row, ensure_ascii=False, separators=(",", ":")) for row in field)
                fields.append(f"{json.dumps(key)}: [\n{rows}]")
            else:
                fields.append(f"{json.dumps(key)}: {json.dumps(field, ensure_ascii=False, separators=(',', ':'))}")
        lines.append(f"{json.dumps(name)}: {{\n" + ",\n".join(fields) + "}")
    (HERE / "cases.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
