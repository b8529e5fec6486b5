"""Training against the original's numbers, and against itself computed in other ways."""

import math

import numpy as np
import paddle
import pytest

from paddlemix.errors import ConfigError, TrainingError
from paddlemix.kernels import gemm
from paddlemix.models.internvl2.checkpoint import weight_table
from paddlemix.training.arguments import PreTrainingArguments
from paddlemix.training.objective import CausalObjective
from paddlemix.training.optimizer import Optimizer
from paddlemix.training.trainer import BatchStats, learning_rate
from tests.conftest import FAMILIES, assert_close, load_reference
from tests.training.helpers import assert_same, batch, fresh, gradients, train_sample, trainer


@pytest.fixture(params=["plain", "gemm"])
def products(request, monkeypatch):
    """Paddle's own products and attention, and those of ``kernels/gemm.py``, which such small models are not worth."""
    monkeypatch.setattr(gemm, "_SMALL", 0 if request.param == "gemm" else 10**12)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_all_parameters_equal_the_original(family, products):
    """Gradients of the fused weights, cut into the published tensors."""
    expected = load_reference(family).expected
    model, parameters = fresh(family, freeze_backbone=True)
    _, found = gradients(model, parameters, batch(train_sample(family, expected["adamw_sample"])))
    norms = {}
    for weight in weight_table(model.config):
        if weight.name in found:
            outputs = found[weight.name].T if weight.linear else found[weight.name]
            for part in weight.parts:
                norms[part.name] = np.linalg.norm(np.concatenate([outputs[o : o + n] for _, o, n in part.runs]))
    assert norms.keys() == expected["grad_norms"].keys()
    for name, norm in norms.items():
        assert norm == pytest.approx(expected["grad_norms"][name], rel=1e-4), name


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_of_adamw_steps_equal_the_original(family, products):
    expected = load_reference(family).expected
    setting = expected["adamw"]
    run = trainer(
        *fresh(family, freeze_backbone=True),
        decays=lambda name: True,
        learning_rate=setting["lr"],
        weight_decay=setting["weight_decay"],
        adam_epsilon=setting["eps"],
    )
    sample = batch(train_sample(family, expected["adamw_sample"]))
    losses = [run.step(number, [sample])[0] for number in range(len(setting["losses"]))]
    assert_close(losses, setting["losses"])


@pytest.mark.parametrize("family", FAMILIES)
def test_recompute_changes_memory_alone(family, products):
    """Also: it really computes every block twice, in both towers."""
    sample = batch(train_sample(family, load_reference(family).expected["adamw_sample"]))
    results, calls = {}, {}
    for recompute in (False, True):
        model, parameters = fresh(family, recompute)
        seen = calls[recompute] = []
        for layer in (model.vision_model.encoder.layers[0], model.language_model.model.layers[0]):
            layer.register_forward_pre_hook(lambda layer, _, seen=seen: seen.append(type(layer).__name__))
        results[recompute] = gradients(model, parameters, sample)
        assert len(results[recompute][1]) == len(list(model.parameters()))
    assert_same(results[True], results[False])
    assert sorted(calls[True]) == sorted(2 * calls[False])


