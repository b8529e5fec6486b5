"""What processes send each other while they compute: as much as theory says, the same results, and sooner over a slow link."""

import re

import pytest

from paddlemix.models.internvl2 import InternVLChatModel
from paddlemix.models.internvl2.configuration import InternVLChatConfig
from tests.training.test_distributed import run_two

pytestmark = pytest.mark.slow

PROGRAM = """
import sys, time
import numpy as np
import paddle
from paddlemix.models.internvl2 import InternVLChatModel
from paddlemix.parallel.groups import Group
from paddlemix.training.arguments import ModelArguments, PreTrainingArguments
from paddlemix.training.building import prepare
from paddlemix.training.processes import Processes
from paddlemix.training.trainer import Trainer

processes = Processes()
args = PreTrainingArguments(
    output_dir="x", sharding={stage!r}, lr_scheduler_type="constant", learning_rate=1e-4, overlap_communication={overlap}
)
model = InternVLChatModel.from_pretrained({folder!r}, "float32", "eager")
model.img_context_token_id, tiles, tokens = 7, 2, {tokens}
trainer = Trainer(model, prepare(model, ModelArguments("x", freeze_backbone=True), args.recompute), args, processes, 9)
rng = np.random.default_rng(processes.rank)
ids = rng.integers(10, 400, (1, tokens))
ids[0, 5 : 5 + 16 * tiles] = 7
batch = dict(pixel_values=rng.normal(size=(tiles, 3, 112, 112)).astype("float32"), input_ids=ids, labels=ids, names=[])
batch["attention_mask"] = np.ones_like(ids)
group, losses, number = processes.data, [], 0

def steps(count):
    global number
    began = time.perf_counter()
    for _ in range(count):
        losses.append(trainer.step(number, [batch])[0])
        number += 1
    trainer.optimizer.arrive()
    return (time.perf_counter() - began) / count

steps(2)
group.bytes.clear()
seconds = steps(2)
sent = dict(group.bytes)
trained = 4 * sum(p.size for p in trainer.optimizer.parameters.values())
blocks = 4 * sum(p.size for layer in model.language_model.model.layers for p in layer.parameters())
tower = 4 * sum(p.size for layer in model.vision_model.encoder.layers for p in layer.parameters())
everything = 4 * sum(p.size for p in model.parameters())
if {slow}:
    bandwidth = sum(sent.values()) / 2 / seconds  # the link takes as long as the computation
    plain = Group._now
    def slowed(self, name, tensor, *more):
        time.sleep(tensor.size * tensor.element_size() / bandwidth)
        plain(self, name, tensor, *more)
    Group._now = slowed
    steps(1)
    seconds = steps(5)
print("@", sent.get("reduce", 0) / 2, sent.get("broadcast", 0) / 2, sent.get("all_reduce", 0) / 2, trained, blocks, tower,
      everything, seconds, *losses[:4], flush=True)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    vision = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, image_size=112)
    vision.update(qkv_bias=True, qk_normalization=False, norm_type="layer_norm")
    llm = dict(architectures=["Qwen2ForCausalLM"], vocab_size=500, hidden_size=256, intermediate_size=768)
    llm.update(num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=2)
    config = InternVLChatConfig.from_dict({"vision_config": vision, "llm_config": llm, "ps_version": "v2"})
    path = tmp_path_factory.mktemp("overlap") / "model"
    InternVLChatModel(config).save_pretrained(str(path))
    return str(path)


def run(tmp_path, **given):
    script = tmp_path / "overlap.py"
    script.write_text(PROGRAM.format(**given))
    said = run_two(tmp_path, script=str(script))
    rows = [list(map(float, line.split())) for line in re.findall(r"^@ (.+)$", said, re.MULTILINE)]
    assert len(rows) >= 2
    return rows[0]


@pytest.mark.parametrize("stage", ["", "stage1", "stage2", "stage3"])
def test_nothing_is_sent_twice_and_losses_are_equal(tmp_path, folder, stage):
    rows = [run(tmp_path, folder=folder, stage=stage, overlap=overlap, tokens=96, slow=False) for overlap in (True, False)]
    assert rows[0][8:] == pytest.approx(rows[1][8:], rel=1e-6)
    for reduced, broadcast, summed, trained, blocks, tower, everything, *_ in rows:
        few = 4096  # numbers that all processes sum
        if stage == "":
            assert trained <= summed <= trained + few and reduced == broadcast == 0
        else:
            assert reduced == trained and summed <= few
            outside = everything - blocks - tower
            assert broadcast == (trained if stage != "stage3" else 2 * blocks + tower + outside)


@pytest.mark.parametrize("stage", ["stage1", "stage3"])
def test_over_a_slow_link_a_step_takes_seven_tenths_at_most(tmp_path, folder, stage):
    """The link's delay is a sleep, as long in a step as the computation takes."""
    times = [run(tmp_path, folder=folder, stage=stage, overlap=overlap, tokens=256, slow=True)[7] for overlap in (True, False)]
    print({"stage": stage, "with": times[0], "without": times[1]})
    assert times[0] <= 0.7 * times[1], times
