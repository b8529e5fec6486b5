"""The model against what the original computes, and against itself in other circumstances."""

import copy

import numpy as np
import paddle
import pytest

from paddlemix.errors import ConfigError, PromptError
from paddlemix.models.internvl2 import InternVLChatConfig, InternVLChatModel
from paddlemix.models.internvl2.modeling import causal_loss, pixel_shuffle
from tests.conftest import FAMILIES, PICTURE_TOLERANCE, REFERENCE, assert_close, load_reference, tiles


def test_vision_features_equal_the_original(reference):
    model, arrays = reference.model, reference.arrays
    pixels = paddle.to_tensor(arrays["pixel_values"])
    with paddle.no_grad():
        assert_close(model.vision_model(pixels), arrays["vit_last_hidden_state"])
        chosen = model.vision_model(pixels, model.config.select_layer)
        assert_close(chosen, arrays["vit_hidden_state_select"])
        assert_close(model.extract_feature(arrays["pixel_values"]), arrays["image_features"])


def test_positions_are_interpolated_for_other_grids(reference):
    pixels = paddle.to_tensor(reference.arrays["pixel_values_168x140"])
    with paddle.no_grad():
        once = reference.model.vision_model(pixels)
        again = reference.model.vision_model(pixels)  # from the cache of grids
    assert_close(once, reference.arrays["vit_last_hidden_state_168x140"])
    assert np.array_equal(once.numpy(), again.numpy())


def test_earlier_hidden_states_are_those_of_a_shorter_tower():
    reference = load_reference("qwen2")
    pixels = paddle.to_tensor(reference.arrays["pixel_values"])
    tower = reference.model.vision_model
    with paddle.no_grad():
        embedded = tower.embeddings(pixels)
        assert np.array_equal(tower(pixels, 0).numpy(), embedded.numpy())
        assert np.array_equal(tower(pixels, -2).numpy(), tower.encoder(embedded, 2).numpy())
        assert np.array_equal(tower(pixels, 3).numpy(), tower(pixels, -1).numpy())


def test_interpolated_positions_follow_their_weights():
    config = copy.deepcopy(load_reference("qwen2").model.config)
    model = InternVLChatModel(config).vision_model
    pixels = paddle.to_tensor(load_reference("qwen2").arrays["pixel_values_168x140"])
    with paddle.no_grad():
        before = model(pixels).numpy()
        weights = model.embeddings.position_embedding
        weights.set_value(weights * 2)
        assert not np.allclose(before, model(pixels).numpy())


def test_language_logits_equal_the_original(reference):
    ids = reference.arrays["lm_input_ids"]
    with paddle.no_grad():
        output = reference.model(input_ids=ids)
    assert output.loss is None
    assert_close(output.logits[:, :: reference.expected["lm_logits_stride"]], reference.arrays["lm_logits"])


def test_dynamic_ntk_beyond_the_trained_length():
    reference = load_reference("internlm2")
    config = InternVLChatConfig.from_pretrained(reference.path)
    config.llm_config.max_position_embeddings = reference.expected["ntk"]["max_position_embeddings"]
    model = InternVLChatModel(config)
    model.set_state_dict(reference.model.state_dict())
    model.eval()
    stride = reference.expected["ntk"]["logits_stride"]
    with paddle.no_grad():
        logits = model(input_ids=reference.arrays["ntk_input_ids"]).logits[:, ::stride]
        short = model(input_ids=reference.arrays["ntk_input_ids"][:, :64]).logits
        unscaled = reference.model(input_ids=reference.arrays["ntk_input_ids"][:, :64]).logits
    assert_close(logits, reference.arrays["ntk_logits"])
    assert np.array_equal(short.numpy(), unscaled.numpy())


def test_first_logits_of_each_chat_equal_the_original(reference, chat_pixels):
    for chat in reference.expected["chats"]:
        pixels, counts = chat_pixels(chat["label"])
        assert counts == chat["num_patches_list"]
        with paddle.no_grad():
            logits = reference.model(pixels, np.array([chat["input_ids"]])).logits[0, -1]
        assert_close(logits, reference.arrays[f"first_logits_{chat['label']}"], PICTURE_TOLERANCE)


