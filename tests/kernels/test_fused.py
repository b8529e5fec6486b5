"""Fused kernels of other devices, each played by a function that keeps to what is known of its contract.

The parts are played in float32 arithmetic from the definition of the operation, not by the code under test; what is tested
is what goes in and comes out: shapes, masks, signs, dtypes, gradients.
"""

import logging
from types import SimpleNamespace

import numpy as np
import paddle
import pytest

from paddlemix import device
from paddlemix.errors import DeviceError
from paddlemix.kernels import fused
from paddlemix.models.blocks.layers import AttentionMask, RMSNorm, apply_rope, attention

CACHED = (fused._flash_npu, fused._norm_npu_offered, fused._rope_npu_offered, fused._signs)


@pytest.fixture(autouse=True)
def fresh():
    """Choices are made once a process: each test makes its own."""

    def clear():
        fused._chosen.clear()
        for function in CACHED:
            function.cache_clear()

    clear()
    yield
    clear()


def attention_by_definition(q, k, v, hidden):
    """``[B, N, H, D]``; ``hidden [..., N, S]`` bool."""
    group = q.shape[2] // k.shape[2]
    q, k, v = (x.astype("float32").transpose([0, 2, 1, 3]) for x in (q, k, v))
    k, v = (paddle.concat([x[:, i // group : i // group + 1] for i in range(q.shape[1])], axis=1) for x in (k, v))
    scores = paddle.matmul(q, k.transpose([0, 1, 3, 2])) / q.shape[-1] ** 0.5
    scores = scores + paddle.to_tensor(np.where(np.asarray(hidden), np.float32(-1e30), np.float32(0)))
    return paddle.matmul(paddle.nn.functional.softmax(scores, axis=-1), v).transpose([0, 2, 1, 3])


def flash_attention_npu(q, k, v, seed, mask, *rest):
    assert seed is None and {x.dtype for x in (q, k, v)} <= {paddle.bfloat16, paddle.float16}
    assert mask is None or mask.dtype == paddle.bool
    if len(rest) == 8:  # the shape of 13 arguments
        assert rest[:2] == (None, None) and rest[-1] is False
        rest = rest[2:-1]
    dropout, causal, _, inference, triangle = rest
    assert (dropout, causal, inference, triangle) == (0.0, False, False, False)
    hidden = np.zeros([1, 1, q.shape[1], k.shape[1]], bool) if mask is None else mask.numpy()
    assert hidden.shape[1:] == (1, q.shape[1], k.shape[1])
    return [attention_by_definition(q, k, v, hidden).astype(q.dtype)]


def rms_norm_npu(x, gamma, eps):
    assert x.dtype == gamma.dtype
    y = x.astype("float32")
    rstd = 1 / paddle.sqrt((y * y).mean(-1, keepdim=True) + eps)
    return [(y * rstd * gamma.astype("float32")).astype(x.dtype), rstd]


def fused_rope(x, cos, sin):
    assert cos.shape == sin.shape == [1, x.shape[1], 1, x.shape[3]] and x.shape[3] % 64 == 0
    assert x.dtype == cos.dtype == sin.dtype
    first, second = x.split(2, axis=-1)
    return [x * cos + paddle.concat([-second, first], axis=-1) * sin]


@pytest.fixture(params=[13, 10])
def ascend(request, monkeypatch):
    """A device with the Ascend plug-in's custom operators, in one of their two call shapes; the list of calls made."""
    calls = []

    def run(name, *arguments):
        if name == "flash_attention_npu" and len(arguments) != request.param:
            raise ValueError(f"(InvalidArgument) {request.param} arguments are wanted")
        calls.append(name)
        return {f.__name__: f for f in (flash_attention_npu, rms_norm_npu, fused_rope)}[name](*arguments)

    monkeypatch.setattr(device, "current", lambda: "npu")
    monkeypatch.setattr(paddle._C_ops, "_run_custom_op", run)
    return calls


@pytest.fixture
def gpu(monkeypatch):
    """A device with Paddle's GPU kernels."""
    calls = []

    def flash_attention(query, key, value, dropout=0.0, causal=False):
        calls.append("flash_attention")
        queries, keys = query.shape[1], key.shape[1]
        hidden = np.triu(np.ones([queries, keys], bool), 1) if causal else np.zeros([queries, keys], bool)
        assert not causal or queries == keys
        return attention_by_definition(query, key, value, hidden).astype(query.dtype), None

    def flashmask_attention(query, key, value, startend_row_indices, causal):
        calls.append("flashmask_attention")
        rows = startend_row_indices.numpy()
        assert rows.dtype == np.int32 and rows.shape[1:] == (1, key.shape[1], 1) and causal
        row = np.arange(query.shape[1])[:, None]
        hidden = (row < np.arange(key.shape[1])) | (row >= rows[:, :, None, :, 0])
        return attention_by_definition(query, key, value, hidden).astype(query.dtype)

    def rms_norm(x, shape, weight, eps):
        calls.append("rms_norm")
        assert shape == [x.shape[-1]]
        return tuple(rms_norm_npu(x, weight, eps))

    def rotate(q, k=None, v=None, sin=None, cos=None, use_neox_rotary_style=True):
        calls.append("fused_rotary_position_embedding")
        assert not use_neox_rotary_style
        return fused_rope(q, cos, sin)[0], None, None

    functional = paddle.nn.functional
    monkeypatch.setattr(device, "current", lambda: "gpu")
    monkeypatch.setattr(device, "supports_bfloat16", lambda: True)
    monkeypatch.setattr(functional.flash_attention, "flash_attention", flash_attention)
    monkeypatch.setattr(functional, "flashmask_attention", flashmask_attention)
    monkeypatch.setattr(functional, "rms_norm", rms_norm)
    monkeypatch.setattr(paddle.incubate.nn.functional, "fused_rotary_position_embedding", rotate)
    return calls


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
def test_norm(request, monkeypatch, card, dtype):
    if card == "ascend":
        monkeypatch.setattr(device, "current", lambda: "npu")
        monkeypatch.setattr(paddle._C_ops, "_run_custom_op", lambda name, *a: {"rms_norm_npu": rms_norm_npu}[name](*a))
    else:
        assert request.getfixturevalue("gpu") == []

    def norm(x, weight):
        return RMSNorm.forward(SimpleNamespace(weight=weight, eps=1e-6), x)

    assert_as_plain(monkeypatch, norm, [random(2, 5, 64), 1 + random(64) / 2], dtype)
    if card == "gpu":
        assert request.getfixturevalue("gpu") == ["rms_norm"]


@pytest.mark.parametrize("card", ["ascend", "gpu"])
def test_rope(request, monkeypatch, card):
    if card == "ascend":
        monkeypatch.setattr(device, "current", lambda: "npu")
        monkeypatch.setattr(paddle._C_ops, "_run_custom_op", lambda name, *a: {"fused_rope": fused_rope}[name](*a))
    else:
        request.getfixturevalue("gpu")
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


def test_a_plug_in_without_the_operators_computes_all_the_same(monkeypatch, caplog):
    def run(name, *arguments):
        raise RuntimeError(f"({name}) please make sure you registered your op first")

    monkeypatch.setattr(device, "current", lambda: "npu")
    monkeypatch.setattr(paddle._C_ops, "_run_custom_op", run)
    with caplog.at_level(logging.DEBUG, "paddlemix"):
        assert [fused.choose(function, paddle.bfloat16) for function in fused.FUNCTIONS] == ["plain"] * 3
    assert "flash_attention_npu is not offered by the plug-in" in caplog.text


def test_choices_can_be_switched_off_and_are_told_once(ascend, monkeypatch, caplog):
    monkeypatch.setenv("PADDLEMIX_KERNELS", "attention=plain, rope=auto")
    with caplog.at_level(logging.DEBUG, "paddlemix"):
        for _ in range(3):
            chosen = {function: fused.choose(function, paddle.bfloat16) for function in fused.FUNCTIONS}
    assert chosen == {"attention": "plain", "norm": "rms_norm_npu", "rope": "fused_rope"}
    assert [record.getMessage() for record in caplog.records] == [
        "attention in bfloat16 on npu: plain (by PADDLEMIX_KERNELS)",
        "norm in bfloat16 on npu: rms_norm_npu (the fastest here)",
        "rope in bfloat16 on npu: fused_rope (the fastest here)",
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
        assert [fused.choose(function, dtype) for function in fused.FUNCTIONS] == ["plain"] * 3
