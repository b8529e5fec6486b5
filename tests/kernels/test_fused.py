"""Fused kernels of other devices, played by ``fakes.py``: what goes in and comes out, and how many operators it saves."""

import logging
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import paddle
import pytest

from paddlemix import device
from paddlemix.errors import DeviceError
from paddlemix.kernels import fused
from paddlemix.models.blocks.kv_cache import KVCache
from paddlemix.models.blocks.layers import AttentionMask, Linear, RMSNorm, Rotary, apply_rope, attention, rotated
from paddlemix.models.internvl2 import InternVLChatModel
from tests.conftest import FAMILIES, load_reference, tiles

from . import fakes


@pytest.fixture(autouse=True)
def fresh():
    """Choices are made once a process: each test makes its own."""
    fakes.clear()
    yield
    fakes.clear()


@pytest.fixture(params=[13, 10])
def ascend(request, monkeypatch):
    """A device with the Ascend plug-in's custom operators, in one of their two call shapes; the list of calls made."""
    return fakes.play_ascend(monkeypatch, request.param)


@pytest.fixture
def gpu(monkeypatch):
    """A device with Paddle's GPU kernels; the list of calls made."""
    return fakes.play_gpu(monkeypatch)


CARDS = {"ascend": fakes.play_ascend, "gpu": fakes.play_gpu}


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype("float32")


def outputs(function, arrays, dtype):
    """Output and gradients of ``function`` in float32, computed in ``dtype``."""
    inputs = [paddle.to_tensor(x).astype("bfloat16").astype(dtype) for x in arrays]
    for x in inputs:
        x.stop_gradient = False
    y = function(*inputs)
    assert y.dtype == inputs[0].dtype
    paddle.autograd.backward([y], [paddle.to_tensor(random(*y.shape, seed=9)).astype(y.dtype)])
    return [x.astype("float32").numpy() for x in (y, *[x.grad for x in inputs])]


def assert_as_plain(monkeypatch, function, arrays, dtype="bfloat16", tolerance=2e-2):
    """``function`` on the device that is played equals the plain composition in float32, gradients too."""
    actual = outputs(function, arrays, dtype)
    with monkeypatch.context() as patch:
        patch.setenv("PADDLEMIX_KERNELS", "plain")
        fused._chosen.clear()
        expected = outputs(function, arrays, "float32")
    for a, e in zip(actual, expected):
        assert np.abs(a - e).max() < tolerance * np.abs(e).max()


QKV = [random(2, 24, 4, 64), random(2, 24, 2, 64, seed=1), random(2, 24, 2, 64, seed=2)]
STARTS = np.array([0, 7])
SEGMENTS = np.repeat([[0, 1, 2], [3, 0, 0]], [5, 12, 7], axis=1)
MASKS = {
    "full": lambda: None,
    "causal": AttentionMask,
    "padded": lambda: AttentionMask(STARTS),
    "packed": lambda: AttentionMask(None, SEGMENTS),
    "padded and packed": lambda: AttentionMask(STARTS, SEGMENTS),
}


@pytest.mark.parametrize("kind", MASKS)
def test_attention_on_npu(ascend, monkeypatch, kind):
    assert_as_plain(monkeypatch, lambda q, k, v: attention(q, k, v, MASKS[kind]()), QKV)
    assert ascend == ["flash_attention_npu"] * 2  # the probe and the call


@pytest.mark.parametrize("kind", MASKS)
def test_attention_on_gpu(gpu, monkeypatch, kind):
    assert_as_plain(monkeypatch, lambda q, k, v: attention(q, k, v, MASKS[kind]()), QKV)
    assert gpu == ["flash_attention" if kind in ("full", "causal") else "flashmask_attention"]


def test_new_queries_on_a_kv_cache(ascend, monkeypatch):
    """Where the operator's own causal mask would be wrong."""
    later = [QKV[0][:, -5:], *QKV[1:]]
    for make in (AttentionMask, lambda: AttentionMask(STARTS)):
        assert_as_plain(monkeypatch, lambda q, k, v, make=make: attention(q, k, v, make()), later)
    assert ascend == ["flash_attention_npu"] * 3