def test_gradients_and_optimiser_steps_equal_the_original(reference):
    expected = reference.expected
    sample = expected["train_samples"][expected["adamw_sample"]]
    setting = expected["adamw"]
    model = InternVLChatModel(reference.model.config)
    model.set_state_dict(reference.model.state_dict())
    model.set_tokenizer(reference.tokenizer)
    model.train()
    for parameter in model.vision_model.parameters():
        parameter.stop_gradient = True
    trained = [p for p in model.parameters() if not p.stop_gradient]
    optimiser = paddle.optimizer.AdamW(
        setting["lr"], *setting["betas"], setting["eps"], parameters=trained, weight_decay=setting["weight_decay"]
    )
    # A sample of text alone comes with the tiles of a picture that is not used.
    ids, labels = (np.array([sample[key]]) for key in ("input_ids", "labels"))
    pixels = tiles(1)
    flags = np.full(len(pixels), int((ids == model.img_context_token_id).any()))
    losses = []
    for step in range(len(setting["losses"])):
        loss = model(pixels, ids, image_flags=flags, labels=labels).loss
        losses.append(float(loss))
        loss.backward()
        if step == 0:
            assert_close(model.mlp1["1"].weight.grad.T, reference.arrays["grad_mlp1.1.weight"])
            assert_close(model.mlp1["3"].bias.grad, reference.arrays["grad_mlp1.3.bias"])
            name = "language_model.lm_head.weight" if reference.name != "internlm2" else "language_model.output.weight"
            assert_close(float(model.language_model.lm_head.weight.grad.norm()), expected["grad_norms"][name])
        optimiser.step()
        optimiser.clear_grad()
    assert_close(losses, setting["losses"])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(reference, side):
    ids = reference.arrays["lm_input_ids"][:1]
    padding = np.zeros([1, 5], "int64")
    real, padded = np.ones_like(ids), np.zeros_like(padding)
    order = slice(None, None, -1) if side == "left" else slice(None)
    long_ids = np.concatenate([ids, padding][order], 1)
    mask = np.concatenate([real, padded][order], 1)
    positions = np.clip(mask.cumsum(1) - 1, 0, None)
    with paddle.no_grad():
        plain = reference.model(input_ids=ids).logits
        masked = reference.model(input_ids=long_ids, attention_mask=mask, position_ids=positions).logits
    assert_close(masked.numpy()[mask.astype(bool)], plain[0], 1e-5)


def test_holes_in_a_mask_are_refused():
    reference = load_reference("qwen2")
    with pytest.raises(ValueError, match="zeros between ones"):
        reference.model(input_ids=np.array([[1, 2, 3]]), attention_mask=np.array([[1, 0, 1]]))


def test_equal_tiles_are_computed_once_and_all_returned():
    reference = load_reference("qwen2")
    pixels = reference.arrays["pixel_values"]
    order = [0, 1, 0, 2, 1, 0, 0]
    seen = []
    hook = reference.model.vision_model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[0]))
    features = reference.model.extract_feature(pixels[order])
    hook.remove()
    assert sum(seen) == 3
    assert_close(features, reference.arrays["image_features"][order])


def test_image_tokens_and_features_must_match():
    reference = load_reference("qwen2")
    ids = np.full([1, 16], reference.model.img_context_token_id)
    with pytest.raises(PromptError, match="16 image context tokens but the pictures have 32 features"):
        reference.model(reference.arrays["pixel_values"][:2], ids)


def test_loss_and_logits_belong_together():
    reference = load_reference("qwen2")
    ids = reference.arrays["lm_input_ids"]
    with paddle.no_grad():
        output = reference.model(input_ids=ids, labels=ids)
    assert_close(output.logits, reference.arrays["lm_logits"])
    assert float(output.loss) == pytest.approx(float(causal_loss(output.logits, paddle.to_tensor(ids))), rel=1e-6)


def test_unused_tiles_reach_the_graph_but_not_the_loss():
    reference = load_reference("qwen2")
    model = InternVLChatModel(reference.model.config)
    model.set_state_dict(reference.model.state_dict())
    model.set_tokenizer(reference.tokenizer)
    model.train()
    ids = reference.arrays["lm_input_ids"][:1]
    with_tile = model(reference.arrays["pixel_values"][:1], ids, image_flags=np.array([0]), labels=ids).loss
    without = model(None, ids, labels=ids).loss
    assert float(with_tile) == pytest.approx(float(without), abs=1e-6)
    with_tile.backward()
    assert float(model.mlp1["1"].weight.grad.abs().sum()) == 0


def test_loss_is_the_mean_over_labelled_tokens():
    generator = np.random.default_rng(0)
    logits = generator.normal(size=[2, 5, 7]).astype("float32")
    labels = np.array([[1, 2, -100, 3, -100], [-100, -100, -100, -100, 4]])
    by_hand = []
    for row in range(2):
        for at in range(4):
            if labels[row, at + 1] >= 0:
                scores = logits[row, at].astype("float64")
                by_hand.append(np.log(np.exp(scores).sum()) - scores[labels[row, at + 1]])
    loss = causal_loss(paddle.to_tensor(logits), paddle.to_tensor(labels))
    assert float(loss) == pytest.approx(np.mean(by_hand), rel=1e-6)


