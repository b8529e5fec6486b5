"""Models with weights in 8 and 4 bits: both engines compute the same, and nothing is done with them that they cannot do."""

import numpy as np
import pytest

from paddlemix.commands import Parser, add_weight_flags, weight_options
from paddlemix.errors import ConfigError
from paddlemix.examples.internvl2 import cli
from paddlemix.kernels import cpu
from paddlemix.models.blocks.quantising import QuantisedEmbedding, QuantisedHead, QuantisedLinear
from paddlemix.models.internvl2 import ChatSession, InternVLChatModel
from tests.conftest import FAMILIES, REFERENCE, load_reference, tiles

ENGINES = ["eager", *(["inference"] if cpu.available("float32") else [])]
ALL = "language,projector,vision"


def load(family, engine, **options):
    return InternVLChatModel.from_pretrained(str(REFERENCE / family / "checkpoint"), dtype="float32", engine=engine, **options)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("weight_dtype, most", [("int8", 0.02), ("int4", 0.25)])
def test_engines_agree_with_each_other_and_nearly_with_all_bits(family, weight_dtype, most):
    reference = load_reference(family)
    ids = reference.arrays["lm_input_ids"]
    models = [load(family, engine, weight_dtype=weight_dtype, quantize_parts=ALL) for engine in ENGINES]
    logits = [model(input_ids=ids).logits.numpy() for model in models]
    features = [model.extract_feature(reference.arrays["pixel_values"]).numpy() for model in models]
    for found in (logits, features):
        assert np.abs(found[0] - found[-1]).max() < 2e-3 * np.abs(found[0]).max()
    # Random weights of a few dozen inputs: the error of a product is that of its weights.
    expected = reference.arrays["image_features"].reshape(features[0].shape)
    error = np.sqrt(((features[0] - expected) ** 2).mean() / (expected**2).mean())
    assert 1e-4 < error < most


@pytest.mark.parametrize("engine", ENGINES)
def test_only_the_parts_that_were_asked_for(engine):
    model = load("qwen2", "eager", weight_dtype="int4", quantize_parts="vision")
    assert all(name.startswith("vision_model.encoder.") for name in model.quantised_layers)
    model = load("qwen2", engine, weight_dtype="int4")
    names = model.quantised_layers
    assert {"mlp1.1.weight", "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"} <= names.keys()
    assert not any(name.startswith("vision_model") for name in names)
    bits = {name: layer.quantised.bits for name, layer in names.items()}
    assert {name for name, count in bits.items() if count == 8} == {
        "language_model.lm_head.weight",
        "language_model.model.embed_tokens.weight",
    }


@pytest.mark.parametrize("engine", ENGINES)
def test_rounds_batches_and_fresh_runs_agree(engine):
    model, tokenizer = load("qwen2", engine, weight_dtype="int8"), load_reference("qwen2").tokenizer
    options = {"max_new_tokens": 12}
    questions = ["Tell me a story.", "<image>\nWhat is in the picture?"]
    alone = [model.chat(tokenizer, p, q, options) for p, q in zip((None, tiles(0)), questions)]
    assert model.batch_chat(tokenizer, tiles(0), questions, options, [[], [len(tiles(0))]]) == alone
    session = ChatSession(model, tokenizer)
    session.ask(questions[1], tiles(0), options)
    assert session.ask("And now?", None, options) == model.chat(tokenizer, tiles(0), "And now?", options, session.history[:1])


@pytest.mark.parametrize("engine", ENGINES)
def test_tied_embeddings_are_one_set_of_codes(engine, tmp_path):
    import dataclasses

    from paddlemix.models.blocks.engine import fuse
    from paddlemix.models.blocks.quantising import quantise_model

    config = load_reference("qwen2").model.config
    config = dataclasses.replace(config, llm_config=dataclasses.replace(config.llm_config, tie_word_embeddings=True))
    model = InternVLChatModel(config)
    ids = np.arange(20)[None]
    model.eval()
    expected = model(input_ids=ids).logits.numpy()
    quantise_model(model, "int8")
    assert isinstance(model.language_model.lm_head, QuantisedHead)
    assert isinstance(model.language_model.model.embed_tokens, QuantisedEmbedding)
    if engine == "inference":
        fuse(model, "float32")
    got = model(input_ids=ids).logits.numpy()
    assert 0 < np.abs(got - expected).max() < 0.05 * np.abs(expected).max()


def test_without_a_compiler_answers_are_the_same_but_for_rounding(monkeypatch):
    model = load("qwen2", "eager", weight_dtype="int4")
    ids = load_reference("qwen2").arrays["lm_input_ids"]
    expected = model(input_ids=ids).logits.numpy()
    monkeypatch.setattr(cpu, "compiled", lambda: False)
    monkeypatch.setattr(cpu, "available", lambda dtype="float32": False)
    with pytest.warns(UserWarning, match="install g\\+\\+"):
        model = load("qwen2", "eager", weight_dtype="int4")
    got = model(input_ids=ids).logits.numpy()
    assert np.abs(got - expected).max() < 0.02 * np.abs(expected).max()


def test_saving_writes_what_was_loaded_and_not_what_was_rounded(tmp_path):
    load("qwen2", "eager", weight_dtype="int4").save_pretrained(str(tmp_path))
    again = InternVLChatModel.from_pretrained(str(tmp_path), dtype="float32", engine="eager")
    for (name, saved), (_, first) in zip(again.named_parameters(), load_reference("qwen2").model.named_parameters()):
        np.testing.assert_array_equal(saved.numpy(), first.numpy(), name)


@pytest.mark.parametrize("options", [{"weight_dtype": "int3"}, {"weight_dtype": "int8", "quantize_parts": "language,ears"}])
def test_names_that_are_not_known(options):
    with pytest.raises(ConfigError, match="int3|ears"):
        load("qwen2", "eager", **options)


@pytest.mark.parametrize("flag", ["--load_8bit", "--load-8bit", "--load-in-8bit", "--load_in_8bit"])
def test_spellings_of_the_flags(flag):
    parser = Parser()
    add_weight_flags(parser)
    assert weight_options(parser.parse_args([flag])) == {"weight_dtype": "int8", "quantize_parts": None}
    four = flag.replace("8", "4")
    args = parser.parse_args([four, "--quantize-parts", ALL])
    assert weight_options(args) == {"weight_dtype": "int4", "quantize_parts": ALL}


@pytest.mark.parametrize("flag", ["--load_8bit", "--load_4bit"])
def test_the_demo_model_still_answers(flag):
    args = cli.make_parser("").parse_args([flag])
    session = cli.load_session(args)
    assert session.model.weight_dtype == {"--load_8bit": "int8", "--load_4bit": "int4"}[flag]
    from paddlemix.examples.internvl2.chat_demo import DEMO_IMAGE, DEMO_TEXT, load_pictures

    marks, pixels, counts = load_pictures([str(DEMO_IMAGE)], session.model.config)
    assert session.ask(marks + DEMO_TEXT, pixels, {"max_new_tokens": 8}, counts) == "blue"


def test_training_refuses_such_weights():
    model = load("qwen2", "eager", weight_dtype="int8")
    assert isinstance(model.mlp1["1"], QuantisedLinear)
    with pytest.raises(ConfigError, match="trained"):
        model.train()
