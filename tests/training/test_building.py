"""What learns and what does not, and a chat model from a vision tower and a language model."""

import json
import shutil

import numpy as np
import paddle
import pytest
from safetensors.numpy import load_file, save_file

from paddlemix.checkpoints import convert_dtype, find_weight_files, open_weight_file
from paddlemix.errors import CheckpointError, ConfigError
from paddlemix.models.internvl2 import load_tokenizer
from paddlemix.training.arguments import DataTrainingArguments, ModelArguments
from paddlemix.training.building import build_model
from paddlemix.training.parts import NEW_TOKENS, assemble
from tests.conftest import REFERENCE, assert_close, load_reference, tiles
from tests.training.helpers import batch, fresh, gradients, train_sample, trainer


@pytest.mark.parametrize(
    "settings, learns, not_learns",
    [
        (dict(freeze_backbone=True), ("mlp1.", "language_model."), ("vision_model.",)),
        (dict(freeze_llm=True), ("mlp1.", "vision_model."), ("language_model.",)),
        (dict(freeze_llm=True, freeze_backbone=True), ("mlp1.",), ("language_model.", "vision_model.")),
        (dict(freeze_mlp=True), ("vision_model.", "language_model."), ("mlp1.",)),
        (
            dict(freeze_backbone=True, freeze_llm=True, freeze_mlp=True, unfreeze_vit_layers=-1),
            ("vision_model.encoder.layers.2.",),
            ("vision_model.encoder.layers.1.", "vision_model.embeddings", "mlp1.", "language_model."),
        ),
        (
            dict(freeze_backbone=True, freeze_llm=True, freeze_mlp=True, unfreeze_vit_layers=1),
            ("vision_model.encoder.layers.1.", "vision_model.encoder.layers.2."),
            ("vision_model.encoder.layers.0.", "mlp1.", "language_model."),
        ),
        (
            dict(freeze_backbone=True, freeze_llm=True, freeze_mlp=True, unfreeze_lm_head=True),
            ("language_model.lm_head.",),
            ("language_model.model.", "mlp1.", "vision_model."),
        ),
    ],
)
@pytest.mark.parametrize("recompute", [False, True])
def test_a_step_moves_what_learns_and_nothing_else(settings, learns, not_learns, recompute):
    model, parameters = fresh("qwen2", recompute, **settings)
    before = {name: p.numpy() for name, p in model.named_parameters()}
    run = trainer(model, parameters)
    run.step(0, [batch(train_sample("qwen2", 1))])
    moved = {name for name, p in model.named_parameters() if not np.array_equal(p.numpy(), before[name])}
    assert all(name.startswith(learns) for name in moved)
    for prefix in learns:
        assert any(name.startswith(prefix) for name in moved), prefix
    assert not any(name.startswith(not_learns) for name in moved)
    assert moved == set(parameters)


def test_frozen_parts_keep_no_graph_and_are_in_evaluation_mode():
    model, _ = fresh("qwen2", freeze_backbone=True, drop_path_rate=0.9)
    assert not any(layer.training for layer in model.vision_model.sublayers(include_self=True))
    assert model.mlp1.training and model.language_model.training
    features = model._patches(paddle.to_tensor(tiles(1)))
    assert features.stop_gradient
    assert_close(model.extract_feature(tiles(1)), load_reference("qwen2").model.extract_feature(tiles(1)), 1e-5)


def test_tiles_of_a_frozen_tower_go_through_in_small_groups():
    model, _ = fresh("qwen2", freeze_backbone=True)
    seen = []
    model.vision_model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[0]))
    pixels = np.concatenate([tiles(1), tiles(0)])
    model.extract_feature(pixels)
    assert sum(seen) == len(pixels) and max(seen) == model.vision_batch < len(pixels)


def test_stochastic_depth_grows_with_depth_and_acts_in_training_alone():
    model, _ = fresh("qwen2", drop_path_rate=0.4)
    assert [layer.drop_path for layer in model.vision_model.encoder.layers] == pytest.approx([0.0, 0.2, 0.4])
    pixels = paddle.to_tensor(tiles(1))
    paddle.seed(0)
    first, second = model.vision_model(pixels), model.vision_model(pixels)
    assert np.abs(first.numpy() - second.numpy()).max() > 1e-3
    model.eval()
    assert_close(model.vision_model(pixels), load_reference("qwen2").model.vision_model(pixels), 1e-5)
    # Only the blocks that learn drop anything.
    partly, _ = fresh("qwen2", freeze_backbone=True, unfreeze_vit_layers=-1, drop_path_rate=0.4)
    assert [layer.training for layer in partly.vision_model.encoder.layers] == [False, False, True]


