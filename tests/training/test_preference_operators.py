"""A step of MPO, and one on weights in few bits, computes with nothing that Ascend lacks.

As tests/test_operators.py, which tells how this is found out.
"""

import numpy as np
import paddle
import pytest

from paddlemix.datasets.preference import PairCollator
from paddlemix.models.blocks.layers import Linear
from paddlemix.models.blocks.quantising import QuantisedLinear
from paddlemix.training.arguments import PreTrainingArguments
from paddlemix.training.optimizer import Optimizer
from paddlemix.training.preference import LOSS_TYPES, PreferenceLoss, PreferenceObjective, Reference
from tests.test_operators import executed, forbidden, programmed, report
from tests.training.test_preference import batch, policy

WEIGHTS = dict.fromkeys(LOSS_TYPES, 0.25)


@pytest.fixture(autouse=True)
def without_the_kernels_of_cpus(monkeypatch):
    monkeypatch.setenv("PADDLEMIX_KERNELS", "plain")


def test_a_step_of_all_losses():
    data = PairCollator()(batch())

    def run(model):
        work = PreferenceObjective(PreferenceLoss(0.1, WEIGHTS, label_smoothing=0.1), Reference(model))
        optimizer = Optimizer(dict(model.named_parameters()), PreTrainingArguments(output_dir="unused"))
        work.loss(model, data, work.weights(data)).backward()
        optimizer.accumulate()
        optimizer.step(1e-4)

    found = executed(run, policy()[0])
    assert not (bad := forbidden(found)), report(bad)
    assert {("matmul", "bfloat16"), ("adamw", "float32"), ("log_softmax", "float32")} <= found


def test_products_with_weights_in_few_bits():
    """Forward and backward of :class:`QuantisedLinear`, whose gradient is a product as its result is."""
    layer = QuantisedLinear(Linear(96, 32), 4)
    layer.take(np.random.default_rng(0).normal(size=(32, 96)).astype("float32"))

    def run(model):
        x = paddle.ones([2, 96], model.weight.dtype)
        x.stop_gradient = False
        gradient = paddle.ones([2, 32], x.dtype)
        layer(x).astype(x.dtype).backward(gradient)
        assert x.grad.dtype == x.dtype

    layer.bias = None
    found = executed(run, Linear(96, 32))
    assert not (bad := forbidden(found)), report(bad)
    assert {("matmul", "bfloat16"), ("multiply", "float32"), ("cast", "integer")} <= found


def test_gradients_of_all_losses():
    """Of the losses alone, whose arguments are a few numbers in float32; what gives these is in tests/test_operators.py."""

    def build():
        chosen, rejected = (paddle.static.create_parameter([4], "float32") for _ in range(2))
        loss = PreferenceLoss(0.1, WEIGHTS, label_smoothing=0.1)
        parts = [getattr(loss, f"_{name}")(chosen, rejected, update=False) for name in ("sigmoid", "bco_pair", "ipo")]
        return sum(parts[1:], parts[0]).sum()

    found = programmed(build)
    assert not (bad := forbidden(found)), report(bad)
    assert ("log_softmax_grad", "float32") in found
