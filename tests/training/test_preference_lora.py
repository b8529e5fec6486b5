"""With LoRA the reference is the policy without its new adapters: it equals a model of its own, and costs a copy of what learns."""

import numpy as np
import paddle
import pytest

from paddlemix.datasets.preference import PairCollator
from paddlemix.models.blocks.inputs import pixel_tensor
from paddlemix.models.blocks.lora import merge_lora, wrap_llm_lora
from paddlemix.models.internvl2 import InternVLChatModel, load_tokenizer
from paddlemix.training.preference import PreferenceLoss, PreferenceObjective, Reference, log_probabilities
from tests.training.test_preference import CHECKPOINT, batch


def load(adapters=False, trained=False):
    """The start: plain, or with adapters, which have learned something already if ``trained``; the projector learns too."""
    model = InternVLChatModel.from_pretrained(CHECKPOINT, dtype="float32", engine="eager")
    model.set_tokenizer(load_tokenizer(CHECKPOINT))
    if adapters:
        wrap_llm_lora(model, 4, dropout=0.0)
    rng = np.random.default_rng(5)
    for name, parameter in model.named_parameters():
        parameter.stop_gradient = not (".lora_" in name or name.startswith("mlp1."))
        if trained and ".lora_" in name:
            parameter.set_value(rng.normal(0, 0.05, parameter.shape).astype("float32"))
    return model


@paddle.no_grad()
def looked_at(model, data):
    model.eval()
    return log_probabilities(model, data, pixel_tensor(data["pixel_values"]))[0].numpy()


@pytest.mark.parametrize("trained", [False, True])
def test_adapters_off_equal_a_separate_reference(trained):
    """After steps that move the policy away: new adapters are off, those that the start had are part of the reference."""
    model, data = load(adapters=True, trained=trained), PairCollator()(batch())
    if trained:
        separate = load(adapters=True, trained=True)
        merge_lora(separate)  # plain weights, and no adapters that could be switched
    else:
        separate = load()
    expected, pairs = looked_at(separate, data), data["pairs"]
    reference = Reference(model)
    work = PreferenceObjective(PreferenceLoss(), reference)
    learned = [p for p in model.parameters() if not p.stop_gradient]
    adamw = paddle.optimizer.AdamW(5e-3, parameters=learned, weight_decay=0.0)
    for _ in range(3):
        work.loss(model, data, work.weights(data)).backward()
        adamw.step()
        adamw.clear_grad()
    with reference.in_place():
        found = looked_at(model, data)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-4)
    assert np.abs(looked_at(model, data) - expected).max() > 0.5  # the policy is elsewhere
    losses = []
    for base in (reference, lambda _: (expected[:pairs], expected[pairs:])):
        work = PreferenceObjective(PreferenceLoss(), base)
        losses.append(float(work.loss(model, data, work.weights(data))))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_copy_is_of_what_learns_alone():
    model = load(adapters=True)
    reference = Reference(model)
    names = {name for name, parameter in model.named_parameters() if not parameter.stop_gradient}
    assert reference._start.keys() == names
    assert sum(value.size for value in reference._start.values()) < 0.25 * sum(p.size for p in model.parameters())
    assert reference.shares_vision
