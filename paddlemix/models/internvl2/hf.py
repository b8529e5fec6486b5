"""Configurations in transformers' own layout (``InternVLForConditionalGeneration``, transformers 4.57), both ways.

What is written keeps the whole original ``config.json`` under :data:`KEPT`, which transformers ignores: a Llama-typed text
configuration does not say whether it came from InternLM2, InternLM3 or Llama, and nothing there names the template.
"""

import os

from paddlemix.errors import ConfigError
from paddlemix.files import read_json
from paddlemix.validation import shown

KEPT = "internvl_chat_config"
KEPT_FILES = "internvl_chat_files"  # texts of small files that have another content in this layout
FROM_HF = "_read_from_transformers"  # a mark in memory, which is not written

OTHER_FAMILIES = {
    "internvlu_chat": "InternVL-U generates pictures, which nothing here does",
    "interns1": "Intern-S1 is a family of its own",
    "interns1_pro": "Intern-S1-Pro is a family of its own",
}

_FAMILIES = {
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
    "llama": "LlamaForCausalLM",
}
_TYPES = {family: kind for kind, family in _FAMILIES.items()}
_TYPES |= {"InternLM2ForCausalLM": "llama", "InternLM3ForCausalLM": "llama"}

# original: transformers'. Defaults are those of transformers' class, which are the 300M's.
_VISION = {
    "hidden_size": ("hidden_size", 1024),
    "num_hidden_layers": ("num_hidden_layers", 24),
    "num_attention_heads": ("num_attention_heads", 16),
    "intermediate_size": ("intermediate_size", 4096),
    "norm_type": ("norm_type", "layer_norm"),
    "layer_norm_eps": ("layer_norm_eps", 1e-6),
    "hidden_act": ("hidden_act", "gelu"),
    "num_channels": ("num_channels", 3),
    "qkv_bias": ("attention_bias", False),
    "qk_normalization": ("use_qk_norm", False),
    "attention_dropout": ("attention_dropout", 0.0),
    "dropout": ("projection_dropout", 0.0),
    "initializer_factor": ("layer_scale_init_value", 0.1),
    "initializer_range": ("initializer_range", 0.02),
}
# What the published tensors' shapes depend on: in a folder that was changed since, these count and not what was kept.
_SIZES = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "tie_word_embeddings output_router_logits router_aux_loss_coef"
).split()


def is_hf(values):
    """Whether a ``config.json`` is in transformers' layout."""
    return values.get("model_type") == "internvl" or (
        isinstance(values.get("text_config"), dict) and "llm_config" not in values
    )


def original_config(values):
    """The original's dictionary for one of transformers' layout.

    Raises:
        ConfigError: it describes something that has no form there.
    """
    for key in ("vision_config", "text_config"):
        if not isinstance(values.get(key), dict):
            raise ConfigError(f"'{key}' is missing: this is not the config.json of an InternVL chat model")
    text, vision = values["text_config"], values["vision_config"]
    kind = text.get("model_type")
    if not isinstance(kind, str) or kind not in _FAMILIES:
        raise ConfigError(f"text_config.model_type is {shown(kind)}: supported are {', '.join(_FAMILIES)}")
    for key, wanted in (("vision_feature_select_strategy", "default"), ("projector_hidden_act", "gelu")):
        if values.get(key, wanted) != wanted:
            raise ConfigError(f"{key} is {shown(values[key])}: only {wanted} is supported")
    if vision.get("use_mean_pooling", True) is not True:
        raise ConfigError("vision_config.use_mean_pooling is false: a norm after the last vision layer is not supported")
    kept = values.get(KEPT)
    if isinstance(kept, dict) and isinstance(kept.get("llm_config"), dict):
        llm = kept["llm_config"] | {k: text[k] for k in _SIZES if k in text and k in kept["llm_config"]}
        return kept | {"llm_config": llm, FROM_HF: True}
    image_size, patch_size = _side(vision, "image_size", 448), _side(vision, "patch_size", 14)
    own = {key: vision.get(theirs, default) for key, (theirs, default) in _VISION.items()}
    own |= {"architectures": ["InternVisionModel"], "model_type": "intern_vit_6b"}
    own |= {"image_size": image_size, "patch_size": patch_size}
    llm = {**text, "architectures": [_FAMILIES[kind]]}
    if "tie_word_embeddings" not in llm:
        llm["tie_word_embeddings"] = values.get("tie_word_embeddings", False) if kind != "qwen2" else False
    result = {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "vision_config": own,
        "llm_config": llm,
        "select_layer": values.get("vision_feature_layer", -1),
        "force_image_size": image_size,
        "downsample_ratio": values.get("downsample_ratio", 0.5),
        "template": values.get("template") or ("internvl3_5_gpt_oss" if kind == "gpt_oss" else "internvl2_5"),
        "ps_version": "v2",
        "dynamic_image_size": True,
        "use_thumbnail": True,
        "min_dynamic_patch": 1,
        "max_dynamic_patch": 12,
        "tie_word_embeddings": llm["tie_word_embeddings"],
        FROM_HF: True,
    }
    for key in ("dtype", "torch_dtype"):
        if key in values:
            result["torch_dtype"] = values[key]
    return result


