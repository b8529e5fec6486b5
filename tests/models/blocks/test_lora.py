"""LoRA: adapters against the dense weights they stand for, and their names against those of PEFT."""

import json
import shutil

import numpy as np
import paddle
import pytest
from paddle.nn import functional as F
from safetensors.numpy import load_file

from paddlemix.errors import CheckpointError, ConfigError
from paddlemix.models.blocks.layers import Linear
from paddlemix.models.blocks.lora import LoRALinear, merge_lora, wrap_backbone_lora, wrap_llm_lora
from paddlemix.models.internvl2 import InternVLChatModel, lora
from paddlemix.models.internvl2.checkpoint import Checkpoint
from paddlemix.models.internvl2.configuration import InternVLChatConfig
from paddlemix.models.internvl2.merge_lora import main as merge_command
from tests.conftest import FAMILIES, assert_close, load_reference, tiles


def fresh_model(family):
    """A model of its own, which a test may change."""
    model = InternVLChatModel.from_pretrained(str(load_reference(family).path), dtype="float32")
    model.set_tokenizer(load_reference(family).tokenizer)
    return model


def with_random_adapters(family, llm=4, backbone=2, seed=3):
    """A model whose adapters are not zero, in evaluation mode."""
    model = fresh_model(family)
    if llm:
        wrap_llm_lora(model, llm)
    if backbone:
        wrap_backbone_lora(model, backbone)
    numbers = np.random.default_rng(seed)
    for name, parameter in model.named_parameters():
        if ".lora_B" in name:
            parameter.set_value(numbers.normal(0, 0.02, parameter.shape).astype("float32"))
    model.eval()
    return model


def logits(model, family):
    """Logits of a short prompt with the tiles of a picture."""
    token = model.img_context_token_id
    ids = [[5, 9, 11, *[token] * model.config.num_image_token, 8, 6]]
    with paddle.no_grad():
        return model(tiles(1, max_num=1), np.array(ids)).logits.numpy()


@pytest.mark.parametrize("family", FAMILIES)
def test_new_adapters_change_nothing(family):
    model = fresh_model(family)
    before = logits(model, family)
    wrap_llm_lora(model, 4)
    wrap_backbone_lora(model, 4)
    model.eval()
    assert np.array_equal(before, logits(model, family))


@pytest.mark.parametrize("family", FAMILIES)
def test_merging_keeps_the_outputs(family):
    model = with_random_adapters(family)
    plain = logits(fresh_model(family), family)
    before = logits(model, family)
    assert np.abs(before - plain).max() > 1e-2 * np.abs(plain).max()  # the adapters do something
    merge_lora(model)
    assert_close(logits(model, family), before, 1e-5)
    assert not any("lora" in name for name in model.state_dict())
    assert model.state_dict().keys() == fresh_model(family).state_dict().keys()
    assert model.config.use_llm_lora == model.config.use_backbone_lora == 0


def test_only_the_adapters_get_gradients():
    model = fresh_model("qwen2")
    wrap_llm_lora(model, 4)
    wrap_backbone_lora(model, 4)
    for parameter in model.mlp1.parameters():
        parameter.stop_gradient = True
    model.train()
    ids = [5, *[model.img_context_token_id] * model.config.num_image_token, 8, 6, 7]
    model(tiles(1, max_num=1), np.array([ids]), labels=np.array([[-100] * (len(ids) - 2) + ids[-2:]])).loss.backward()
    learned = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    expected = {name for name in model.state_dict() if ".lora_" in name}
    assert learned == expected
    llm, vision = model.config.llm_config.num_hidden_layers, model.config.vision_config.num_hidden_layers
    # Qwen2: q, k, v, o, gate, up, down; vision: qkv, proj, fc1, fc2; each with A and B.
    assert len(learned) == 2 * (7 * llm + 4 * vision)
    # A learns only once B is not zero.
    at_zero = [name for name, parameter in model.named_parameters() if name in learned and not parameter.grad.abs().sum()]
    assert all(".lora_A." in name for name in at_zero)