def test_pixel_shuffle_gathers_neighbours():
    x = paddle.arange(2 * 4 * 6).reshape([1, 4, 6, 2]).astype("float32")
    out = pixel_shuffle(x, 0.5).numpy()
    assert out.shape == (1, 2, 3, 8)
    for row in range(2):
        for column in range(3):
            block = x.numpy()[0, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            assert np.array_equal(out[0, row, column], block.reshape(-1))
    assert np.array_equal(pixel_shuffle(x, 0.5, "v1").numpy(), out.transpose(0, 2, 1, 3))


def test_other_sizes_and_settings_work():
    """Nothing is fitted to the reference: odd depths, a head width of 96, feature layer -2, v1 shuffle, linear scaling."""
    values = load_reference("llama_vit6b").model.config.to_dict()
    values.update(select_layer=-2, ps_version="v1", template="internvl_zh", force_image_size=56)
    values["vision_config"].update(hidden_size=96, num_attention_heads=1, num_hidden_layers=5, image_size=56)
    values["llm_config"].update(
        hidden_size=288, num_attention_heads=3, num_key_value_heads=1, rope_scaling={"type": "linear", "factor": 2.0}
    )
    scaled = InternVLChatModel(InternVLChatConfig.from_dict(values))
    values["llm_config"]["rope_scaling"] = None
    plain = InternVLChatModel(InternVLChatConfig.from_dict(values))
    plain.set_state_dict(scaled.state_dict())
    for model in (scaled, plain):
        model.eval()
        model.img_context_token_id = 5
    ids = np.array([[1, 5, 5, 5, 5, 2]])
    pixels = np.random.default_rng(0).normal(size=[1, 3, 56, 56]).astype("float32")
    with paddle.no_grad():
        # A scaling by two is the same as walking through the positions at half the speed.
        logits = scaled(pixels, ids, position_ids=2 * np.arange(6)[None]).logits
        expected = plain(pixels, ids, position_ids=np.arange(6)[None]).logits
        other = plain(pixels, ids, position_ids=2 * np.arange(6)[None]).logits
    assert logits.shape == [1, 6, 912]
    assert_close(logits, expected, 1e-5)
    assert np.abs(logits.numpy() - other.numpy()).max() > 1e-3


@pytest.mark.parametrize(
    "part, key, value, message",
    [
        (None, "template", "vicuna", "template is 'vicuna'"),
        (None, "ps_version", "v3", "ps_version is 'v3'"),
        (None, "select_layer", -9, "select_layer is -9"),
        ("llm_config", "architectures", ["MixtralForCausalLM"], "MixtralForCausalLM.*supported are InternLM2ForCausalLM"),
        ("llm_config", "num_key_value_heads", 3, "not a multiple"),
        ("llm_config", "rope_scaling", {"type": "llama3", "factor": 2.0}, "'llama3'"),
        ("vision_config", "norm_type", "batch_norm", "norm_type is 'batch_norm'"),
    ],
)
def test_unsupported_configurations_are_named(part, key, value, message):
    values = load_reference("qwen2").model.config.to_dict()
    (values if part is None else values[part])[key] = value
    with pytest.raises(ConfigError, match=message):
        InternVLChatConfig.from_dict(values)


def test_old_configurations_get_the_defaults_of_their_time():
    values = load_reference("llama_vit6b").model.config.to_dict()
    for key in ("norm_type", "qkv_bias", "qk_normalization"):
        del values["vision_config"][key]
    for key in ("ps_version", "select_layer", "use_thumbnail", "dynamic_image_size", "pad2square"):
        del values[key]
    config = InternVLChatConfig.from_dict(values)
    assert (config.vision_config.norm_type, config.vision_config.qkv_bias) == ("rms_norm", False)
    assert config.vision_config.qk_normalization
    assert (config.ps_version, config.select_layer, config.dynamic_image_size) == ("v1", -1, False)


@pytest.mark.parametrize(
    "text, message", [(None, "does not exist"), ("{", "not valid JSON"), ("[]", "no JSON object"), ("{}", "missing")]
)
def test_broken_config_files_are_named(tmp_path, text, message):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        InternVLChatConfig.from_pretrained(str(tmp_path))
    assert "config.json" in str(caught.value)


def test_configuration_survives_a_round_trip(tmp_path):
    for path in (REFERENCE / family / "checkpoint" for family in FAMILIES):
        config = InternVLChatConfig.from_pretrained(path)
        config.save(str(tmp_path))
        assert InternVLChatConfig.from_pretrained(str(tmp_path)) == config
