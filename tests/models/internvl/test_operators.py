"""InternVL-C and -G compute with nothing that Ascend lacks: as tests/test_operators.py, which tells how this is found out."""

import numpy as np
import paddle
import pytest

from paddlemix.models.internvl import InternVLModel
from paddlemix.training.arguments import PreTrainingArguments
from paddlemix.training.optimizer import Optimizer
from tests.models.internvl.helpers import fresh, load, loss_inputs, retrieval_inputs
from tests.test_operators import executed, forbidden, programmed, report


@pytest.fixture(autouse=True)
def without_the_kernels_of_cpus(monkeypatch):
    monkeypatch.setenv("PADDLEMIX_KERNELS", "plain")


def _losses(model):
    ids = load().expected["retrieval_loss"]["shared"]["image_ids"]
    return model.loss(**loss_inputs()).loss, model.retrieval_loss(**retrieval_inputs(ids)).loss


def test_features_and_captions():
    pixels, expected = load().arrays["pixels_retrieval"], load().expected
    prompt = np.tile(expected["caption_prompt_ids"], [4, 1])

    @paddle.no_grad()
    def run(model):
        model.eval()
        for mode in ("InternVL-C", "InternVL-G"):
            model(pixels, np.array(expected["text_ids"]), mode)
        for beams in (1, 3):
            model.generate(pixels, prompt, num_beams=beams, max_new_tokens=4)

    found = executed(run, fresh())
    assert not (bad := forbidden(found)), report(bad)
    assert ("matmul", "bfloat16") in found


def test_a_step_of_training():
    def run(model):
        model.train()
        optimizer = Optimizer(dict(model.named_parameters()), PreTrainingArguments(output_dir="unused"))
        for loss in _losses(model):
            loss.backward()
            optimizer.accumulate()
        optimizer.step(1e-4)

    found = executed(run, fresh())
    assert not (bad := forbidden(found)), report(bad)
    assert {("adamw", "float32"), ("cross_entropy_with_softmax", "float32")} <= found


@pytest.mark.slow
def test_gradients():
    def build():
        model = InternVLModel(load().model.config)
        model.train()
        first, second = _losses(model)
        return first + second

    found = programmed(build)
    assert not (bad := forbidden(found)), report(bad)
    assert ("matmul_grad", "bfloat16") in found
