"""Nothing computes with an operator that Ascend lacks: what Paddle executes, against tools/npu/operators.txt.

Two recordings see different things. ``paddle.amp.debugging`` counts what really ran, forward only. A static program lists
the gradients too. In both, float64 stands in for bfloat16, in which Paddle computes nothing on CPU: what turns to float64
along with the weights is computed in half precision on a card, and what stays float32 was put into float32 on purpose.
"""

import configparser
import functools
from pathlib import Path

import numpy as np
import paddle
import pytest
from paddle.amp import debugging
from paddle.base import core

from paddlemix.doctor.device_check import cases
from paddlemix.models.blocks import experts
from paddlemix.models.blocks.vision import bicubic_weights
from paddlemix.models.internvl2 import ChatSession, InternVLChatModel
from paddlemix.training.arguments import PreTrainingArguments
from paddlemix.training.optimizer import Optimizer
from tests.conftest import FAMILIES, assert_close, load_reference, tiles
from tests.models.internvl2 import test_internvl3 as internvl3

ALLOWED = Path(__file__).parents[1] / "tools" / "npu" / "operators.txt"
DTYPES = {"float64": "bfloat16", "float32": "float32"}
# Constants, the sum of gradients that eager mode adds one by one, and detach(), which does nothing there.
_STATIC_ONLY = {"assign_value", "full_int_array", "add_n", "share_data"}


@pytest.fixture(autouse=True)
def without_the_kernels_of_cpus(monkeypatch):
    monkeypatch.setenv("PADDLEMIX_KERNELS", "plain")


@functools.cache
def allowed():
    """Sections of the list: ``{"bfloat16": {operators}, ...}``."""
    parser = configparser.ConfigParser(allow_no_value=True, delimiters="=")
    parser.read(ALLOWED, encoding="utf-8")
    return {name: set(parser[name]) for name in parser.sections()}


def forbidden(operators):
    """Those of ``operators``, a set of (name, dtype), that the list does not have."""
    lists = allowed()
    everywhere = lists["no arithmetic"] | lists["through the host"]
    # What the backend has in bfloat16 it has in float32; gradients come with their operators.
    known = {
        "bfloat16": lists["bfloat16"],
        "float32": lists["bfloat16"] | lists["float32"],
        "integer": lists["bfloat16"] | lists["integer"],
    }
    return {(name, dtype) for name, dtype in operators if name.removesuffix("_grad") not in everywhere | known[dtype]}


def executed(run, model):
    """Set of (operator, dtype) that ``run(model)`` executes, forward only; the model comes back in float64."""
    counts = []
    for dtype in ("float32", "float64"):
        model.to(dtype=dtype)
        debugging.enable_operator_stats_collection()
        try:
            run(model)
            stats = core.get_low_precision_op_list()
        finally:
            paddle.set_flags({"FLAGS_low_precision_op_list": 0})
        counts.append({op: [int(n) for n in value.split(",")] for op, value in stats.items()})
    found = set()
    for op, (_, _, floats, others) in counts[0].items():
        name = core._get_phi_kernel_name(op).removesuffix("_")
        kept = counts[1].get(op, [0] * 4)[2]
        found |= {(name, "bfloat16")} if floats > kept else set()
        found |= {(name, "float32")} if kept else set()
        found |= {(name, "integer")} if others else set()
    return found


def programmed(build):
    """Set of (operator, dtype) of the static program of ``build() -> loss``, with its gradients."""
    program = paddle.static.Program()
    before = paddle.get_default_dtype()
    paddle.enable_static()
    paddle.set_default_dtype("float64")
    try:
        with paddle.static.program_guard(program, paddle.static.Program()):
            paddle.static.append_backward(build())
    finally:
        paddle.set_default_dtype(before)
        paddle.disable_static()
    found = set()
    for op in program.global_block().ops:
        name = op.name().removeprefix("pd_op.").removesuffix("_")
        if name.startswith("builtin.") or name in _STATIC_ONLY:
            continue
        values = [v for v in [*op.operands_source(), *op.results()] if v.initialized() and v.is_dense_tensor_type()]
        dtypes = [str(v.dtype).split(".")[-1] for v in values]
        dtype = next((DTYPES[d] for d in ("float64", "float32") if d in dtypes), "integer")
        found.add((name, dtype))
    return found


