"""A vision tower that does not learn computes as in the engine."""

import copy

import numpy as np
import paddle
import pytest

from paddlemix.kernels import cpu
from paddlemix.models.blocks import engine
from paddlemix.models.internvl2 import InternVLChatModel
from paddlemix.training.arguments import ModelArguments
from paddlemix.training.building import prepare
from tests.conftest import load_reference, tiles
from tests.test_operators import sample_of

pytestmark = pytest.mark.skipif(not cpu.available("float32"), reason="there are no CPU kernels here")


def copy_of(reference):
    """The model, with a configuration of its own, into which adapters are written."""
    model = InternVLChatModel(copy.deepcopy(reference.model.config))
    model.set_state_dict(reference.model.state_dict())
    model.set_tokenizer(reference.tokenizer)
    return model


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(engine, "_WORTH_COMPILING", 0)


@pytest.mark.parametrize("family", ["qwen2", "llama_vit6b"])
def test_losses_and_gradients_stay(small, family):
    reference, found = load_reference(family), []
    for fused in (False, True):
        model = copy_of(reference)
        prepare(model, ModelArguments("x", freeze_backbone=True), False)
        if fused:
            engine.fuse_frozen_tower(model, "float32")
            assert len(model.vision_model.encoder.fused) == len(model.vision_model.encoder.layers)
        names = [name for name, _ in model.named_parameters()]
        loss = model(**sample_of(reference)).loss
        loss.backward()
        features = model.vision_model(paddle.to_tensor(tiles(1)), reference.model.config.select_layer).numpy()
        found.append((names, features, float(loss), model.language_model.model.norm.weight.grad.numpy()))
    (plain_names, *plain), (names, *fused) = found
    assert names == plain_names
    for a, b in zip(plain, fused):
        assert np.abs(np.subtract(a, b)).max() < 1e-4 * np.abs(a).max()


@pytest.mark.parametrize("arguments", [dict(freeze_backbone=False), dict(unfreeze_vit_layers=-1), dict(use_backbone_lora=2)])
def test_towers_that_learn_stay_as_they_are(small, arguments):
    model = copy_of(load_reference("qwen2"))
    prepare(model, ModelArguments("x", **{"freeze_backbone": True, **arguments}), False)
    engine.fuse_frozen_tower(model, "float32")
    assert model.vision_model.encoder.fused is None


def test_small_towers_stay_as_they_are():
    model = copy_of(load_reference("qwen2"))
    prepare(model, ModelArguments("x", freeze_backbone=True), False)
    engine.fuse_frozen_tower(model, "float32")
    assert model.vision_model.encoder.fused is None
