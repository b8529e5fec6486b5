"""The plan of a run against real models, against Paddle's allocation counters, and against arithmetic by hand."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import paddle
import pytest
from paddle.base import core

from paddlemix.models.blocks.language import LanguageModel
from paddlemix.models.blocks.lora import wrap_backbone_lora, wrap_llm_lora
from paddlemix.models.blocks.quantising import prepare_adapted, settle
from paddlemix.models.blocks.vision import InternVisionModel
from paddlemix.models.internvl2 import InternVLChatModel
from paddlemix.models.internvl2.configuration import InternVLChatConfig
from paddlemix.models.internvl2.modeling import count_parameters
from paddlemix.training import plan, plan_table, published
from paddlemix.training.arguments import DataTrainingArguments, ModelArguments, PreTrainingArguments
from paddlemix.training.building import train_mode
from paddlemix.training.optimizer import Optimizer
from paddlemix.training.plan import Batch
from tests.conftest import FAMILIES, load_reference

# Billions of parameters on the model cards, the token embedding and the output head both counted.
CARDS = {
    "InternVL2-1B": 0.94,
    "InternVL2-2B": 2.2,
    "InternVL2-4B": 4.2,
    "InternVL2-8B": 8.1,
    "InternVL2-26B": 25.5,
    "InternVL2-40B": 40.1,
    "InternVL2_5-38B": 38.4,
    "InternVL2_5-78B": 78.4,
}


def arguments(**train):
    return PreTrainingArguments(output_dir=".", **train)


@pytest.fixture(autouse=True)
def plain_kernels(monkeypatch):
    """The plan counts what plain operators keep; those of kernels/gemm.py keep less."""
    monkeypatch.setenv("PADDLEMIX_KERNELS", "plain")


@pytest.mark.parametrize("family", FAMILIES)
def test_counts_are_those_of_a_real_model(family):
    config = InternVLChatConfig.from_pretrained(str(load_reference(family).path))
    counts = plan.parameters(config, ModelArguments(model_name_or_path="x"))
    assert {name: size for name, (size, _) in counts.items()} == {
        name: p.size for name, p in load_reference(family).model.state_dict().items()
    }
    assert all(learned for _, learned in counts.values())

    model = InternVLChatModel.from_pretrained(str(load_reference(family).path), dtype="float32")
    wrap_llm_lora(model, 4)
    wrap_backbone_lora(model, 2)
    counts = plan.parameters(config, ModelArguments("x", use_llm_lora=4, use_backbone_lora=2))
    state = {name: (p.size, not p.stop_gradient) for name, p in model.state_dict().items()}
    assert counts == state


def test_freezing():
    config = load_reference("qwen2").model.config
    depth = config.vision_config.num_hidden_layers

    def trained(**flags):
        return {name for name, (_, learned) in plan.parameters(config, ModelArguments("x", **flags)).items() if learned}

    frozen = dict(freeze_llm=True, freeze_mlp=True, freeze_backbone=True)
    assert trained(**frozen) == set()
    assert trained(**frozen, unfreeze_lm_head=True) == {"language_model.lm_head.weight"}
    assert trained(freeze_llm=True, freeze_backbone=True) == {f"mlp1.{i}.{kind}" for i in "013" for kind in ("weight", "bias")}
    assert {name.split(".")[3] for name in trained(**frozen, unfreeze_vit_layers=-1)} == {str(depth - 1)}
    assert {name.split(".")[3] for name in trained(**frozen, unfreeze_vit_layers=1)} == {str(i) for i in range(1, depth)}
    assert all(".lora_" in name for name in trained(**frozen, use_llm_lora=4, use_backbone_lora=4))


@pytest.mark.parametrize("name", CARDS)
def test_published_sizes(name):
    counts = plan.parameters(published.published_config(name), ModelArguments("x"))
    assert sum(size for size, _ in counts.values()) / 1e9 == pytest.approx(CARDS[name], rel=0.02)


def test_memory_of_states_by_hand():
    config = load_reference("qwen2").model.config
    counts = {"a": (600, True), "b": (300, True), "c": (200, True), "d": (5000, False)}
    half = dict(bf16=True, fp16_opt_level="O2", amp_master_grad=True)

    def states(processes, **train):
        m = plan.memory(config, counts, arguments(**train), Batch(1, 8, 1), processes, True, True, 112)
        assert m.peak == m.weights + m.optimizer + m.gradients + max(m.activations, m.update)
        return m.weights, m.optimizer, m.gradients

    # float32: two moments of 1,100 values
    assert states(1) == (4 * 6100, 8 * 1100, 4 * 1100)
    # O1 keeps float32 weights
    assert states(1, bf16=True) == (4 * 6100, 8 * 1100, 4 * 1100)
    # O2: half weights, float32 masters, gradients in half and their float32 sums
    assert states(1, **half) == (2 * 6100, 12 * 1100, 6 * 1100)
    # stage 1 over two: a process owns a (600) or b and c (500)
    assert states(2, **half, sharding="stage1") == (2 * 6100, 12 * 600, 6 * 1100)
    assert states(2, **half, sharding="stage2") == (2 * 6100, 12 * 600, 2 * 1100 + 4 * 600)
    # sharding alone divides nothing
    assert states(1, **half, sharding="stage2") == states(1, **half)


def test_memory_of_divided_weights_by_hand():
    """Blocks 0 (600, trained) and that of the tower (400, frozen) are one process's, block 1 (300) and c (100) the other's."""
    first, second, tower = "language_model.model.layers.0.", "language_model.model.layers.1.", "vision_model.encoder.layers.0."
    counts = {first + "a": (600, True), second + "a": (300, True), tower + "b": (400, False), "mlp1.c": (100, True)}
    train = arguments(bf16=True, fp16_opt_level="O2", amp_master_grad=True, sharding="stage3")
    m = plan.memory(load_reference("qwen2").model.config, counts, train, Batch(1, 8, 1), 2, True, True, 112)
    # its own blocks, what is outside blocks, and the largest block; gradients outside, and of a block with a copy to be sent;
    # while these are computed the next block's weights come, and the last one's gradients leave
    assert (m.weights, m.gradients) == (2 * (1000 + 100 + 2 * 600), 2 * (100 + 3 * 600) + 4 * 600)
    train.overlap_communication = False
    m = plan.memory(load_reference("qwen2").model.config, counts, train, Batch(1, 8, 1), 2, True, True, 112)
    assert (m.weights, m.gradients) == (2 * (1000 + 100 + 600), 2 * (100 + 2 * 600) + 4 * 600)
    assert m.optimizer == 12 * 600 and train.recompute


def test_shares_are_about_equal():
    sizes = {name: p.size for name, p in load_reference("qwen2").model.named_parameters()}
    for processes in (1, 2, 3, 8):
        owners = plan.divide(sizes, processes)
        loads = [sum(size for name, size in sizes.items() if owners[name] == i) for i in range(processes)]
        assert sum(loads) == sum(sizes.values())
        assert max(loads) <= max(sum(sizes.values()) / processes * 1.05, max(sizes.values()))


def allocated(run):
    """Bytes that ``run()`` leaves allocated while its result is alive."""
    before = core.host_memory_stat_current_value("Allocated", 0)
    result = run()
    after = core.host_memory_stat_current_value("Allocated", 0)
    del result
    return after - before


def config_of_depth(depth, flavour):
    vision = dict(hidden_size=128, num_hidden_layers=depth, num_attention_heads=4, intermediate_size=512, image_size=112)
    if flavour == "300M":
        vision.update(qkv_bias=True, qk_normalization=False, norm_type="layer_norm")
    llm = dict(architectures=["LlamaForCausalLM"], vocab_size=64, hidden_size=128, intermediate_size=320)
    llm.update(num_hidden_layers=depth, num_attention_heads=4, num_key_value_heads=2)
    return InternVLChatConfig.from_dict({"vision_config": vision, "llm_config": llm})


def estimate(config, batch, recompute, frozen):
    counts = plan.parameters(config, ModelArguments("x"))
    return plan.memory(config, counts, arguments(recompute=recompute), batch, 1, False, frozen, 112).activations


@pytest.mark.parametrize("recompute", [False, True])
def test_activations_of_the_language_model_are_what_paddle_allocates(recompute):
    batch = Batch(rows=2, tokens=192, tiles=1)
    x = paddle.randn([batch.rows, batch.tokens, 128])
    x.stop_gradient = False
    measured, estimated = [], []
    for depth in (2, 6):
        config = config_of_depth(depth, "300M")
        model = LanguageModel(config.llm_config)
        model.train()
        model.model.enable_recompute = recompute
        model(x)  # the tables of positions and the mask
        measured.append(allocated(lambda model=model: model(x)))
        estimated.append(estimate(config, batch, recompute, frozen=True))
    # Vision, head and ends are the same in both: the difference is four blocks.
    assert estimated[1] - estimated[0] == pytest.approx(measured[1] - measured[0], rel=0.1)


@pytest.mark.parametrize("flavour", ["300M", "6B"])
@pytest.mark.parametrize("recompute", [False, True])
def test_activations_of_the_vision_tower_are_what_paddle_allocates(recompute, flavour):
    batch = Batch(rows=1, tokens=8, tiles=6)
    pixels = paddle.randn([batch.tiles, 3, 112, 112])
    measured, estimated = [], []
    for depth in (2, 6):
        config = config_of_depth(depth, flavour)
        model = InternVisionModel(config.vision_config)
        model.train()
        model.encoder.enable_recompute = recompute
        measured.append(allocated(lambda model=model: model(pixels)))
        # The language model of both has the same depth in the estimate, so that only the tower differs.
        config.llm_config.num_hidden_layers = 2
        estimated.append(estimate(config, batch, recompute, frozen=False))
    assert estimated[1] - estimated[0] == pytest.approx(measured[1] - measured[0], rel=0.1)


def peak_of_a_step(recompute, rank, tokens, load_4bit=False):
    """Peak bytes of two batches and an update of a small model, as Paddle counts them, and as planned."""
    v = dict(hidden_size=256, num_hidden_layers=2, num_attention_heads=4, intermediate_size=1024, image_size=224)
    v.update(qkv_bias=True, qk_normalization=False, norm_type="layer_norm")
    llm = dict(architectures=["Qwen2ForCausalLM"], vocab_size=8000, hidden_size=256, intermediate_size=768)
    llm.update(num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2)
    config = InternVLChatConfig.from_dict({"vision_config": v, "llm_config": llm, "ps_version": "v2"})
    model_args = ModelArguments(
        "x", freeze_backbone=True, freeze_llm=rank > 0, freeze_mlp=rank > 0, use_llm_lora=rank, load_4bit=load_4bit
    )
    args = arguments(recompute=recompute)
    with paddle.LazyGuard():
        model = InternVLChatModel(config)
    if load_4bit:
        prepare_adapted(model, "int4", "float32")
        for layer in model.quantised_layers.values():
            layer.take(np.random.default_rng(0).normal(size=(layer.out_features, layer.in_features)).astype("float32"))
        settle(model)
    for parameter in model.parameters():
        parameter.initialize()
    if rank:
        wrap_llm_lora(model, rank)
    for name, parameter in model.named_parameters():
        parameter.stop_gradient = not plan.learns(name, model_args, 2)
    train_mode(model)
    model.language_model.model.enable_recompute = recompute
    optimizer = Optimizer({name: p for name, p in model.named_parameters() if not p.stop_gradient}, args)
    model.img_context_token_id, tiles = 7, 2
    rng = np.random.default_rng(0)
    ids = rng.integers(10, 8000, (2, tokens))
    ids[:, 5 : 5 + 64 * tiles // 2] = model.img_context_token_id
    pixels = rng.normal(size=(tiles, 3, 224, 224)).astype("float32")
    for _ in range(2):  # the first step makes the optimiser's states
        for _ in range(2):
            model(pixels, ids, labels=ids).loss.backward()
            optimizer.accumulate()
        optimizer.step(1e-4)
    counts = plan.parameters(config, model_args)
    few = plan.rounded(config, model_args), model_args.weight_dtype
    needed = plan.memory(config, counts, args, Batch(2, tokens, tiles), 1, False, True, 224, few=few)
    return core.host_memory_stat_peak_value("Allocated", 0), needed.peak


CASES = {
    "full": (False, 0, 384),
    "lora": (True, 8, 384),
    "qlora": (True, 8, 384, True),
    "recompute": (True, 0, 640),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_peak_of_a_whole_step(case):
    # In a process of its own: the counter cannot be set back.
    code = f"from tests.training.test_plan import peak_of_a_step; print(*peak_of_a_step{case})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    measured, planned = map(float, done.stdout.split())
    assert 0.95 * measured < planned < 1.15 * measured  # rather too much than too little


def test_largest_batch():
    config = load_reference("qwen2").model.config  # 112 pixels make 16 tokens
    train = arguments(per_device_train_batch_size=3)
    tiled = DataTrainingArguments(dynamic_image_size=True, use_thumbnail=True, max_dynamic_patch=6, force_image_size=112)
    assert plan.largest_batch(config, tiled, train, text_tokens=100) == Batch(3, 7 * 16 + 100, 21)
    plain = DataTrainingArguments(force_image_size=112, max_seq_length=50)
    assert plan.largest_batch(config, plain, train, text_tokens=100) == Batch(3, 50, 3)
    packed = DataTrainingArguments(use_packed_ds=True, max_packed_tokens=4096, num_images_expected=20)
    assert plan.largest_batch(config, packed, train) == Batch(3, 4096, 60)


def test_steps():
    train = dict(per_device_train_batch_size=2, gradient_accumulation_steps=2)
    assert plan.count_steps(19, arguments(**train), 1) == 5
    assert plan.count_steps(19, arguments(**train, dataloader_drop_last=True), 1) == 4
    assert plan.count_steps(19, arguments(**train, num_train_epochs=2.5), 2) == 8
    assert plan.count_steps(19, arguments(**train, max_steps=7), 1) == 7


def test_plan_counts_the_samples_of_the_meta_file(tmp_path, capsys):
    row = '{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}\n'
    (tmp_path / "a.jsonl").write_text(row * 5)
    meta = tmp_path / "meta.json"
    meta.write_text(json.dumps({"a": {"root": "", "annotation": "a.jsonl", "repeat_time": 3}}))
    flags = "--model_name_or_path InternVL2-1B --output_dir x --device cpu --device_memory 60 --max_seq_length 100".split()
    flags += ["--meta_path", str(meta), "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2"]
    plan.main(flags)
    numbers = dict(line.rsplit(None, 1) for line in capsys.readouterr().out.splitlines() if not line.startswith(" "))
    assert (numbers["samples of an epoch"], numbers["samples of an update"], numbers["updates"]) == ("15", "4", "4")
    (tmp_path / "a.jsonl").unlink()
    plan.main(flags)
    assert "number of steps not known" in capsys.readouterr().out


def test_command(capsys):
    flags = "--model_name_or_path OpenGVLab/InternVL2-8B --output_dir x --freeze_backbone True --device cpu".split()
    plan.main([*flags, "--device_memory", "80"])
    text = capsys.readouterr().out
    assert "does NOT fit into 80 GB" in text
    assert "304.0" in text  # millions of the frozen vision tower
    plan.main([*flags, "--device_memory", "2000"])
    assert "fits into 2,000 GB" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        plan.main(["--output_dir", "x", "--model_name_or_path", "OpenGVLab/InternVL2-8B", "--sharding", "stage9"])
    assert "stage9" in capsys.readouterr().err


def test_without_a_number_the_plan_is_compared_with_this_machine(capsys):
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    plan.main(["--model_name_or_path", str(load_reference("qwen2").path), "--output_dir", "x", "--device", "cpu"])
    assert f"fits into {total:,.0f} GB" in capsys.readouterr().out


def test_processes_on_cpu_share_one_memory(capsys):
    flags = (
        "--model_name_or_path InternVL2-1B --output_dir x --freeze_backbone --recompute --device cpu --device_memory 60".split()
    )
    plan.main([*flags, "--per_device_train_batch_size", "1"])
    assert "  fits into 60 GB" in capsys.readouterr().out
    plan.main([*flags, "--per_device_train_batch_size", "1", "--processes", "8"])
    assert "does NOT fit" in capsys.readouterr().out


def test_total_of_a_model_equals_the_count_of_its_layers():
    model = load_reference("phi3").model
    counts = plan.parameters(model.config, ModelArguments("x"))
    assert sum(size for size, _ in counts.values()) == count_parameters(model)


@pytest.mark.slow
def test_table_has_every_model():
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in plan_table.memory_table().splitlines()[2:]]
    assert [row[0] for row in rows] == [name for name in (*published.PUBLISHED, *published.LATER) for _ in range(4)]
    peaks = {(row[0], row[1], row[2]): float(row[-1]) for row in rows}
    # What does not depend on the machine: fewer trained weights never need more memory, where no weights are divided.
    for name in published.PUBLISHED:
        full = max(p for key, p in peaks.items() if key[:2] == (name, "full"))
        assert peaks[name, "LoRA 16", "1"] < full or int(re.search(r"(\d+)B", name)[1]) >= 26
    # The scripts' numbers of cards hold what they train.
    assert all(p < 80 for (name, _, cards), p in peaks.items() if name in published.PUBLISHED and cards != "1")


def test_packed_rows_hold_no_scores_on_gpu_but_gpt_oss_does():
    """Flash attention takes masks of packed rows; sinks it does not."""
    packed = DataTrainingArguments(use_packed_ds=True, max_packed_tokens=32768, num_images_expected=96)
    train = arguments(per_device_train_batch_size=1, bf16=True, fp16_opt_level="O2", recompute=True, sharding="stage3")
    model_args = ModelArguments("x")
    gpt_oss = published.published_config("InternVL3_5-GPT-OSS-20B-A4B-Preview")
    qwen3 = published.published_config("InternVL3_5-8B")
    for config, kind, holds in ((qwen3, "gpu", False), (qwen3, "npu", True), (gpt_oss, "gpu", True)):
        scores = 2 * config.llm_config.num_attention_heads * 32768**2  # of one layer, in half precision at least
        assert (plan.plan(config, model_args, packed, train, 64, kind)[2].activations > scores) == holds