def copy_of(reference):
    model = InternVLChatModel(reference.model.config)
    model.set_state_dict(reference.model.state_dict())
    model.set_tokenizer(reference.tokenizer)
    model.eval()
    return model


def sample_of(reference):
    """A training sample as arguments of the model."""
    sample = reference.expected["train_samples"][reference.expected["adamw_sample"]]
    ids, labels = (np.array([sample[key]]) for key in ("input_ids", "labels"))
    pixels = tiles(1)
    flags = np.full(len(pixels), int((ids == reference.model.img_context_token_id).any()))
    return dict(pixel_values=pixels, input_ids=ids, labels=labels, image_flags=flags)


def report(found):
    return ", ".join(f"{name} in {dtype}" for name, dtype in sorted(found))


def test_chats(reference, chat_pixels):
    """Pictures, a second round on the KV cache, video frames, text, a batch, another size of tiles."""
    chats = {chat["label"]: chat for chat in reference.expected["chats"]}
    options = {"max_new_tokens": 4}

    def run(model):
        for label, chat in chats.items():
            pixels, counts = chat_pixels(label)
            history = [tuple(turn) for turn in chat["history"] or []] or None
            model.chat(reference.tokenizer, pixels, chat["question"], options, history, num_patches_list=counts)
        session = ChatSession(model, reference.tokenizer)
        for question in ("<image>\nWhat is it?", "And where?"):
            session.ask(question, tiles(0) if "<image>" in question else None, options)
        pixels = np.concatenate([tiles(0), tiles(1)])
        counts = [len(tiles(0)), len(tiles(1))]
        sampling = {**options, "do_sample": True, "seed": 0}
        model.batch_chat(reference.tokenizer, pixels, ["<image>\nWhat?", "<image>\nWho is that?"], sampling, counts)
        model.extract_feature(reference.arrays["pixel_values_168x140"][:1, :, :112, :56])

    found = executed(run, copy_of(reference))
    assert not (bad := forbidden(found)), report(bad)
    assert {("matmul", "bfloat16"), ("softmax", "float32"), ("argmax", "bfloat16")} <= found