def test_recompute_reaches_the_adapters_of_the_first_block():
    """Its input needs no gradient when all but the adapters is frozen, which must not be taken to mean that they need none."""
    gradients = []
    for recompute in (False, True):
        paddle.seed(1)
        model = fresh_model("qwen2")
        wrap_llm_lora(model, 4, dropout=0.0)
        wrap_backbone_lora(model, 4, dropout=0.0)
        for parameter in model.mlp1.parameters():
            parameter.stop_gradient = True
        model.train()
        model.language_model.model.enable_recompute = model.vision_model.encoder.enable_recompute = recompute
        ids = [5, *[model.img_context_token_id] * model.config.num_image_token, 8, 6, 7]
        model(tiles(1, max_num=1), np.array([ids]), labels=np.array([[-100] * (len(ids) - 2) + ids[-2:]])).loss.backward()
        gradients.append({n: p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert "language_model.model.layers.0.self_attn.qkv_proj.lora_B.0" in gradients[1]
    for name, expected in gradients[0].items():
        assert np.abs(gradients[1][name] - expected).max() <= 1e-5 * max(np.abs(expected).max(), 1e-6), name


def test_each_part_has_its_own_columns():
    paddle.seed(5)
    base = Linear(6, 10)
    layer = LoRALinear(base, [4, 3, 3], rank=2)
    numbers = np.random.default_rng(0)
    a = [numbers.normal(size=(6, 2)).astype("float32") for _ in range(3)]
    b = [numbers.normal(size=(2, size)).astype("float32") for size in (4, 3, 3)]
    for part, values in zip([*layer.lora_A, *layer.lora_B], a + b):
        part.set_value(values)
    layer.eval()
    dense = np.zeros((6, 10), "float32")
    for start, stop, x, y in zip((0, 4, 7), (4, 7, 10), a, b):
        dense[:, start:stop] = 2 * x @ y  # alpha / rank is 2
    x, scale, residual = (numbers.normal(size=shape).astype("float32") for shape in ((5, 6), (10,), (5, 10)))
    y = x @ (base.weight.numpy() + dense) + base.bias.numpy()
    tensors = [paddle.to_tensor(v) for v in (x, scale, residual)]
    assert_close(layer(tensors[0]).numpy(), y, 1e-5)
    expected = residual + scale * F.gelu(paddle.to_tensor(y)).numpy()
    assert_close(layer(tensors[0], gelu=True, scale=tensors[1], residual=tensors[2]).numpy(), expected, 1e-5)
    assert_close(layer.delta().numpy(), dense, 1e-6)


def test_dropout_is_for_training_only():
    layer = LoRALinear(Linear(64, 64), [64], rank=4, dropout=0.5)
    layer.lora_B[0].set_value(np.ones((4, 64), "float32"))
    x = paddle.ones([1, 64])
    layer.train()
    assert not np.array_equal(layer(x).numpy(), layer(x).numpy())
    layer.eval()
    assert np.array_equal(layer(x).numpy(), layer(x).numpy())


# Names of the original's checkpoints with adapters, as PEFT makes them: layer 0 of each family.
_SEPARATE = "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj mlp.gate_proj mlp.up_proj mlp.down_proj"
PUBLISHED = {
    "qwen2": _SEPARATE,
    "llama_vit6b": _SEPARATE,
    "internlm2": "attention.wqkv attention.wo feed_forward.w1 feed_forward.w2 feed_forward.w3",
    "phi3": "self_attn.qkv_proj self_attn.o_proj mlp.gate_up_proj mlp.down_proj",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_unmerged_checkpoints_have_the_names_of_the_original_and_load_again(family, tmp_path):
    model = with_random_adapters(family)
    model.save_pretrained(str(tmp_path))
    names = load_file(tmp_path / "model.safetensors").keys()
    adapted = [name.split("model.layers.0.")[1] for name in names if "model.layers.0." in name and ".lora_A.default." in name]
    assert sorted(adapted) == sorted(f"{target}.lora_A.default.weight" for target in PUBLISHED[family].split())
    target = PUBLISHED[family].split()[0]
    for kind in ("base_layer", "lora_A.default", "lora_B.default"):
        assert f"language_model.base_model.model.model.layers.0.{target}.{kind}.weight" in names
    assert "vision_model.base_model.model.encoder.layers.0.mlp.fc1.base_layer.bias" in names
    assert "vision_model.base_model.model.embeddings.class_embedding" in names
    assert "mlp1.1.weight" in names
    again = InternVLChatModel.from_pretrained(str(tmp_path), dtype="float32", engine="eager")
    assert (again.config.use_llm_lora, again.config.use_backbone_lora) == (4, 2)
    again.set_tokenizer(load_reference(family).tokenizer)
    assert np.array_equal(logits(again, family), logits(model, family))


@pytest.mark.parametrize("family", FAMILIES)
def test_published_adapters_add_to_published_weights(family, tmp_path):
    """Merging in the model equals B @ A on the published tensors, in their own row order (InternLM2 interleaves its rows)."""
    model = with_random_adapters(family)
    model.save_pretrained(str(tmp_path / "unmerged"))
    merge_lora(model)
    model.save_pretrained(str(tmp_path / "merged"))
    unmerged, merged = (load_file(tmp_path / name / "model.safetensors") for name in ("unmerged", "merged"))
    count = 0
    for name in (name for name in unmerged if name.endswith(".base_layer.weight")):
        layer = name.removesuffix(".base_layer.weight")
        delta = 2 * unmerged[f"{layer}.lora_B.default.weight"] @ unmerged[f"{layer}.lora_A.default.weight"]
        plain = layer.replace(".base_model.model.", ".") + ".weight"
        assert_close(merged[plain], unmerged[name] + delta, 1e-6)
        count += np.abs(delta).max() > 1e-3
    config = model.config
    assert (
        count
        == len(PUBLISHED[family].split()) * config.llm_config.num_hidden_layers + 4 * config.vision_config.num_hidden_layers
    )


@pytest.mark.parametrize("layout", ["torch", "paddle"])
def test_merge_command(layout, tmp_path, capsys):
    reference = load_reference("internlm2")
    model = with_random_adapters("internlm2")
    source, target = tmp_path / "source", tmp_path / "target"
    model.save_pretrained(str(source), layout=layout, max_shard_size="300KB")
    shutil.copy(reference.path / "tokenizer.model", source)
    merge_command([str(source), str(target)])
    config = InternVLChatConfig.from_pretrained(str(target))
    assert (config.use_llm_lora, config.use_backbone_lora) == (0, 0)
    assert Checkpoint(str(target), config).layout == layout
    assert (target / "tokenizer.model").read_bytes() == (reference.path / "tokenizer.model").read_bytes()
    merged = InternVLChatModel.from_pretrained(str(target), dtype="float32")
    merged.set_tokenizer(reference.tokenizer)
    assert_close(logits(merged, "internlm2"), logits(model, "internlm2"), 1e-5)

    with pytest.raises(SystemExit):  # the target is not empty any more
        merge_command([str(source), str(target)])
    assert "not an empty directory" in capsys.readouterr().err
    with pytest.raises(SystemExit):  # nothing to merge
        merge_command([str(target), str(tmp_path / "other")])
    assert "nothing to merge" in capsys.readouterr().err


@pytest.mark.parametrize("family", ["internlm2", "qwen2"])
def test_adapters_alone_round_trip_in_the_names_of_peft(family, tmp_path):
    model = with_random_adapters(family)
    lora.save_adapters(model, str(tmp_path))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    target = PUBLISHED[family].split()[0]
    name = f"base_model.model.language_model.model.layers.0.{target}"
    width = model.config.llm_config.hidden_size
    assert tensors[f"{name}.lora_A.weight"].shape == (4, width)
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    assert values["r"] == 4 and values["lora_alpha"] == 8 and values["rank_pattern"]["attn.qkv"] == 2
    assert set(PUBLISHED[family].split()) < set(values["target_modules"])

    again = fresh_model(family)
    lora.load_adapters(again, str(tmp_path))
    again.eval()
    assert np.array_equal(logits(again, family), logits(model, family))

    # PEFT's default alpha is not twice the rank: an eighth of it is an eighth of the change.
    values["lora_alpha"], values["alpha_pattern"] = 1, {}
    values["rank_pattern"]["attn.qkv"] = 2
    (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    weaker = fresh_model(family)
    lora.load_adapters(weaker, str(tmp_path))
    layer, full = (m.language_model.model.layers[0].self_attn.qkv_proj for m in (weaker, again))
    assert_close(layer.delta().numpy() * 8, full.delta().numpy(), 1e-6)


def test_adapters_of_another_model_are_refused(tmp_path):
    lora.save_adapters(with_random_adapters("qwen2"), str(tmp_path))
    with pytest.raises(CheckpointError, match="do not fit the model"):
        lora.load_adapters(fresh_model("phi3"), str(tmp_path))
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "use_dora": True}))
    with pytest.raises(CheckpointError, match="use_dora"):
        lora.load_adapters(fresh_model("qwen2"), str(tmp_path))
    with pytest.raises(CheckpointError, match="adapter_config.json does not exist"):
        lora.load_adapters(fresh_model("qwen2"), str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="no LoRA adapters"):
        lora.save_adapters(fresh_model("qwen2"), str(tmp_path))


def test_ranks_that_contradict_are_refused():
    model = fresh_model("qwen2")
    with pytest.raises(ConfigError, match="must be positive"):
        wrap_llm_lora(model, -1)
    wrap_llm_lora(model, 4)
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    wrap_llm_lora(model, 4)  # to go on training what is there
    assert all(np.array_equal(weights[name], value.numpy()) for name, value in model.state_dict().items())
    with pytest.raises(ConfigError, match="adapters of rank 4"):
        wrap_llm_lora(model, 8)


def test_unknown_family_is_named(tmp_path):
    model = with_random_adapters("qwen2", backbone=0)
    model.save_pretrained(str(tmp_path))
    values = json.loads((tmp_path / "config.json").read_text())
    values["llm_config"]["architectures"] = ["BloomForCausalLM"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="BloomForCausalLM"):
        InternVLChatModel.from_pretrained(str(tmp_path))