def test_recompute_works_where_gradients_only_pass_through():
    model, parameters = fresh("qwen2", True, freeze_backbone=True, freeze_llm=True)
    seen = []
    model.language_model.model.layers[0].register_forward_pre_hook(lambda *_: seen.append(1))
    sample = batch(train_sample("qwen2", 1))
    result = gradients(model, parameters, sample)
    assert len(seen) == 2
    assert all(name.startswith("mlp1.") for name in result[1])
    assert_same(result, gradients(*fresh("qwen2", freeze_backbone=True, freeze_llm=True), sample))


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_and_packing_change_nothing(family, products):
    samples = [train_sample(family, number) for number in range(len(load_reference(family).expected["train_samples"]))]
    assert len({len(sample["input_ids"]) for sample in samples}) > 1
    model, parameters = fresh(family)
    alone = gradients(model, parameters, *(batch(sample) for sample in samples))
    assert_same(gradients(model, parameters, batch(*samples)), alone)
    assert_same(gradients(model, parameters, batch(*samples, packed=True)), alone)
    assert_same(gradients(model, parameters, batch(*samples, packed=True, tiles_per_row=40)), alone)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotary_scaling_is_by_the_length_of_each_sample(kind):
    """Samples on both sides of the length from which dynamic NTK and longrope scale, padded and packed."""
    samples = [train_sample("internlm2", number) for number in range(3)]
    shortest, *_, longest = sorted(len(sample["input_ids"]) for sample in samples)
    model, parameters = fresh("internlm2")
    llm = model.config.llm_config
    before = [gradients(model, parameters, batch(sample))[0] for sample in samples]
    if kind == "dynamic":
        llm.rope_scaling, llm.max_position_embeddings = {"type": "dynamic", "factor": 2.0}, shortest
    else:
        llm.rope_scaling = {
            "type": "longrope",
            "short_factor": [1.0] * (llm.head_dim // 2),
            "long_factor": np.linspace(1, 8, llm.head_dim // 2).tolist(),
        }
        llm.max_position_embeddings = shortest
    assert llm.rope_type == kind and shortest < longest
    alone = [gradients(model, parameters, batch(sample))[0] for sample in samples]
    scaled = [len(sample["input_ids"]) > shortest for sample in samples]
    assert [abs(a / b - 1) > 1e-5 for a, b in zip(alone, before)] == scaled
    together = gradients(model, parameters, *(batch(sample) for sample in samples))
    assert_same(gradients(model, parameters, batch(*samples)), together)
    assert_same(gradients(model, parameters, batch(*samples, packed=True)), together)


def test_long_losses_are_computed_in_parts():
    """More labels than fit into one part, against one large part."""
    from paddlemix.models.internvl2.modeling import chunked_causal_loss

    generator = np.random.default_rng(0)
    head = paddle.nn.Linear(8, 50, bias_attr=False)
    labels = np.where(generator.random([2, 40]) < 0.7, generator.integers(0, 50, [2, 40]), -100)
    weight = generator.random([2, 40]).astype("float32")
    found = []
    for chunk in (7, 1000):
        hidden = paddle.to_tensor(np.random.default_rng(1).normal(size=[2, 40, 8]).astype("float32"), stop_gradient=False)
        loss = chunked_causal_loss(head, hidden, labels, weight, chunk)
        loss.backward()
        found.append([loss.numpy(), hidden.grad.numpy(), head.weight.grad.numpy()])
        head.weight.clear_gradient()
    for parts, whole in zip(*found):
        assert_close(parts, whole, 1e-5)


@pytest.mark.parametrize("reduction", ["token", "sample", "square"])
def test_accumulation_weighs_labels_as_one_batch_would(reduction):
    samples = [train_sample("qwen2", number) for number in (0, 1, 2, 1)]
    together = trainer(*fresh("qwen2", freeze_backbone=True))
    apart = trainer(*fresh("qwen2", freeze_backbone=True))
    for number in range(3):
        one = together.step(number, [batch(*samples, loss_reduction=reduction)])
        parts = [batch(s, loss_reduction=reduction) for s in samples[:2]] + [batch(*samples[2:], loss_reduction=reduction)]
        four = apart.step(number, parts)
        assert four == pytest.approx(one, rel=1e-5)

    losses, counts = [], []
    for sample in samples:
        model, parameters = fresh("qwen2", freeze_backbone=True)
        losses.append(gradients(model, parameters, batch(sample))[0])
        counts.append((sample["labels"] >= 0).sum())
    weights = {"token": counts, "sample": np.ones(4), "square": np.sqrt(counts)}[reduction]
    first = trainer(*fresh("qwen2", freeze_backbone=True)).step(0, [batch(*samples, loss_reduction=reduction)])[0]
    assert first == pytest.approx(np.average(losses, weights=weights), rel=1e-5)


def test_a_batch_without_pictures_trains_beside_others():
    """Two samples in one step, of which one has no picture at all."""
    with_picture, text = train_sample("qwen2", 1), train_sample("qwen2", 2)
    text["input_ids"], text["labels"] = text["input_ids"].copy(), text["labels"].copy()
    context = load_reference("qwen2").model.img_context_token_id
    keep = text["input_ids"] != context
    text.update(input_ids=text["input_ids"][keep], labels=text["labels"][keep], pixel_values=text["pixel_values"][:0])
    text["image_flags"] = text["image_flags"][:0]
    model, parameters = fresh("qwen2")
    assert "pixel_values" not in batch(text)
    assert_same(
        gradients(model, parameters, batch(with_picture), batch(text)), gradients(model, parameters, batch(with_picture, text))
    )


def test_a_loss_that_is_no_number_names_step_and_samples_and_changes_nothing():
    model, parameters = fresh("qwen2", freeze_backbone=True)
    run = trainer(model, parameters)
    before = {name: p.numpy() for name, p in parameters.items()}
    bad = train_sample("qwen2", 1)
    bad["name"] = "broken.jsonl:7"
    calls = []
    hook = model.mlp1.register_forward_post_hook(lambda *a: calls.append(1) or (a[-1] * math.nan if len(calls) == 2 else a[-1]))
    with pytest.raises(TrainingError, match=r"step 5: the loss is nan; its samples are broken\.jsonl:7:"):
        run.step(4, [batch(train_sample("qwen2", 0)), batch(bad)])
    hook.remove()
    assert all(np.array_equal(before[name], p.numpy()) for name, p in parameters.items())
    loss, norm, _ = run.step(4, [batch(train_sample("qwen2", 0))])
    assert math.isfinite(loss) and math.isfinite(norm)


def test_gradients_that_are_not_finite_are_told_and_not_used():
    model, parameters = fresh("qwen2", freeze_backbone=True)
    run = trainer(model, parameters)
    before = model.language_model.lm_head.weight.numpy()
    model.mlp1["3"].weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(TrainingError, match=r"step 1: the gradients are not finite; its samples are qwen2:1"):
        run.step(0, [batch(train_sample("qwen2", 1))])
    assert np.array_equal(before, model.language_model.lm_head.weight.numpy())


def test_statistics_of_a_batch():
    samples = [train_sample("qwen2", number) for number in (0, 1)]
    lengths = [len(sample["input_ids"]) for sample in samples]
    labelled = sum(int((sample["labels"] >= 0).sum()) for sample in samples)
    for data in (batch(*samples), batch(*samples, packed=True)):
        stats = BatchStats(data)
        assert sorted(stats.segments) == sorted(lengths)
        assert stats.labels == CausalObjective().weights(data)[0] == labelled
    assert BatchStats(batch(*samples)).places == 2 * max(lengths)
    assert BatchStats(batch(*samples, packed=True)).places == sum(lengths)
    assert BatchStats(batch(*samples, packed=True, tiles_per_row=40)).tiles == 40


@pytest.mark.parametrize(
    "kind, settings, expected",
    [
        ("linear", {}, [1.0, 0.75, 0.5, 0.25, 0.0]),
        ("cosine", {}, [1.0, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125), 0.0]),
        ("constant", {"warmup_steps": 2}, [1.0] * 5),
        ("constant_with_warmup", {"warmup_steps": 2}, [0.0, 0.5, 1.0, 1.0, 1.0]),
        ("linear", {"warmup_ratio": 0.5}, [0.0, 0.5, 1.0, 0.5, 0.0]),
        ("polynomial", {"lr_end": 0.2, "power": 2.0}, [1.0, 0.65, 0.4, 0.25, 0.2]),
    ],
)
def test_learning_rates(kind, settings, expected):
    args = PreTrainingArguments(output_dir="x", learning_rate=1.0, lr_scheduler_type=kind, **settings)
    assert [learning_rate(step, 4, args) for step in range(5)] == pytest.approx(expected)


# ---------------------------------------------------------------------- the optimiser


def _linear(dtype="float32"):
    paddle.seed(0)
    layer = paddle.nn.Linear(6, 5)
    layer.to(dtype=dtype)
    return layer


def test_optimiser_is_paddles_with_clipping_and_decay_of_weights():
    args = PreTrainingArguments(output_dir="x", weight_decay=0.1, max_grad_norm=0.5)
    ours, theirs = _linear(), _linear()
    optimizer = Optimizer(dict(ours.named_parameters()), args)
    reference = paddle.optimizer.AdamW(
        0.01,
        parameters=theirs.parameters(),
        weight_decay=0.1,
        apply_decay_param_fun=lambda name: name == theirs.weight.name,
        grad_clip=paddle.nn.ClipGradByGlobalNorm(0.5),
    )
    for step in range(4):
        x = paddle.to_tensor(np.random.default_rng(step).normal(size=[3, 6]).astype("float32"))
        (ours(x) ** 2).sum().backward()
        optimizer.accumulate()
        assert optimizer.step(0.01) > 0.5
        (theirs(x) ** 2).sum().backward()
        reference.step()
        reference.clear_grad()
    assert_close(ours.weight, theirs.weight, 1e-6)
    assert_close(ours.bias, theirs.bias, 1e-5)


def _toy_gradients(layer, step):
    """Gradients without products, which CPU has in float32 only."""
    for p in layer.parameters():
        factor = paddle.to_tensor(np.random.default_rng(step).normal(size=p.shape).astype("float32")).astype(p.dtype)
        (p * factor).sum().backward()


@pytest.mark.parametrize("master_grad", [False, True])
def test_half_precision_weights_have_float32_masters(master_grad):
    """Updates far smaller than bfloat16 can add must not be lost."""
    args = PreTrainingArguments(output_dir="x", max_grad_norm=0.0, amp_master_grad=master_grad)
    half, full = _linear("bfloat16"), _linear()
    start = half.weight.astype("float32").numpy()
    for p, q in zip(full.parameters(), half.parameters()):
        p.set_value(q.astype("float32"))
    coarse, exact = (Optimizer(dict(layer.named_parameters()), args) for layer in (half, full))
    for step in range(20):
        for optimizer, layer in ((coarse, half), (exact, full)):
            for _ in range(2):
                _toy_gradients(layer, step)
                optimizer.accumulate()
            optimizer.step(1e-4)
    assert half.weight.dtype == paddle.bfloat16
    moved = full.weight.numpy() - start
    assert np.abs(moved).max() > 5e-4
    assert_close(coarse.masters["weight"].numpy() - start, moved, 0.05)
    assert np.array_equal(
        half.weight.astype("float32").numpy(), coarse.masters["weight"].astype("bfloat16").astype("float32").numpy()
    )


def test_states_make_another_optimiser_the_same():
    args = PreTrainingArguments(output_dir="x", weight_decay=0.1)
    for dtype in ("float32", "bfloat16"):
        layer, again = _linear(dtype), _linear(dtype)
        optimizer = Optimizer(dict(layer.named_parameters()), args)
        for step in range(5):
            if step == 3:
                again.set_state_dict(layer.state_dict())
                resumed = Optimizer(dict(again.named_parameters()), args)
                resumed.load_state(optimizer.state())
            _toy_gradients(layer, step)
            optimizer.step(0.01)
            if step >= 3:
                _toy_gradients(again, step)
                resumed.step(0.01)
        for p, q in zip(layer.parameters(), again.parameters()):
            assert np.array_equal(p.astype("float32").numpy(), q.astype("float32").numpy())


def test_loss_scale_falls_on_overflow_and_the_step_is_left_out():
    args = PreTrainingArguments(output_dir="x", max_grad_norm=0.0)
    layer, plain = _linear(), _linear()
    scaled, unscaled = (Optimizer(dict(l.named_parameters()), args) for l in (layer, plain))
    scaled.loss_scale, scaled._dynamic = 1024.0, True  # as on a device that computes in float16
    before = layer.weight.numpy()
    (layer.weight.sum() * float("inf")).backward()
    assert math.isnan(scaled.step(0.01)) and scaled.loss_scale == 512.0
    assert np.array_equal(before, layer.weight.numpy())
    x = paddle.ones([3, 6])
    ((layer(x) ** 2).sum() * scaled.loss_scale).backward()
    (plain(x) ** 2).sum().backward()
    assert scaled.step(0.01) == pytest.approx(unscaled.step(0.01), rel=1e-5)
    assert_close(layer.weight, plain.weight, 1e-6)


def test_nothing_to_train_is_refused():
    with pytest.raises(ConfigError, match="nothing is left to train"):
        fresh("qwen2", freeze_backbone=True, freeze_llm=True, freeze_mlp=True)
