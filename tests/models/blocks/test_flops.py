"""Counts against real models, hand computations and published sizes."""

import copy
import math

import paddle
import pytest

from paddlemix.models.blocks.flops import (
    decode_bytes,
    decoder_flops,
    parameter_bytes,
    parameter_counts,
    vision_flops,
)
from paddlemix.models.internvl2 import InternVLChatConfig, InternVLChatModel
from tests.conftest import FAMILIES, REFERENCE

INTERNVL2_1B = {
    "vision_config": dict(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096, image_size=448,
        qkv_bias=True, qk_normalization=False, norm_type="layer_norm",
    ),
    "llm_config": dict(
        architectures=["Qwen2ForCausalLM"], vocab_size=151655, hidden_size=896, intermediate_size=4864,
        num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
    ),
    "force_image_size": 448, "ps_version": "v2",
}  # fmt: skip


def config_of(family):
    return InternVLChatConfig.from_pretrained(REFERENCE / family / "checkpoint")


def parameters(layer):
    return sum(math.prod(p.shape) for p in layer.parameters())


def product_weights(layer):
    """Sizes of the weights that take part in matrix products."""
    return sum(math.prod(p.shape) for p in layer.parameters() if len(p.shape) == 2)


@pytest.fixture(scope="module", params=FAMILIES)
def built(request):
    config = config_of(request.param)
    with paddle.LazyGuard():
        return config, InternVLChatModel(config)


def test_parameters_are_those_of_the_model(built):
    config, model = built
    language = model.language_model
    assert parameter_counts(config) == {
        "vision": parameters(model.vision_model),
        "projector": parameters(model.mlp1),
        "embedding": parameters(language.model.embed_tokens),
        "decoder": parameters(language.model.layers) + parameters(language.model.norm),
        "head": parameters(language.lm_head),
    }
    assert parameter_bytes(config, "float32") == 4 * parameters(model)
    assert parameter_bytes(config, "bfloat16", ["head"]) == 2 * parameters(language.lm_head)


def test_flops_are_two_for_each_weight_and_token_plus_attention(built):
    config, model = built
    language, vision = model.language_model, model.vision_model
    llm = config.llm_config

    # 5 new tokens after 7: they see 8, 9, 10, 11 and 12 positions; each pair costs a score and a weighted value.
    pairs, width = 8 + 9 + 10 + 11 + 12, llm.num_attention_heads * llm.head_dim
    expected = 2 * 5 * product_weights(language.model.layers) + 2 * product_weights(language.lm_head)
    assert decoder_flops(config, 5, 7) == expected + 2 * 2 * pairs * width * llm.num_hidden_layers

    patches = (config.image_size // config.vision_config.patch_size) ** 2
    depth = len(vision.encoder.layers) + 1 + config.select_layer
    blocks = vision.encoder.layers[:depth]
    expected = 2 * patches * math.prod(vision.embeddings.patch_embedding.weight.shape)
    expected += 2 * (patches + 1) * sum(product_weights(block) for block in blocks)
    expected += depth * 2 * 2 * (patches + 1) ** 2 * config.vision_config.hidden_size
    expected += 2 * config.num_image_token * product_weights(model.mlp1)
    assert vision_flops(config, 3) == 3 * expected


def test_layers_after_the_selected_one_cost_nothing():
    config = config_of("qwen2")
    whole = vision_flops(config, 1)
    shorter, from_start = copy.copy(config), copy.copy(config)
    depth = config.vision_config.num_hidden_layers
    shorter.select_layer, from_start.select_layer = -2, depth - 1
    embedding_only = copy.copy(config)
    embedding_only.select_layer = 0
    block = whole - vision_flops(shorter, 1)
    assert vision_flops(shorter, 1) == vision_flops(from_start, 1)
    assert whole - vision_flops(embedding_only, 1) == depth * block > 0


def test_prefill_in_pieces_costs_the_same():
    config = config_of("internlm2")
    pieces = decoder_flops(config, 10, logits=0) + decoder_flops(config, 22, context=10)
    assert pieces == decoder_flops(config, 32)


def test_full_size_model_by_hand():
    config = InternVLChatConfig.from_dict(INTERNVL2_1B)
    total = sum(parameter_counts(config).values())
    assert total == pytest.approx(0.94e9, rel=0.01)  # the model card's size
    # A block of the decoder: 896 * (896 + 2 * 128) + 896 * 896 + 3 * 896 * 4864; the head: 896 * 151655.
    products = 24 * (1_032_192 + 802_816 + 13_074_432)
    head = 135_882_880
    assert decoder_flops(config, 1, 1831) == 2 * (products + head) + 24 * 4 * 1832 * 896
    # One key and one value of 2 heads of 64 in each of 24 layers, 2 bytes each: 12,288 bytes a position.
    small = 24 * (1152 + 2 * 896) + 896  # qkv biases and norms
    assert decode_bytes(config, 100, "bfloat16") == 2 * (products + head + small) + 100 * 12_288
    # A tile: 1,025 tokens; a block of InternViT: 12 * 1024 ** 2 weights; projector 4096 -> 896 -> 896 on 256 tokens.
    block = 1025 * 12 * 1024**2 + 2 * 1025**2 * 1024
    expected = 1024 * 588 * 1024 + 24 * block + 256 * (4096 * 896 + 896 * 896)
    assert vision_flops(config, 7) == 2 * 7 * expected
