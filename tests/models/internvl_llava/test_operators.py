"""InternVL-Chat-LLaVA computes with nothing that Ascend lacks; tests/test_operators.py tells how this is found out."""

import numpy as np
import pytest

from paddlemix.datasets.internvl_llava import LlavaEncoder
from paddlemix.datasets.records import Record
from paddlemix.models.internvl_llava import LlavaForCausalLM
from paddlemix.training.arguments import PreTrainingArguments
from paddlemix.training.optimizer import Optimizer
from tests.models.internvl_llava.helpers import CHAT, EXPECTED, IMAGES, TOWER, model, pixels_of, tokenizer
from tests.test_operators import executed, forbidden, programmed, report


@pytest.fixture(autouse=True)
def without_the_kernels_of_cpus(monkeypatch):
    monkeypatch.setenv("PADDLEMIX_KERNELS", "plain")


def sample():
    """A training sample with a picture, as arguments of the model."""
    record = EXPECTED["train_samples"]["v1"][0]["record"]
    encoder = LlavaEncoder(tokenizer(), "v1", model().image_size, EXPECTED["num_image_token"], aspect_ratio="pad")
    found = encoder.encode(Record(record["conversations"], (str(IMAGES / record["image"]),)))
    return {name: found[name][None] if name in ("input_ids", "labels") else found[name] for name in ARGUMENTS}


ARGUMENTS = ("input_ids", "labels", "pixel_values", "image_flags")


def learning(own):
    """``own`` as the second stage trains it: all but the tower learns."""
    for parameter in own.vision_model.parameters():
        parameter.stop_gradient = True
    own.train()
    return own


def test_chats():
    chats = [EXPECTED["chats"][i] for i in (0, 3, 5)]

    def run(own):
        own.eval()
        for chat, more in zip(chats, ({}, {"do_sample": True, "top_p": 0.7}, {"num_beams": 2})):
            own.chat(tokenizer(), pixels_of(chat), chat["messages"], {"max_new_tokens": 4, **more}, chat["template"])
        own.batch_chat(tokenizer(), pixels_of(chats[0]), ["<image>\nWhat?", "Who?"], {"max_new_tokens": 4}, [[1], []])

    found = executed(run, LlavaForCausalLM.from_pretrained(CHAT, vision_tower=TOWER, engine="eager"))
    assert not (bad := forbidden(found)), report(bad)
    assert {("matmul", "bfloat16"), ("softmax", "float32")} <= found


def test_a_step_of_training():
    values = sample()

    def run(own):
        learning(own)
        named = {name: parameter for name, parameter in own.named_parameters() if not parameter.stop_gradient}
        optimizer = Optimizer(named, PreTrainingArguments(output_dir="unused"))
        own(**values).loss.backward()
        optimizer.accumulate()
        optimizer.step(1e-4)

    found = executed(run, LlavaForCausalLM.from_pretrained(CHAT, vision_tower=TOWER, engine="eager"))
    assert not (bad := forbidden(found)), report(bad)
    assert {("adamw", "float32"), ("cross_entropy_with_softmax", "float32")} <= found


def test_gradients():
    values = sample()
    found = programmed(lambda: learning(LlavaForCausalLM(model().config))(**values).loss)
    assert not (bad := forbidden(found)), report(bad)
    assert {("matmul_grad", "bfloat16"), ("gelu_grad", "bfloat16"), ("embedding_grad", "bfloat16")} <= found
    assert np.isin(values["input_ids"], -200).sum() == EXPECTED["num_image_token"]