def _side(vision, key, default):
    value = vision.get(key, default)
    if isinstance(value, (list, tuple)):
        if len(value) != 2 or value[0] != value[1]:
            raise ConfigError(f"vision_config.{key} is {shown(value)}: only squares are supported")
        value = value[0]
    return value


def apply_preprocessor(config, directory):
    """Let a folder in transformers' layout say how pictures are cut, and refuse what is done to them nowhere here.

    The settings are those of ``preprocessor_config.json`` or, as transformers 5 writes it, of ``image_processor`` in
    ``processor_config.json``. ``crop_to_patches`` changes nothing: that processor cuts whatever it says.
    """
    path, values = _preprocessor(directory)
    if not values:
        return
    least, most = values.get("min_patches", config.min_dynamic_patch), values.get("max_patches", config.max_dynamic_patch)
    if not all(isinstance(n, int) and not isinstance(n, bool) and 1 <= n <= 1000 for n in (least, most)) or least > most:
        raise ConfigError(
            f"{path}: min_patches and max_patches are {shown(least)} and {shown(most)}: give whole numbers from 1 on"
        )
    config.min_dynamic_patch, config.max_dynamic_patch = least, most
    for key, wanted in {"image_mean": _MEAN, "image_std": _STD, "rescale_factor": 1 / 255, "resample": 3, **_DONE}.items():
        value = values.get(key)
        if value is not None and not _alike(value, wanted):
            raise ConfigError(f"{path}: {key} is {shown(value)}: only {wanted} is supported")
    size = values.get("size")
    if size is None:
        return
    sides = [size.get("height"), size.get("width")] if isinstance(size, dict) else [size, size]
    multiple = config.vision_config.patch_size * round(1 / config.downsample_ratio)
    side = sides[0]
    if sides[0] != sides[1] or isinstance(side, bool) or not isinstance(side, int) or not 0 < side <= 4096 or side % multiple:
        raise ConfigError(f"{path}: size is {shown(size)}: give one height and width, a multiple of {multiple}")
    config.force_image_size = side


_DONE = dict.fromkeys(("do_resize", "do_rescale", "do_normalize"), True)


def _preprocessor(directory):
    """(file, settings of pictures) of a folder; settings are None where it has none."""
    for name, key in (("preprocessor_config.json", None), ("processor_config.json", "image_processor")):
        path = os.path.join(directory, name)
        if os.path.exists(path):
            values = read_json(path)
            values = values if key is None else values.get(key)
            if isinstance(values, dict):
                return path, values
    return None, None


def _alike(value, wanted):
    """Whether a setting is the wanted one, numbers within 1e-4."""
    values, wanted = (x if isinstance(x, list) else [x] for x in (value, wanted))
    numbers = all(isinstance(x, (int, float)) for x in values)
    return numbers and len(values) == len(wanted) and all(abs(a - b) < 1e-4 for a, b in zip(values, wanted))


def check_writable(config):
    """Raise a :class:`ConfigError` where a model has no form in transformers' layout."""
    family = config.llm_config.family
    if family not in _TYPES:
        raise ConfigError(f"{family} has no form in transformers' layout: write --layout torch")
    if config.ps_version != "v2":
        raise ConfigError(f"ps_version {config.ps_version} has no form in transformers' layout: write --layout torch")
    depth = config.vision_config.num_hidden_layers
    if config.select_layer not in (-1, depth):
        raise ConfigError(f"select_layer {config.select_layer} has no form in transformers' layout: it knows -1 alone")
    if config.use_backbone_lora or config.use_llm_lora:
        raise ConfigError("LoRA adapters have no form in transformers' layout: merge them first")
    if config.has_router:
        raise ConfigError("the router of Flash models has no form in transformers' layout: write --layout torch")


