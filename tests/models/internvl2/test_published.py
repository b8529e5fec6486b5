"""Names and shapes of every released InternVL3 and 3.5, in both layouts, without building one."""

import hashlib
import json
import math

import pytest

from paddlemix.errors import ConfigError
from paddlemix.models.blocks.flops import parameter_counts
from paddlemix.models.internvl2 import InternVLChatConfig, published_shapes
from paddlemix.training.published import LATER, published_config
from tests.conftest import REFERENCE

MODELS = json.loads((REFERENCE / "internvl3" / "models.json").read_text())
TOWERS = {
    "300M": dict(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096, image_size=448, qkv_bias=True,
        qk_normalization=False, norm_type="layer_norm",
    ),
    "6B": dict(num_hidden_layers=45, image_size=448),
}  # fmt: skip


def config_of(name):
    model = MODELS[name]
    values = {"vision_config": TOWERS[model["vision"]], "llm_config": model["llm"], "force_image_size": 448, "ps_version": "v2"}
    if name.endswith("-Flash"):
        values |= {"flash_mode": True, "flash_relative_threshold": 0.5, "flash_absolute_threshold": 0.5}
    return InternVLChatConfig.from_dict(values)


@pytest.mark.parametrize("name", MODELS)
def test_names_and_shapes_are_those_of_the_original(name):
    model, config = MODELS[name], config_of(name)
    for layout, prefix in (("torch", ""), ("hf", "hf_")):
        if prefix + "sha256" not in model:
            with pytest.raises(ConfigError, match="no form"):
                published_shapes(config, layout)
            continue
        shapes = published_shapes(config, layout)
        lines = "\n".join(sorted(f"{key} {list(shape)}" for key, shape in shapes.items()))
        assert len(shapes) == model[prefix + "tensors"]
        assert sum(map(math.prod, shapes.values())) == model[prefix + "parameters"]
        assert hashlib.sha256(lines.encode()).hexdigest() == model[prefix + "sha256"]
    if name.removesuffix("-Flash") in LATER:  # the same sizes, as the plan knows them
        assert published_shapes(published_config(name)) == published_shapes(config)
    counts = parameter_counts(config)
    assert sum(counts.values()) == model["parameters"]
    assert counts["vision"] == model["vision_parameters"]
