"""Fused kernels of other devices, each played by a function that keeps to what is known of its contract.

The parts are played in float32 arithmetic from the definition of the operation, not by the code under test. Paddle's own
functions are called through their real signatures, so that a keyword that they do not have is an error here too.

``python -m tests.kernels.fakes`` prints how many operators a block costs with and without them, for docs/performance.md; a
device in front, ``npu:0``, counts there.
"""

import contextlib
import functools
import inspect
import sys

import numpy as np
import paddle
import pytest

from paddlemix import device
from paddlemix.kernels import fused
from paddlemix.models.blocks import kv_cache

CACHED = (
    fused._flash_npu,
    fused._norm_npu_offered,
    fused._rope_npu_offered,
    fused._linear_offered,
    fused._add_norm_offered,
    *(fused._PROBES[key] for key in fused._PROBES if isinstance(key, tuple)),
    fused._signs,
    kv_cache._shows_writes,
)
MOST = 20  # operators of a block that the fused kernels leave


def clear():
    """Choices are made once a process: forget them."""
    fused._chosen.clear()
    for function in CACHED:
        function.cache_clear()


class Calls(list):
    """Names of the fused operators that were called, and how many plain ones they were played by."""

    inside = 0

    def play(self, name, function):
        """``function``, noted as one call of ``name``."""

        @functools.wraps(function)
        def played(*arguments, **named):
            before = counted()
            out = function(*arguments, **named)
            self.append(name)
            self.inside += counted() - before
            return out

        return played

    def as_documented(self, real, function):
        """``function`` behind the signature of Paddle's own ``real``."""
        signature = inspect.signature(real)

        def played(*arguments, **named):
            bound = signature.bind(*arguments, **named)
            bound.apply_defaults()
            return function(**bound.arguments)

        return self.play(real.__name__, played)


def counted():
    """Operators that Paddle ran since counting began."""
    calls = paddle.base.core.get_low_precision_op_list()
    return sum(int(count) for counts in calls.values() for count in str(counts).split(","))


def operators(step, calls):
    """Number of operators of ``step()``, a fused one as one."""
    paddle.set_flags({"FLAGS_low_precision_op_list": 1})
    paddle.base.core.clear_low_precision_op_list()
    calls.clear()
    calls.inside = 0
    try:
        with paddle.no_grad():
            step()
        return counted() - calls.inside + len(calls)
    finally:
        paddle.set_flags({"FLAGS_low_precision_op_list": 0})