def test_recomputed_stochastic_depth_is_the_same_in_both_passes():
    """Gradients of a recomputed run with random depth are those of the same run without recompute."""
    results = []
    for recompute in (False, True):
        model, parameters = fresh("qwen2", recompute, drop_path_rate=0.5)
        paddle.seed(7)
        results.append(gradients(model, parameters, batch(train_sample("qwen2", 1))))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    for name, gradient in results[0][1].items():
        assert np.allclose(gradient, results[1][1][name], rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize("family", ["qwen2", "internlm2"])
def test_adapters_alone_learn_and_start_without_effect(family):
    settings = dict(freeze_backbone=True, freeze_llm=True, freeze_mlp=True, use_llm_lora=4, use_backbone_lora=2)
    model, parameters = fresh(family, **settings)
    assert parameters and all(".lora_" in name for name in parameters)
    assert {name.split(".")[0] for name in parameters} == {"vision_model", "language_model"}
    run = trainer(model, parameters)
    sample = batch(train_sample(family, 1))
    plain, _ = fresh(family, freeze_backbone=True)
    assert run.step(0, [sample])[0] == pytest.approx(gradients(plain, {}, sample)[0], rel=1e-5)
    assert run.step(1, [sample])[0] < run.step(0, [sample])[0] * 1.5
    for _ in range(5):
        last = run.step(2, [sample])[0]
    assert last < gradients(plain, {}, sample)[0]


# ---------------------------------------------------------------------- from parts


def _split(family, folder, keep_rows=None):
    """The vision tower, the language model and the projector of a reference checkpoint, as they are published alone."""
    source = REFERENCE / family / "checkpoint"
    config = json.loads((source / "config.json").read_text())
    tensors = {}
    for path in find_weight_files(str(source))[0]:
        with open_weight_file(path) as stored:
            tensors |= {k: convert_dtype(t.read(0, t.shape[0]), t.dtype, "float32") for k, t in stored.items()}
    for part, prefix in (("vision", "vision_model."), ("llm", "language_model."), ("mlp", "mlp1.")):
        own = {k.removeprefix(prefix): np.array(v) for k, v in tensors.items() if k.startswith(prefix)}
        if part == "llm" and keep_rows:
            own = {
                k: np.array(v[:keep_rows]) if v.shape[0] == config["llm_config"]["vocab_size"] else v for k, v in own.items()
            }
        (folder / part).mkdir()
        save_file(own, folder / part / "model.safetensors")
    (folder / "vision" / "config.json").write_text(json.dumps(config["vision_config"]))
    (folder / "llm" / "config.json").write_text(
        json.dumps(config["llm_config"] | ({"vocab_size": keep_rows} if keep_rows else {}))
    )
    for path in source.iterdir():
        if path.name not in ("config.json", "pytorch_model.bin") and not path.name.startswith("model"):
            shutil.copy(path, folder / "llm")
    return ModelArguments(vision_path=str(folder / "vision"), llm_path=str(folder / "llm"), mlp_path=str(folder / "mlp"))


def _forget_picture_tokens(folder):
    """Make the tokenizer that of a language model which knows nothing of pictures; returns its size."""
    (folder / "tokenizer.json").unlink(missing_ok=True)
    added = json.loads((folder / "added_tokens.json").read_text())
    kept = {token: i for token, i in added.items() if token not in NEW_TOKENS}
    (folder / "added_tokens.json").write_text(json.dumps(kept))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    for key in ("added_tokens_decoder", "additional_special_tokens"):
        entries = settings.get(key)
        if isinstance(entries, dict):
            settings[key] = {i: token for i, token in entries.items() if token["content"] not in NEW_TOKENS}
        elif entries:
            settings[key] = [token for token in entries if token not in NEW_TOKENS]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    special = json.loads((folder / "special_tokens_map.json").read_text())
    more = special.get("additional_special_tokens", [])
    special["additional_special_tokens"] = [t for t in more if (t if isinstance(t, str) else t["content"]) not in NEW_TOKENS]
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    return len(load_tokenizer(str(folder)))


@pytest.mark.parametrize("family", ["qwen2", "internlm2", "llama_vit6b", "phi3"])
def test_parts_put_together_are_the_whole(family, tmp_path):
    reference = load_reference(family)
    model_args = _split(family, tmp_path)
    model, tokenizer = assemble(model_args, DataTrainingArguments())
    assert len(tokenizer) == len(reference.tokenizer)
    for name, value in model.state_dict().items():
        assert np.array_equal(value.numpy(), reference.model.state_dict()[name].numpy()), name


@pytest.mark.parametrize("family", ["qwen2", "llama_vit6b"])
def test_embeddings_grow_by_the_tokens_for_pictures(family, tmp_path):
    reference = load_reference(family)
    model_args = _split(family, tmp_path)
    known = _forget_picture_tokens(tmp_path / "llm")
    shutil.rmtree(tmp_path / "mlp")
    model_args = ModelArguments(vision_path=model_args.vision_path, llm_path=model_args.llm_path)
    data_args = DataTrainingArguments(force_image_size=112, conv_style="internvl2_5", dynamic_image_size=True)
    model, tokenizer, source = build_model(model_args, data_args, "float32")
    assert source is None and len(tokenizer) == known + len(NEW_TOKENS) == model.config.llm_config.vocab_size
    assert (
        tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
        == model.img_context_token_id
        == known + NEW_TOKENS.index("<IMG_CONTEXT>")
    )
    assert (model.config.template, model.config.force_image_size, model.config.dynamic_image_size) == ("internvl2_5", 112, True)
    head, old = model.language_model.lm_head.weight.numpy(), reference.model.language_model.lm_head.weight.numpy()
    assert np.array_equal(head[:, :known], old[:, :known])
    assert_close(head[:, known:], np.repeat(old[:, :known].mean(1, keepdims=True), len(NEW_TOKENS), 1), 1e-5)
    table = model.language_model.model.embed_tokens.weight.numpy()
    assert np.array_equal(table[:known], reference.model.language_model.model.embed_tokens.weight.numpy()[:known])
    assert table[known:].std() > 0
    assert np.isfinite(float(model(tiles(1)[:1], np.full([1, 16], model.img_context_token_id)).logits.sum()))


def test_a_tied_language_model_gives_its_embedding_to_the_head(tmp_path):
    model_args = _split("qwen2", tmp_path)
    config = json.loads((tmp_path / "llm" / "config.json").read_text())
    (tmp_path / "llm" / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    tensors = load_file(tmp_path / "llm" / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "llm" / "model.safetensors")
    model, _ = assemble(model_args, DataTrainingArguments())
    assert np.array_equal(model.language_model.lm_head.weight.numpy().T, tensors["model.embed_tokens.weight"])
    assert model.config.llm_config.tie_word_embeddings is False


def test_the_projector_may_come_from_a_whole_checkpoint(tmp_path):
    model_args = _split("qwen2", tmp_path)
    model_args.mlp_path = str(REFERENCE / "qwen2" / "checkpoint")
    model, _ = assemble(model_args, DataTrainingArguments())
    expected = load_reference("qwen2").model.mlp1.state_dict()
    assert all(np.array_equal(value.numpy(), expected[name].numpy()) for name, value in model.mlp1.state_dict().items())


def test_parts_that_do_not_fit_are_named(tmp_path):
    model_args = _split("qwen2", tmp_path)
    tensors = load_file(tmp_path / "vision" / "model.safetensors")
    lost = tensors.pop("encoder.layers.0.attn.qkv.weight")
    save_file(tensors, tmp_path / "vision" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"1 are missing \(vision_model\.encoder\.layers\.0\.attn\.qkv\.weight\)"):
        assemble(model_args, DataTrainingArguments())
    save_file({**tensors, "encoder.layers.0.attn.qkv.weight": lost[:5].copy()}, tmp_path / "vision" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"qkv\.weight is \[5, 64\] instead of \[192, 64\]"):
        assemble(model_args, DataTrainingArguments())
    (tmp_path / "llm" / "config.json").write_text('{"architectures": ["MixtralForCausalLM"]}')
    with pytest.raises(ConfigError, match="cannot be put together: .*MixtralForCausalLM"):
        assemble(model_args, DataTrainingArguments())
    (tmp_path / "llm" / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"config\.json does not exist"):
        assemble(model_args, DataTrainingArguments())
