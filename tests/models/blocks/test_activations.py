"""Activations in 8 bits beside weights in few: both engines round alike, and every place that takes a model has them."""

import numpy as np
import paddle
import pytest

from paddlemix import device, quantised
from paddlemix.errors import ConfigError
from paddlemix.evaluation.local import load_model
from paddlemix.evaluation.runner import Settings
from paddlemix.examples.internvl2 import chat_demo, cli
from paddlemix.kernels import cpu
from paddlemix.models.blocks.quantising import PlainWeight, QuantisedLinear, round_activations
from paddlemix.models.internvl2 import ChatSession, InternVLChatModel
from tests.conftest import FAMILIES, load_reference, tiles

ENGINES = ["eager", *(["inference"] if cpu.available("float32") else [])]
ALL = "language,projector,vision"


def load(family, engine, weight_dtype, **options):
    path = str(load_reference(family).path)
    options = {"activation_dtype": "int8", "quantize_parts": ALL, **options}
    return InternVLChatModel.from_pretrained(path, dtype="float32", engine=engine, weight_dtype=weight_dtype, **options)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("weight_dtype", ["int8", "int4"])
def test_engines_agree_and_stay_near_activations_as_they_are(family, weight_dtype):
    reference = load_reference(family)
    ids, pixels = reference.arrays["lm_input_ids"], reference.arrays["pixel_values"]
    exact = load(family, ENGINES[-1], weight_dtype, activation_dtype=None)
    models = [load(family, engine, weight_dtype) for engine in ENGINES]
    for run in (lambda model: model(input_ids=ids).logits.numpy(), lambda model: model.extract_feature(pixels).numpy()):
        expected, found = run(exact), [run(model) for model in models]
        rounding = apart(found[-1], expected)
        assert 1e-3 < rounding < 0.03
        # What lies on the border between two numbers may be rounded to either, which then goes through the blocks.
        assert apart(found[0], found[-1]) < rounding


def apart(one, other):
    return np.sqrt(((one - other) ** 2).mean() / (other**2).mean())


@pytest.mark.parametrize("inputs, group", [(96, 32), (200, 64), (256, 128)])
def test_plain_paddle_rounds_as_it_is_described(inputs, group):
    random = np.random.default_rng(0)
    weight = quantised.quantise(random.standard_normal([5, inputs], np.float32), 8, group)
    x = random.standard_normal([2, 300, inputs], np.float32)
    x[0, 3], x[0, 4, :40], x[0, 5] = 0, 0, x[0, 5] * np.float32(1e-20)
    got = PlainWeight(weight).rounded(paddle.to_tensor(x)).numpy()
    expected = quantised.rounded_activations(x, group)
    step = np.abs(x).max() / 127
    assert (np.abs(got - expected) > 1e-6).mean() < 1e-3 and np.abs(got - expected).max() < 1.01 * step
    assert (got[0, 3] == 0).all() and apart(got[0, 5] * 1e20, x[0, 5] * 1e20) < 0.01


@pytest.mark.skipif(
    len(ENGINES) == 1, reason="products of plain Paddle depend on who else is there, which rounding makes visible"
)
@pytest.mark.parametrize("weight_dtype", ["int8", "int4"])
def test_rounds_batches_and_fresh_runs_agree(weight_dtype):
    model, tokenizer = load("qwen2", "inference", weight_dtype), load_reference("qwen2").tokenizer
    options = {"max_new_tokens": 12}
    questions = ["Tell me a story.", "<image>\nWhat is in the picture?", "Where?"]
    alone = [model.chat(tokenizer, p, q, options) for p, q in zip((None, tiles(0), None), questions)]
    assert model.batch_chat(tokenizer, tiles(0), questions, options, [[], [len(tiles(0))], []]) == alone
    session = ChatSession(model, tokenizer)
    session.ask(questions[1], tiles(0), options)
    assert session.ask("And now?", None, options) == model.chat(tokenizer, tiles(0), "And now?", options, session.history[:1])


def test_without_a_compiler_they_are_rounded_too(monkeypatch):
    ids = load_reference("qwen2").arrays["lm_input_ids"]
    expected = load("qwen2", ENGINES[-1], "int8")(input_ids=ids).logits.numpy()
    monkeypatch.setattr(cpu, "compiled", lambda: False)
    monkeypatch.setattr(cpu, "available", lambda dtype="float32": False)
    with pytest.warns(UserWarning, match="install g\\+\\+"):
        got = load("qwen2", "auto", "int8")(input_ids=ids).logits.numpy()
    assert np.abs(got - expected).max() < 0.05 * np.abs(expected).max()


def test_the_flag_reaches_the_model(capsys, monkeypatch):
    args = cli.make_parser("").parse_args(["--load_8bit", "--activation-dtype", "int8"])
    model = cli.load_session(args).model
    assert {x.activations for x in model.sublayers() if isinstance(x, QuantisedLinear)} <= {"int8"}
    path = str(load_reference("qwen2").path)
    settings = Settings(path, device="cpu", dtype="float32", weight_dtype="int8", activation_dtype="int8")
    plain = Settings(path, device="cpu", dtype="float32", weight_dtype="int8")
    ids = load_reference("qwen2").arrays["lm_input_ids"]
    logits = [load_model(each).model(input_ids=ids).logits.numpy() for each in (settings, plain)]
    assert np.abs(logits[0] - logits[1]).max() > 1e-3 * np.abs(logits[1]).max()
    monkeypatch.setattr("sys.argv", ["chat_demo", "--activation_dtype", "int3"])
    with pytest.raises(SystemExit):
        chat_demo.main()
    assert "activation_dtype" in capsys.readouterr().err


def test_what_cannot_be_is_refused(monkeypatch):
    with pytest.raises(ConfigError, match="activation_dtype is 'int2'"):
        load("qwen2", "eager", "int8", activation_dtype="int2")
    with pytest.raises(ConfigError, match="load_8bit"):
        load("qwen2", "eager", None)
    with pytest.raises(ConfigError, match="tensor_parallel"):
        load("qwen2", "eager", "int8", tensor_parallel=2)
    model = load("qwen2", "eager", "int8", activation_dtype=None)
    monkeypatch.setattr(device, "is_cpu", lambda: False)
    with pytest.raises(ConfigError, match="for CPU"):
        round_activations(model, "int8")
