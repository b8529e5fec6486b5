"""What configurations may say: one table of rules for each part, and the relations between values.

Every configuration class asks here when it is made, so that nothing else has to: sizes, types and relations hold for
whoever builds, counts, plans or converts. A new family adds rows to a table, or brings a table of its own.
"""

from paddlemix.errors import ConfigError
from paddlemix.validation import (
    DEVIATION,
    EPSILON,
    HEADS,
    LAYERS,
    PATCH,
    POSITIONS,
    RANK,
    SEED,
    SIDE,
    TILES,
    TOKEN_ID,
    VOCABULARY,
    WIDTH,
    Dictionary,
    Either,
    Flag,
    Integer,
    Items,
    Number,
    OneOf,
    Text,
    check,
    optional,
    shown,
)

VISION = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": WIDTH,
    "image_size": SIDE,
    "patch_size": PATCH,
    "num_channels": OneOf((3,)),
    "qkv_bias": Flag(),
    "qk_normalization": Flag(),
    "norm_type": OneOf(("rms_norm", "layer_norm")),
    "hidden_act": OneOf(("gelu",)),
    "layer_norm_eps": EPSILON,
    "drop_path_rate": Number(0, 1, below=True),
    "initializer_factor": DEVIATION,
    "initializer_range": DEVIATION,
}

# Of all families: a name that a family does not know is not in its files, or lies there unused.
DECODER = {
    "architectures": Items(Text(100), 1, 16),
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "head_dim": optional(WIDTH),
    "max_position_embeddings": POSITIONS,
    "original_max_position_embeddings": optional(POSITIONS),
    "rms_norm_eps": EPSILON,
    "rope_theta": Number(1, 1e15),
    "rope_scaling": optional(Dictionary()),
    "hidden_act": OneOf(("silu",)),
    "bos_token_id": optional(TOKEN_ID),
    "eos_token_id": optional(Either(TOKEN_ID, Items(TOKEN_ID, 1, 1000))),
    "pad_token_id": optional(TOKEN_ID),
    "tie_word_embeddings": Flag(),
    "initializer_range": DEVIATION,
    "bias": Flag(),
    "attention_bias": Flag(),
    "use_sliding_window": Flag(),
    "sliding_window": optional(POSITIONS),
    "mlp_bias": Flag(),
    "layer_types": optional(Items(OneOf(("sliding_attention", "full_attention")), 1, LAYERS.high)),
    "swiglu_limit": Number(0, 1e6, above=True),
    "num_experts": optional(Integer(0, 4096)),
    "num_local_experts": Integer(1, 4096),
    "num_experts_per_tok": optional(Integer(1, 4096)),
    "moe_intermediate_size": optional(WIDTH),
    "norm_topk_prob": Flag(),
    "decoder_sparse_step": Integer(1, LAYERS.high),
    "mlp_only_layers": optional(Items(Integer(0, LAYERS.high), 0, LAYERS.high)),
    "output_router_logits": Flag(),
    "router_aux_loss_coef": Number(0, 1e3),
}

# Keys of each kind of rotary scaling.
ROPE_SCALINGS = {
    "default": {},
    "linear": {"factor": Number(1, 1e4)},
    "dynamic": {"factor": Number(1, 1e4)},
    "yarn": {"factor": Number(1, 1e4)},
    "longrope": {"short_factor": Items(Number(0, 1e6, above=True)), "long_factor": Items(Number(0, 1e6, above=True))},
}

CHAT = {
    "select_layer": Integer(-LAYERS.high - 1, LAYERS.high),
    "force_image_size": optional(SIDE),
    "downsample_ratio": Number(0.125, 1),
    "template": optional(Text(100)),
    "ps_version": OneOf(("v1", "v2")),
    "dynamic_image_size": Flag(),
    "use_thumbnail": Flag(),
    "min_dynamic_patch": TILES,
    "max_dynamic_patch": TILES,
    "pad2square": Flag(),
    "use_backbone_lora": RANK,
    "use_llm_lora": RANK,
    "system_message": optional(Text()),
    "flash_mode": Flag(),
    "flash_relative_threshold": Number(0, 1),
    "flash_absolute_threshold": Number(0, 1),
}

# How answers are generated: kinds and upper bounds. GenerationConfig says in words what is too small.
GENERATION = {
    "max_new_tokens": Integer(-POSITIONS.high, POSITIONS.high),
    "min_new_tokens": Integer(-POSITIONS.high, POSITIONS.high),
    "do_sample": Flag(),
    "temperature": Number(-1e4, 1e4),
    "top_k": optional(Integer(-(1 << 31), 1 << 31)),
    "top_p": Number(-1e4, 1e4),
    "repetition_penalty": Number(-1e4, 1e4),
    "eos_token_id": optional(Either(TOKEN_ID, Items(TOKEN_ID, 0, 1000))),
    "pad_token_id": optional(TOKEN_ID),
    "stop_strings": Items(Text(), 0, 1000),
    "seed": optional(SEED),
    "min_p": Number(-1e4, 1e4),
    "max_length": optional(Integer(-POSITIONS.high, POSITIONS.high)),
    "min_length": Integer(-POSITIONS.high, POSITIONS.high),
}

_PATCHES = Integer(1, 512)  # along one side of a picture