def test_training_steps(reference):
    """Forward, optimiser and recomputation as executed, with padding and with packed rows."""
    sample = sample_of(reference)
    length = sample["input_ids"].shape[1]
    padding = dict(attention_mask=(np.arange(length) >= 3)[None].astype("int64"))
    packing = dict(segment_ids=(np.arange(length) > length // 2)[None].astype("int64"), loss_weight=np.full([1, length], 0.5))

    def run(model):
        model.train()
        for part in (model.vision_model.encoder, model.language_model.model):
            part.enable_recompute = True
        model.vision_model.encoder.layers[-1].drop_path = 0.1
        named = {f"{reference.name}.{name}": parameter for name, parameter in model.named_parameters()}
        optimiser = Optimizer(named, PreTrainingArguments(output_dir="unused"))
        for extra in (padding, packing):
            model(**sample, **extra).loss.backward()
            optimiser.accumulate()
        optimiser.step(1e-4)

    found = executed(run, copy_of(reference))
    assert not (bad := forbidden(found)), report(bad)
    assert {("adamw", "float32"), ("cross_entropy_with_softmax", "float32")} <= found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shape", ["reference", "other grid"])
def test_gradients(family, shape):
    reference = load_reference(family)
    sample = sample_of(reference)
    if shape == "other grid":  # positions are interpolated, and learned at the same time
        pixels = sample["pixel_values"]
        sample["pixel_values"] = pixels[:, :, :, : pixels.shape[3] // 2]
        sample["image_flags"] = np.zeros_like(sample["image_flags"])
        keep = sample["input_ids"][0] != reference.model.img_context_token_id
        sample["input_ids"], sample["labels"] = (sample[key][:, keep] for key in ("input_ids", "labels"))

    def build():
        model = InternVLChatModel(reference.model.config)
        model.img_context_token_id = reference.model.img_context_token_id
        model.train()
        return model(**sample).loss

    found = programmed(build)
    assert not (bad := forbidden(found)), report(bad)
    assert {("matmul_grad", "bfloat16"), ("softmax_grad", "float32"), ("embedding_grad", "bfloat16")} <= found


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "gpt_oss", "internlm3", "flash"])
def test_chats_of_internvl3(family):
    """Pictures, a second round, text, a batch; experts, sinks, sliding windows, the router of tiles."""
    reference = internvl3.load(family)

    def run(model):
        for chat in reference.expected["chats"][:3]:
            history = [tuple(turn) for turn in chat["history"] or []] or None
            pixels, counts = internvl3.pictures(reference, chat), chat["num_patches_list"]
            options = {"max_new_tokens": 3}
            model.chat(reference.tokenizer, pixels, chat["question"], options, history, num_patches_list=counts)
        model.batch_chat(reference.tokenizer, None, ["Hi", "Who is it?"], {"max_new_tokens": 2})

    found = executed(run, copy_of(reference))
    assert not (bad := forbidden(found)), report(bad)
    assert ("topk", "float32") in found or reference.model.config.llm_config.experts is None


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "gpt_oss", "internlm3", "qwen2_vit6b"])
def test_training_of_internvl3(family, monkeypatch):
    """A step as executed, then its gradients, with the balance loss where there are experts."""
    reference = internvl3.load(family)
    train = reference.expected["train"]
    batch = {key: np.array(train[key]) for key in ("input_ids", "attention_mask", "labels")}

    def run(model):
        model.train()
        model.config.llm_config.output_router_logits = True
        model(**batch).loss.backward()

    kept = reference.model.config.llm_config.output_router_logits
    try:
        found = executed(run, copy_of(reference))
        # Which experts is decided on the host, where a program that is only built has nothing.
        count = reference.model.config.llm_config.experts and reference.model.config.llm_config.experts.count
        monkeypatch.setattr(experts, "on_host", lambda chosen: np.arange(np.prod(chosen.shape)).reshape(chosen.shape) % count)

        def build():
            model = InternVLChatModel(reference.model.config)
            model.train()
            return model(**batch).loss

        found |= programmed(build)
    finally:
        reference.model.config.llm_config.output_router_logits = kept
    assert not (bad := forbidden(found)), report(bad)
    assert {("matmul_grad", "bfloat16"), ("softmax_grad", "float32")} <= found


def test_an_operator_outside_the_list_is_found():
    """The recordings see what they claim to see."""
    layer = paddle.nn.Linear(3, 3)
    x = np.ones([2, 3], "float32")

    def run(model):
        y = model(paddle.to_tensor(x).astype(model.weight.dtype))
        paddle.nn.functional.interpolate((y - 1.5 * y).astype("float32").reshape([1, 1, 2, 3]), scale_factor=2, mode="bicubic")

    assert {("subtract", "bfloat16"), ("bicubic_interp", "float32")} == forbidden(executed(run, layer))
    assert ("matmul", "bfloat16") in executed(run, layer)

    def build():
        weight = paddle.static.create_parameter([3, 3], "float64")
        return paddle.sin(weight).astype("float32").cumsum(0).sum()

    assert {("cumsum", "float32"), ("cumsum_grad", "float32")} <= forbidden(programmed(build))


def test_every_listed_operator_has_a_check():
    """What is allowed here is what tools/npu/check.py tries on a card."""
    lists = allowed()
    assert set(cases()) == lists["bfloat16"] | lists["float32"]


@pytest.mark.parametrize("grid", [(12, 10), (32, 16), (5, 30), (16, 11)])
def test_interpolation_by_matrices_is_that_of_paddle(grid):
    x = np.random.default_rng(0).standard_normal([1, 3, 16, 11]).astype("float32")
    expected = paddle.nn.functional.interpolate(paddle.to_tensor(x), size=list(grid), mode="bicubic", align_corners=False)
    rows, columns = bicubic_weights(16, grid[0]), bicubic_weights(11, grid[1])
    assert_close(rows @ x @ columns.T, expected, 1e-5)