@pytest.mark.parametrize("kind", MASKS)
def test_the_forms_of_a_mask_say_the_same(kind):
    mask = MASKS[kind]()
    if mask is None:
        return
    hidden = mask.hidden(24, 24).numpy()
    assert np.array_equal(hidden, mask.bias(24, 24).numpy() < 0)
    row = np.arange(24)[:, None]
    assert np.array_equal(hidden, (row < np.arange(24)) | (row >= mask.first_hidden(24).numpy()[:, :, None, :, 0]))
    assert np.array_equal(mask.hidden(3, 24).numpy(), hidden[:, :, -3:])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("card", ["ascend", "gpu"])
def test_norm(monkeypatch, card, dtype):
    calls = CARDS[card](monkeypatch)

    def norm(x, weight):
        return RMSNorm.forward(SimpleNamespace(weight=weight, eps=1e-6), x)

    assert_as_plain(monkeypatch, norm, [random(2, 5, 64), 1 + random(64) / 2], dtype)
    assert calls == (["rms_norm"] if card == "gpu" else ["rms_norm_npu"] * 2)  # the probe and the call


@pytest.mark.parametrize("grad", [True, False])
def test_a_sum_and_its_norm(gpu, monkeypatch, grad):
    """The fused form has no gradients, so it is for answers alone."""
    monkeypatch.setattr(device, "_HALF", (*device._HALF, paddle.float64))
    norm = RMSNorm(64, 1e-6)
    norm.weight.set_value(1 + random(64) / 2)
    norm.to(dtype="float64")
    x, residual = (paddle.to_tensor(random(2, 5, 64, seed=seed)).astype("float64") for seed in (1, 2))
    expected = residual + x
    size = paddle.sqrt((expected * expected).mean(-1, keepdim=True) + 1e-6)
    with paddle.set_grad_enabled(grad):
        total, normed = norm.add(residual, x)
    assert "fused_rms_norm" not in gpu if grad else gpu == ["fused_rms_norm"] * 3  # a probe is two calls
    assert np.abs((total - expected).numpy()).max() < 1e-6
    assert np.abs((normed - expected / size * norm.weight).numpy()).max() < 1e-5


@pytest.mark.parametrize("card", CARDS)
def test_a_product_with_its_bias(monkeypatch, card):
    calls = CARDS[card](monkeypatch)
    layer = Linear(64, 32)

    def product(x, weight, bias):
        y = Linear.forward(SimpleNamespace(weight=weight, bias=bias, group=None, product=of(weight)), x)
        return y

    def of(weight):
        return lambda x, linear, bias: linear(x, weight, bias)

    assert_as_plain(monkeypatch, product, [random(2, 5, 64), layer.weight.numpy(), random(32)])
    assert calls == ["fused_linear"] * 3
    calls.clear()
    product(*(paddle.to_tensor(x) for x in (random(2, 5, 64), layer.weight.numpy(), random(32))))  # float32
    assert not calls


@pytest.mark.parametrize("what", ["refuses", "computes something else"])
def test_a_product_that_is_not_what_it_should_be_is_not_used(monkeypatch, caplog, what):
    calls = fakes.play_ascend(monkeypatch, linear=what != "refuses")
    if what != "refuses":
        functional = paddle.incubate.nn.functional
        monkeypatch.setattr(
            functional, "fused_linear", lambda x, weight, bias: fakes.fused_linear(x, weight, bias * 2, False, None)
        )
    with caplog.at_level(logging.DEBUG, "paddlemix"):
        assert fused.choose("linear", paddle.bfloat16) == "plain"
    assert "linear in bfloat16 on npu: plain (fused_linear is not offered by the plug-in)" in caplog.text
    assert calls == []