def hf_config(config, original, tokenizer):
    """``config.json`` of a model in transformers' layout.

    Args:
        config: :class:`~.configuration.InternVLChatConfig`.
        original: the dictionary of the original ``config.json``.
        tokenizer: of the checkpoint.
    """
    vision, llm = config.vision_config, config.llm_config
    kind = _TYPES[llm.family]
    values = {**vision.extra, **vision.to_dict()}
    own = {theirs: values.get(key, default) for key, (theirs, default) in _VISION.items()}
    own |= {
        "model_type": "internvl_vision",
        "image_size": [config.image_size] * 2,
        "patch_size": [vision.patch_size] * 2,
        "hidden_dropout_prob": 0.0,
        "use_absolute_position_embeddings": True,
        "use_mask_token": False,
        "use_mean_pooling": True,
    }
    dropped = {"architectures", "auto_map", "attn_implementation", "_name_or_path", "torch_dtype", "bias", "qkv_bias", KEPT}
    text = {key: value for key, value in llm.to_dict().items() if key not in dropped}
    text["model_type"] = kind
    text["attention_bias" if kind != "qwen2" else "use_cache"] = llm.qkv_bias if kind != "qwen2" else True
    if kind == "llama":
        text["mlp_bias"] = llm.mlp_bias
    if llm.rope_scaling:
        text["rope_scaling"] = {k: v for k, v in llm.rope_scaling.items() if k != "type"} | {"rope_type": llm.rope_type}
    if not text["output_router_logits"]:
        text.pop("output_router_logits")
    if llm.experts is None:
        text.pop("router_aux_loss_coef", None)
    end = tokenizer.convert_tokens_to_ids(stop_token(config))
    if kind != "llama":
        text["eos_token_id"] = end
    return {
        "architectures": ["InternVLForConditionalGeneration"],
        "model_type": "internvl",
        "vision_config": own,
        "text_config": text,
        "downsample_ratio": config.downsample_ratio,
        "dtype": original.get("torch_dtype", original.get("dtype", "bfloat16")),
        "image_seq_length": config.num_image_token,
        "image_token_id": tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": llm.tie_word_embeddings,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        KEPT: original,
    }


def stop_token(config):
    """What ends an answer."""
    from .conversation import get_template

    return get_template(config.template or "internvl2_5").stop


_MEAN, _STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def processor_files(config, tokenizer):
    """``{file: value}`` of what transformers' processor wants beside the weights; Jinja text as a str."""
    size = {"height": config.image_size, "width": config.image_size}
    pictures = {
        "size": size,
        "image_mean": _MEAN,
        "image_std": _STD,
        "resample": 3,
        "rescale_factor": 1 / 255,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "do_convert_rgb": True,
        "processor_class": "InternVLProcessor",
    }
    least, most = config.min_dynamic_patch, config.max_dynamic_patch
    tiles = {"crop_to_patches": True, "min_patches": least, "max_patches": most}
    generation = {"eos_token_id": tokenizer.convert_tokens_to_ids(stop_token(config)), "pad_token_id": tokenizer.pad_token_id}
    return {
        "preprocessor_config.json": {**pictures, **tiles, "image_processor_type": "GotOcr2ImageProcessorFast"},
        "video_preprocessor_config.json": {**pictures, "video_processor_type": "InternVLVideoProcessor"},
        "processor_config.json": {"image_seq_length": config.num_image_token, "processor_class": "InternVLProcessor"},
        "generation_config.json": {k: v for k, v in generation.items() if v is not None},
        "chat_template.jinja": jinja_template(config),
    }


# What the Jinja text needs of the tokenizer.
TOKEN_NAMES = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}

_CONTENT = (
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}{% elif content['type'] == 'video' %}{{ '<video>\n' }}"
    "{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}"
)


def jinja_template(config):
    """The template of a conversation as transformers wants it: no system message unless one is given."""
    from .conversation import get_template

    template = get_template(config.template or "internvl2_5")
    before, after = template.system.split("{}")
    if template.channels:
        role = "{{'<|start|>' + message['role']}}{% if message['role'] == 'assistant' %}{{ '<|channel|>final' }}{% endif %}"
        return (
            "{% for message in messages %}" + role + "{{ '<|message|>' }}" + _CONTENT + "{{'<|end|>'}}{% endfor %}"
            "{% if add_generation_prompt %}{{'<|start|>assistant' }}{% endif %}"
        )
    parts = {"system": (before, after), "user": template.user, "assistant": (template.assistant, template.end)}
    begins, ends = (
        "".join(
            f"{{% {'if' if i == 0 else 'elif'} message['role'] == '{role}' %}}{{{{ {pair[side]!r} }}}}"
            for i, (role, pair) in enumerate(parts.items())
        )
        + "{% endif %}"
        for side in (0, 1)
    )
    return (
        "{% for message in messages %}" + begins + _CONTENT + ends + "{% endfor %}"
        "{% if add_generation_prompt %}{{ " + repr(template.assistant) + " }}{% endif %}"
    )


# Classes of tokenizers that transformers does not have, what stands in for them there, and the key that keeps the name.
TOKENIZERS = {"InternLM2Tokenizer": "LlamaTokenizer", "InternLM3Tokenizer": "LlamaTokenizer"}
TOKENIZER_CLASS = "internvl_tokenizer_class"