def check_vision(config, where="vision_config."):
    """Hold a vision tower's configuration against :data:`VISION`.

    Raises:
        ConfigError: names the first key that is wrong, ``where`` before it.
    """
    check(_values(config), VISION, where)
    check_multiple(config, "hidden_size", "num_attention_heads", where)
    if not _PATCHES.accepts(config.image_size // config.patch_size):
        raise ConfigError(
            f"{where}image_size is {config.image_size} and patch_size {config.patch_size}: a side must have "
            f"{_PATCHES.low} to {_PATCHES.high} patches"
        )


def check_decoder(config, where="llm_config."):
    """Hold a language model's configuration against :data:`DECODER`, and its rotary scaling against :data:`ROPE_SCALINGS`.

    Args:
        config: has ``head_dim`` and ``rope_type`` beside its fields.

    Raises:
        ConfigError: names the first key that is wrong, ``where`` before it.
    """
    check(_values(config), DECODER, where)
    check_multiple(config, "num_attention_heads", "num_key_value_heads", where)
    width, name = config.head_dim, "head_dim"
    if width is None:
        check_multiple(config, "hidden_size", "num_attention_heads", where)
        width, name = config.hidden_size // config.num_attention_heads, "hidden_size / num_attention_heads"
    if width % 2:
        raise ConfigError(f"{where}{name} is {width}: heads need an even width, because rotary positions turn pairs")
    experts = config.experts
    if experts and experts.active > experts.count:
        raise ConfigError(
            f"{where}num_experts_per_tok is {experts.active}, but there are {experts.count} experts: take config.json and "
            "weights from the same model"
        )
    kinds = config.extra.get("layer_types")
    if kinds and len(kinds) != config.num_hidden_layers:
        raise ConfigError(f"{where}layer_types has {len(kinds)} entries: there are {config.num_hidden_layers} layers")
    kind, scaling = config.rope_type, config.rope_scaling or {}
    if not isinstance(kind, str) or kind not in ROPE_SCALINGS:
        others = ", ".join(name for name in ROPE_SCALINGS if name not in ("default", "longrope"))
        raise ConfigError(f"{where}rope_scaling has type {shown(kind)}: supported are {others}, su and longrope")
    for name, rule in ROPE_SCALINGS[kind].items():
        if name not in scaling:
            raise ConfigError(f"{where}rope_scaling.{name} is missing: type '{kind}' needs it")
        check(scaling, {name: rule}, f"{where}rope_scaling.")
        if isinstance(rule, Items) and len(scaling[name]) != width // 2:
            raise ConfigError(
                f"{where}rope_scaling.{name} has {len(scaling[name])} values: it must have {width // 2}, one for "
                "each pair of a head"
            )
    if kind == "dynamic" and width < 4:
        raise ConfigError(f"{where}rope_scaling of type 'dynamic' needs heads of width 4 or more, not {width}")
    if kind == "longrope" and config.original_max_position_embeddings < 2:
        raise ConfigError(f"{where}original_max_position_embeddings is 1: rotary scaling needs at least 2")


def check_chat(config, templates):
    """Hold what a chat model says of its pictures and prompts against :data:`CHAT`, and against its two parts.

    Args:
        config: has the parts ``vision_config`` and ``llm_config``, which are checked already, and ``image_size``.
        templates: names of the conversation templates that there are.

    Raises:
        ConfigError: names the first key that is wrong.
    """
    check(_values(config), CHAT)
    if config.template is not None and config.template not in templates:
        raise ConfigError(f"template is {shown(config.template)}: supported are {', '.join(templates)}")
    if config.min_dynamic_patch > config.max_dynamic_patch:
        raise ConfigError(
            f"min_dynamic_patch is {config.min_dynamic_patch}, more than max_dynamic_patch ({config.max_dynamic_patch})"
        )
    # The depth that the feature layer names counts from the embedding (0) to the last block.
    depth = config.vision_config.num_hidden_layers
    if not -depth - 1 <= config.select_layer <= depth:
        raise ConfigError(f"select_layer is {config.select_layer}, but the vision model has {depth} layers")
    if config.extra.get("flash_mode"):
        for name in ("flash_relative_threshold", "flash_absolute_threshold"):
            if name not in config.extra:
                raise ConfigError(f"{name} is missing: flash_mode needs it")
        if config.vision_config.hidden_size % 16:
            raise ConfigError("vision_config.hidden_size must be a multiple of 16, the heads of the router, with flash_mode")
    scale = round(1 / config.downsample_ratio)
    if abs(scale * config.downsample_ratio - 1) > 1e-6:
        raise ConfigError(f"downsample_ratio is {config.downsample_ratio}: it must be 1 divided by a whole number, such as 0.5")
    patch = config.vision_config.patch_size
    side = "vision_config.image_size" if config.force_image_size is None else "force_image_size"
    if config.image_size % patch or config.image_size // patch % scale:
        raise ConfigError(
            f"{side} is {config.image_size}: with patches of {patch} pixels and downsample_ratio {config.downsample_ratio} it "
            f"must be a multiple of {patch * scale}"
        )
    if config.image_size // patch > _PATCHES.high:
        raise ConfigError(f"{side} is {config.image_size}: it must have at most {_PATCHES.high} patches of {patch} pixels")


def check_multiple(config, whole, part, where=""):
    """Raise a :class:`~paddlemix.errors.ConfigError` unless the value ``whole`` is a multiple of the value ``part``."""
    if getattr(config, whole) % getattr(config, part):
        raise ConfigError(f"{where}{whole} ({getattr(config, whole)}) is not a multiple of {part} ({getattr(config, part)})")


def _values(config):
    return {**config.extra, **vars(config)}