@pytest.mark.parametrize("card", ["ascend", "gpu"])
def test_rope(monkeypatch, card):
    CARDS[card](monkeypatch)
    angles = random(1, 24, 1, 32, seed=5)
    cos = paddle.to_tensor(np.concatenate([np.cos(angles)] * 2, -1))
    sin = paddle.to_tensor(np.concatenate([-np.sin(angles), np.sin(angles)], -1))
    assert_as_plain(monkeypatch, lambda x: apply_rope(x, cos, sin), QKV[:1], "float32", 1e-6)
    fused._chosen.clear()
    assert_as_plain(monkeypatch, lambda x: apply_rope(x, cos, sin), QKV[:1])
    # Tables that differ by row, and widths that the kernels do not have, take the plain way.
    each = [paddle.concat([table, table * 0.5]) for table in (cos, sin)]
    fused._chosen.clear()
    assert_as_plain(monkeypatch, lambda x: apply_rope(x, *each), QKV[:1], "float32", 1e-6)


@pytest.mark.parametrize("form", ["whole", "parts", "with norms"])
@pytest.mark.parametrize("card", [None, *CARDS])
def test_queries_and_keys_are_rotated_together(monkeypatch, card, form):
    """By tables that are made once for all layers."""
    calls = CARDS[card](monkeypatch) if card else []
    angles = random(1, 24, 1, 32, seed=5)
    cos = paddle.to_tensor(np.concatenate([np.cos(angles)] * 2, -1))
    sin = paddle.to_tensor(np.concatenate([-np.sin(angles), np.sin(angles)], -1))
    qkv, heads = paddle.to_tensor(random(2, 24, 8, 64)), [4, 2, 2]
    parts = qkv.split(heads, axis=2)
    norms = (lambda x: x * 2, lambda x: x * 3) if form == "with norms" else None
    rope = Rotary((cos, sin))
    for _ in range(2):
        found = rotated(parts if form == "parts" else qkv, heads, rope, norms)
    with monkeypatch.context() as patch:
        patch.setenv("PADDLEMIX_KERNELS", "plain")
        fused._chosen.clear()
        factors = (2, 3) if norms else (1, 1)
        expected = [*(apply_rope(x * factor, cos, sin) for x, factor in zip(parts, factors)), parts[2]]
    for a, e in zip(found, expected, strict=True):
        assert np.abs((a - e).numpy()).max() < 1e-6 * np.abs(e.numpy()).max()
    if card == "gpu":
        assert calls == ["fused_rotary_position_embedding"] * 2
        assert len(rope._prepared) == 1


def test_a_plug_in_without_the_operators_computes_all_the_same(monkeypatch, caplog):
    fakes.play_ascend(monkeypatch, names=(), linear=False)
    with caplog.at_level(logging.DEBUG, "paddlemix"):
        assert [fused.choose(function, paddle.bfloat16) for function in fused.FUNCTIONS] == ["plain"] * len(fused.FUNCTIONS)
    assert "flash_attention_npu is not offered by the plug-in" in caplog.text


def test_choices_can_be_switched_off_and_are_told_once(ascend, monkeypatch, caplog):
    monkeypatch.setenv("PADDLEMIX_KERNELS", "attention=plain, rope=auto")
    with caplog.at_level(logging.DEBUG, "paddlemix"):
        for _ in range(3):
            chosen = {function: fused.choose(function, paddle.bfloat16) for function in fused.FUNCTIONS}
    assert chosen == {
        "attention": "plain",
        "norm": "rms_norm_npu",
        "add_norm": "plain",
        "rope": "fused_rope",
        "linear": "fused_linear",
        "int8": "weight_only_linear_npu",
        "int4": "plain",
    }
    assert [record.getMessage() for record in caplog.records] == [
        "attention in bfloat16 on npu: plain (by PADDLEMIX_KERNELS)",
        "norm in bfloat16 on npu: rms_norm_npu (the fastest here)",
        "add_norm in bfloat16 on npu: plain (nothing else for this dtype here)",
        "rope in bfloat16 on npu: fused_rope (the fastest here)",
        "linear in bfloat16 on npu: fused_linear (the fastest here)",
        "int8 in bfloat16 on npu: weight_only_linear_npu (the fastest here)",
        "int4 in bfloat16 on npu: plain (nothing else for this dtype here)",
    ]