def attention_by_definition(q, k, v, hidden):
    """``[B, N, H, D]``; ``hidden [..., N, S]`` bool."""
    group = q.shape[2] // k.shape[2]
    q, k, v = (x.astype("float32").transpose([0, 2, 1, 3]) for x in (q, k, v))
    k, v = (paddle.concat([x[:, i // group : i // group + 1] for i in range(q.shape[1])], axis=1) for x in (k, v))
    scores = paddle.matmul(q, k.transpose([0, 1, 3, 2])) / q.shape[-1] ** 0.5
    scores = scores + paddle.to_tensor(np.where(np.asarray(hidden), np.float32(-1e30), np.float32(0)))
    return paddle.matmul(paddle.nn.functional.softmax(scores, axis=-1), v).transpose([0, 2, 1, 3])


def norm_by_definition(x, weight, eps):
    """``x [..., D]`` -> the same, and the inverse of its size, in float32."""
    y = x.astype("float32")
    inverse = 1 / paddle.sqrt((y * y).mean(-1, keepdim=True) + eps)
    return y * inverse * weight.astype("float32"), inverse


def rope_by_definition(x, cos, sin):
    """``x [B, N, H, D]``, all in one dtype."""
    assert cos.shape == sin.shape == [1, x.shape[1], 1, x.shape[3]]
    assert x.dtype == cos.dtype == sin.dtype
    y, cos, sin = (z.astype("float32") for z in (x, cos, sin))
    first, second = y.split(2, axis=-1)
    return (y * cos + paddle.concat([-second, first], axis=-1) * sin).astype(x.dtype)


# ---------------------------------------------------------------------- Ascend's custom operators


def flash_attention_npu(q, k, v, seed, mask, *rest):
    assert seed is None and {x.dtype for x in (q, k, v)} <= {*device._HALF, paddle.bfloat16}
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
    y, rstd = norm_by_definition(x, gamma, eps)
    return [y.astype(x.dtype), rstd]


def fused_rope(x, cos, sin):
    assert x.shape[3] % 64 == 0
    return [rope_by_definition(x, cos, sin)]


def weight_only_linear_npu(x, weight, scale):
    assert len(x.shape) == 2 and weight.shape == [x.shape[1], scale.shape[0]] and len(scale.shape) == 1
    assert weight.dtype == paddle.int8 and scale.dtype == x.dtype
    values = weight.astype("float32") * scale.astype("float32")
    return [paddle.matmul(x.astype("float32"), values).astype(x.dtype)]


ASCEND = (flash_attention_npu, rms_norm_npu, fused_rope, weight_only_linear_npu)


def play_ascend(monkeypatch, arguments=13, linear=True, names=ASCEND):
    """Play the plug-in's custom operators ``names``, attention with so many ``arguments``; returns the :class:`Calls`.

    ``linear``: whether the plug-in's product with a bias takes more than two axes.
    """
    calls = Calls()
    offered = {function.__name__: function for function in names}

    def run(name, *given):
        if name not in offered:
            raise RuntimeError(f"({name}) please make sure you registered your op first")
        if name == "flash_attention_npu" and len(given) != arguments:
            raise ValueError(f"(InvalidArgument) {arguments} arguments are wanted")
        return calls.play(name, offered[name])(*given)

    monkeypatch.setattr(device, "current", lambda: "npu")
    monkeypatch.setattr(paddle._C_ops, "_run_custom_op", run)
    functional = paddle.incubate.nn.functional
    product = calls.as_documented(functional.fused_linear, fused_linear if linear else refused)
    monkeypatch.setattr(functional, "fused_linear", product)
    return calls


def refused(x, **_):
    raise RuntimeError(f"aclnnGemm: the input has {len(x.shape)} axes, not 2")


# ---------------------------------------------------------------------- Paddle's, for GPU


def fused_linear(x, weight, bias, transpose_weight, name):
    assert len(weight.shape) == 2 and not transpose_weight and name is None and bias.shape == [weight.shape[1]]
    assert x.dtype == weight.dtype == bias.dtype
    dtype = "float64" if x.dtype == paddle.float64 else "float32"
    return (paddle.matmul(x.astype(dtype), weight.astype(dtype)) + bias.astype(dtype)).astype(x.dtype)


def flash_attention(query, key, value, dropout, causal, return_softmax, **rest):
    queries, keys = query.shape[1], key.shape[1]
    assert dropout == 0.0 and not return_softmax and {x.dtype for x in (query, key, value)} <= {*device._HALF}
    assert not causal or queries == keys
    assert rest["fixed_seed_offset"] is None and rest["softmax_scale"] is None
    hidden = np.triu(np.ones([queries, keys], bool), 1) if causal else np.zeros([queries, keys], bool)
    return attention_by_definition(query, key, value, hidden).astype(query.dtype), None


def flashmask_attention(query, key, value, startend_row_indices, causal, **rest):
    rows = startend_row_indices.numpy()
    assert rows.dtype == np.int32 and rows.shape[1:] == (1, key.shape[1], 1) and causal and query.shape[1] == key.shape[1]
    row = np.arange(query.shape[1])[:, None]
    hidden = (row < np.arange(key.shape[1])) | (row >= rows[:, :, None, :, 0])
    return attention_by_definition(query, key, value, hidden).astype(query.dtype)


def rms_norm(input, normalized_shape, weight, eps, name):
    assert normalized_shape == [input.shape[-1]]
    return tuple(rms_norm_npu(input, weight, eps))


def fused_rms_norm(x, norm_weight, norm_bias, epsilon, begin_norm_axis, bias, residual, quant_scale, **rest):
    assert norm_bias is None and bias is None and begin_norm_axis == len(x.shape) - 1 and quant_scale == -1
    assert x.shape == residual.shape and x.dtype == residual.dtype == norm_weight.dtype
    assert not paddle.is_grad_enabled()  # it has no gradient
    total = (x.astype("float32") + residual.astype("float32")).astype(x.dtype)
    y, inverse = norm_by_definition(total, norm_weight, epsilon)
    return y.astype(x.dtype), total, inverse


def rotate(q, k, v, sin, cos, position_ids, use_neox_rotary_style, time_major, rotary_emb_base):
    assert not use_neox_rotary_style and not time_major and position_ids is None and v is None
    return tuple(None if x is None else rope_by_definition(x, cos, sin) for x in (q, k, v))


class FewBits:
    """``weight_quantize``, whose layout is that of Paddle's own on CPU, and the product that alone can read it."""

    def __init__(self, architecture):
        self.architecture, self._values = architecture, {}

    def quantise(self, x, algo, arch, group_size):
        bits = {"weight_only_int8": 8, "weight_only_int4": 4}[algo]
        assert arch == self.architecture and group_size in (-1, 64, 128) and x.dtype in (*device._HALF, paddle.bfloat16)
        assert x.shape[0] % 64 == x.shape[1] % 64 == 0  # or the real one writes where it should not
        half = x.astype("bfloat16") if x.dtype == paddle.float64 else x
        codes, scales = paddle._C_ops.weight_quantize(half, algo, 80, group_size)
        values = half.astype("float32").numpy().reshape([-1, 64, x.shape[1]])
        known, most = scales.astype("float32").numpy()[:, None], 2 ** (bits - 1) - 1
        read = np.divide(values, known, out=np.zeros_like(values), where=known > 0)
        self._values[codes.numpy().tobytes()] = (np.rint(read).clip(-most, most) * known).reshape(x.shape)
        return codes, scales.astype(x.dtype)

    def product(self, x, weight, bias, weight_scale, weight_dtype, arch, group_size):
        values = self._values[weight.numpy().tobytes()]
        assert arch == self.architecture and group_size == 64 and weight.dtype == paddle.int8
        assert weight.shape == [values.shape[1] // {"int8": 1, "int4": 2}[weight_dtype], x.shape[-1]]
        assert weight_scale.shape == [x.shape[-1] // 64, values.shape[1]] and weight_scale.dtype == x.dtype
        y = paddle.matmul(x.astype("float32"), paddle.to_tensor(values))
        assert bias is None or (bias.shape == [values.shape[1]] and bias.dtype == x.dtype)
        return (y if bias is None else y + bias.astype("float32")).astype(x.dtype)


def play_gpu(monkeypatch, architecture=80):
    """Play Paddle's kernels on a card of compute capability 8.0, or another; returns the :class:`Calls`."""
    calls = Calls()
    functional, more = paddle.nn.functional, paddle.incubate.nn.functional
    monkeypatch.setattr(device, "current", lambda: "gpu")
    monkeypatch.setattr(device, "supports_bfloat16", lambda: True)
    monkeypatch.setattr(device, "architecture", lambda: architecture)
    few = FewBits(architecture)
    for module, name, function in (
        (functional.flash_attention, "flash_attention", flash_attention),
        (functional, "flashmask_attention", flashmask_attention),
        (functional, "rms_norm", rms_norm),
        (more, "fused_rms_norm", fused_rms_norm),
        (more, "fused_rotary_position_embedding", rotate),
        (more, "fused_linear", fused_linear),
        (paddle.nn.quant, "weight_quantize", few.quantise),
        (paddle.nn.quant, "weight_only_linear", few.product),
    ):
        monkeypatch.setattr(module, name, calls.as_documented(getattr(module, name), function))
    return calls


PLAYED = {"gpu": play_gpu, "npu": play_ascend}

# ---------------------------------------------------------------------- counting


def steps(model, dtype="float64"):
    """``{step: (what runs it, the blocks that it goes through)}`` of a chat model in ``dtype``."""
    language = model.language_model

    def decode(tokens, before):
        cache = kv_cache.KVCache(language.config, 1, 64, dtype)
        if before:
            cache.reserve(before)

        def step():
            cache.truncate(before)
            hidden = language(language.embed(paddle.zeros([1, tokens], "int64")).astype(dtype), cache=cache)
            return language.lm_head(hidden[:, -1])

        return step

    tile = np.zeros([1, 3, *[model.config.image_size] * 2], "float32")
    return {
        "vision tower and projector": (lambda: model.extract_feature(tile), model.vision_model.encoder.layers),
        "prefill": (decode(32, 0), language.model.layers),
        "decode step": (decode(1, 40), language.model.layers),
    }


def of_a_block(step, blocks, calls):
    """``(operators of a block, all others)`` of a step."""
    with paddle.no_grad():
        step()  # tables of positions are made once, and choices
    whole = operators(step, calls)
    last = blocks[-1]
    del blocks[len(blocks) - 1]
    try:
        each = whole - operators(step, calls)
    finally:
        blocks.append(last)
    return each, whole - each * len(blocks)


def small_model(vision):
    """A model of the published kinds in float64, which stands for half precision, with heads that the kernels take."""
    from paddlemix.models.internvl2 import InternVLChatModel
    from paddlemix.models.internvl2.configuration import InternVLChatConfig

    tower = dict(
        hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, image_size=56, patch_size=14
    )
    tower |= dict(norm_type="rms_norm", qkv_bias=False, qk_normalization=True)
    if vision == "300M":
        tower |= dict(norm_type="layer_norm", qkv_bias=True, qk_normalization=False)
    text = dict(architectures=["Qwen2ForCausalLM"], hidden_size=128, num_hidden_layers=2, num_attention_heads=2)
    text |= dict(num_key_value_heads=1, intermediate_size=128, vocab_size=64, bias=False)
    config = InternVLChatConfig.from_dict(dict(vision_config=tower, llm_config=text, force_image_size=56, downsample_ratio=0.5))
    paddle.seed(0)
    model = InternVLChatModel(config)
    model.to(dtype="float64")
    model.eval()
    return model


@contextlib.contextmanager
def playing(kind, **options):
    """Within the block the device is one that offers the fused kernels of ``kind``, in float64 too; gives the calls.

    Where Paddle has a device of that kind, it stays where it is."""
    clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PADDLEMIX_KERNELS", "plain" if kind is None else "auto")
        patch.setattr(device, "_HALF", (*device._HALF, paddle.float64))
        yield Calls() if kind is None else PLAYED[kind](patch, **options)
    clear()


def counts():
    """``{(step, tower): {device or None: (operators of a block, all others)}}``."""
    found = {}
    for tower in ("300M", "6B"):
        for kind in (None, *PLAYED):
            with playing(kind) as calls:
                for name, (step, blocks) in steps(small_model(tower)).items():
                    if tower == "300M" or name.startswith("vision"):
                        key = f"{name}, {tower}" if name.startswith("vision") else name
                        found.setdefault(key, {})[kind] = of_a_block(step, blocks, calls)
    return found


def table():
    """Lines of docs/performance.md."""
    lines = ["| step | plain | GPU | Ascend | all others, plain |", "| --- | --- | --- | --- | --- |"]
    for name, by_kind in counts().items():
        each = " | ".join(str(by_kind[kind][0]) for kind in (None, *PLAYED))
        lines.append(f"| {name} | {each} | {by_kind[None][1]} |")
    return lines


if __name__ == "__main__":
    device.set_device(sys.argv[1] if sys.argv[1:] else "cpu")
    print("\n".join(table()))