@pytest.mark.parametrize("setting", ["fast", "attention", "attention=flash", "loss=plain"])
def test_settings_that_mean_nothing_are_refused(monkeypatch, setting):
    monkeypatch.setenv("PADDLEMIX_KERNELS", setting)
    with pytest.raises(DeviceError, match="PADDLEMIX_KERNELS='.*attention=plain,norm=plain"):
        fused.choose("norm", paddle.float32)


def test_attention_of_float32_and_of_old_cards_is_plain(gpu, monkeypatch):
    assert fused.choose("attention", paddle.float32) == "plain"
    monkeypatch.setattr(device, "supports_bfloat16", lambda: False)
    assert fused.choose("attention", paddle.float16) == "plain"


def test_nothing_is_fused_on_cpu():
    for dtype in (paddle.float32, paddle.bfloat16):
        assert [fused.choose(function, dtype) for function in fused.FUNCTIONS] == ["plain"] * len(fused.FUNCTIONS)


# ---------------------------------------------------------------------- whole models


def copy_in_half(family):
    """A reference model in float64, which stands for half precision."""
    reference = load_reference(family)
    model = InternVLChatModel(reference.model.config)
    model.set_state_dict(reference.model.state_dict())
    model.set_tokenizer(reference.tokenizer)
    model.to(dtype="float64")
    model.eval()
    return reference, model


@pytest.mark.parametrize("kind", fakes.PLAYED)
@pytest.mark.parametrize("family", FAMILIES)
def test_models_answer_as_with_plain_operators(family, kind):
    """Pictures, a second round over the KV cache and a padded batch, token for token."""
    reference, model = copy_in_half(family)
    options = {"max_new_tokens": 6}

    def answers():
        session_pixels, questions = tiles(0), ["<image>\nWhat is it?", "And where?"]
        first, history = model.chat(reference.tokenizer, session_pixels, questions[0], options, return_history=True)
        found = [first, model.chat(reference.tokenizer, session_pixels, questions[1], options, history)]
        return found + model.batch_chat(reference.tokenizer, None, ["Hi", "Who is it, and what does it want?"], options)

    with fakes.playing(None):
        expected = answers()
    with fakes.playing(kind) as calls:
        assert answers() == expected
    assert {"gpu": "flash_attention", "npu": "flash_attention_npu"}[kind] in calls
    assert any(expected)


@pytest.mark.parametrize("kind", fakes.PLAYED)
def test_one_query_over_a_cache_with_room(kind):
    """What is not filled is neither read nor, where it is read whole, seen."""
    with fakes.playing(kind) as calls:
        config = fakes.small_model("300M").config.llm_config
        keys, values = (paddle.to_tensor(random(2, 20, 1, 64, seed=seed)).astype("float64") for seed in (1, 2))
        q = paddle.to_tensor(random(2, 1, 2, 64)).astype("float64")
        cache = KVCache(config, 2, 24, "float64")
        for start, stop in ((0, 19), (19, 20)):
            cache.reserve(stop - start)
            k, v = cache.append(0, keys[:, start:stop].contiguous(), values[:, start:stop].contiguous())
        assert k.shape[1] == (24 if kind == "npu" else 20)
        for mask in (AttentionMask(), AttentionMask(np.array([0, 7]))):
            found = attention(q, k, v, mask, length=cache.length).numpy()
            hidden = np.arange(20) < (0 if mask.starts is None else mask.starts[:, None, None, None])
            expected = fakes.attention_by_definition(q, keys, values, hidden).numpy()
            assert np.abs(found.reshape(expected.shape) - expected).max() < 1e-6
        assert calls


def test_a_block_costs_at_most_twenty_operators():
    """And docs/performance.md says how many."""
    found = fakes.counts()
    assert len(found) == 4
    for name, by_kind in found.items():
        for kind in fakes.PLAYED:
            assert by_kind[kind][0] <= fakes.MOST < by_kind[None][0], (name, kind)
    text = (Path(__file__).parents[2] / "docs" / "performance.md").read_text(encoding="utf-8")
    assert "\n".join(fakes.table()) in text
