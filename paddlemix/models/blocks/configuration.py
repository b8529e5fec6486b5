"""Configurations of what the family shares: the vision tower and the decoder.

Keys that a file omits take the defaults of the original's classes, which matter for old checkpoints: a 6B vision tower
without ``norm_type`` is RMSNorm. Keys that are not used here are kept and written back.
"""

import dataclasses
import json
import os
from dataclasses import dataclass, field

from paddlemix.errors import ConfigError
from paddlemix.files import read_json
from paddlemix.models.blocks.validation import check_decoder, check_vision
from paddlemix.validation import shown


def class_names(values):
    """Names of classes that the dictionary of a ``config.json`` gives its model, whatever stands there."""
    architectures, code = values.get("architectures"), values.get("auto_map")
    listed = architectures if isinstance(architectures, list) else []
    return [str(name) for name in (*listed, *(code.values() if isinstance(code, dict) else ()))]


@dataclass
class Config:
    """A dataclass that keeps unknown keys in ``extra`` so that nothing of a published file is lost."""

    extra: dict = field(default_factory=dict, repr=False, kw_only=True)

    @classmethod
    def _pick(cls, values, defaults=None):
        names = {f.name for f in dataclasses.fields(cls)} - {"extra"}
        known = {**(defaults or {}), **{k: v for k, v in values.items() if k in names}}
        return cls(**known, extra={k: v for k, v in values.items() if k not in names})

    def to_dict(self):
        """A dictionary as it stands in ``config.json``."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "extra"}
        own = {k: v.to_dict() if isinstance(v, Config) else v for k, v in own.items()}
        return {**self.extra, **own}

    @classmethod
    def from_pretrained(cls, directory):
        """Read ``config.json`` of a checkpoint directory.

        Raises:
            ConfigError: the file is missing, is not JSON, or describes something that is not supported.
        """
        path = os.path.join(directory, "config.json")
        values = read_json(path, absent="a checkpoint directory needs its config.json")
        try:
            return cls.from_dict(values)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    def save(self, directory):
        """Write ``config.json`` into ``directory``, atomically."""
        path = os.path.join(directory, "config.json")
        with open(path + ".tmp", "w", encoding="utf-8") as file:
            json.dump(self.to_dict(), file, ensure_ascii=False, indent=2)
            file.write("\n")
        os.replace(path + ".tmp", path)


@dataclass
class VisionConfig(Config):
    """InternViT (300M and 6B). Defaults are those of the original's class, which are the 6B's."""

    hidden_size: int = 3200
    num_hidden_layers: int = 48
    num_attention_heads: int = 25
    intermediate_size: int = 12800
    image_size: int = 224
    patch_size: int = 14
    num_channels: int = 3
    qkv_bias: bool = False
    qk_normalization: bool = True
    norm_type: str = "rms_norm"
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    drop_path_rate: float = 0.0
    initializer_factor: float = 0.1
    initializer_range: float = 0.02

    def __post_init__(self):
        check_vision(self)

    @property
    def head_dim(self):
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads


# What each language family's own configuration class assumes where a file is silent.
_LANGUAGE_DEFAULTS = {
    "InternLM2ForCausalLM": dict(
        vocab_size=103168,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        max_position_embeddings=2048,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    ),
    "LlamaForCausalLM": dict(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        max_position_embeddings=2048,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "Qwen2ForCausalLM": dict(
        vocab_size=151936,
        hidden_size=4096,
        intermediate_size=22016,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=32768,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
    ),
    "Qwen3ForCausalLM": dict(
        vocab_size=151936,
        hidden_size=4096,
        intermediate_size=22016,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        head_dim=128,
        max_position_embeddings=32768,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
    ),
    "Qwen3MoeForCausalLM": dict(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=24,
        num_attention_heads=32,
        num_key_value_heads=4,
        max_position_embeddings=32768,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        router_aux_loss_coef=0.001,
    ),
    "GptOssForCausalLM": dict(
        vocab_size=201088,
        hidden_size=2880,
        intermediate_size=2880,
        num_hidden_layers=36,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_theta=150000.0,
        rope_scaling={
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
        router_aux_loss_coef=0.9,
    ),
    "InternLM3ForCausalLM": dict(
        vocab_size=128512,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        max_position_embeddings=32768,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    ),
    "Phi3ForCausalLM": dict(
        vocab_size=32064,
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=32,
        num_attention_heads=32,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        bos_token_id=1,
        eos_token_id=32000,
        pad_token_id=32000,
    ),
}


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in place of a block's MLP (arXiv 2101.03961).

    Attributes:
        count: experts of a block.
        active: how many of them a token goes through.
        width: inner width of each.
        normalised: whether the weights of a token's experts sum to 1.
        bias: whether the router and the experts have biases.
    """

    count: int
    active: int
    width: int
    normalised: bool
    bias: bool


@dataclass
class LanguageConfig(Config):
    """The decoder. The families differ only in the values here and in their weights' names."""

    # What a model may make fields of. Every so many blocks look at a picture (0: none do), from the first so many positions,
    # at tokens of such a width; queries, keys and values are one product, and so are gate and up, or each is its own.
    cross_attention_frequency = cross_attention_positions = cross_attention_width = 0
    fused_projections = True

    architectures: list
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    rope_scaling: dict | None = None
    hidden_act: str = "silu"
    bos_token_id: int | None = None
    eos_token_id: int | list | None = None
    pad_token_id: int | None = None
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    output_router_logits: bool = False
    router_aux_loss_coef: float = 0.0

    def __post_init__(self):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        check_decoder(self)
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads

    @classmethod
    def from_dict(cls, values):
        """Read ``llm_config`` of a chat model's ``config.json``.

        Raises:
            ConfigError: ``architectures`` is missing or names a language model that is not supported.
        """
        architectures = values.get("architectures")
        if not (isinstance(architectures, list) and architectures and architectures[0] in [*_LANGUAGE_DEFAULTS]):
            raise ConfigError(
                f"llm_config.architectures is {shown(architectures)}: supported are {', '.join(_LANGUAGE_DEFAULTS)}"
            )
        parameters = values.get("rope_parameters")  # how transformers 5 writes rope_theta and rope_scaling
        if isinstance(parameters, dict):
            scaling = {key: value for key, value in parameters.items() if key != "rope_theta"}
            plain = scaling.get("rope_type", "default") == "default"
            values = {"rope_scaling": None if plain else scaling, **values}
            if "rope_theta" in parameters:
                values = {"rope_theta": parameters["rope_theta"], **values}
        return cls._pick(values, _LANGUAGE_DEFAULTS[architectures[0]])

    @property
    def family(self):
        """The published class name, such as ``Qwen2ForCausalLM``: it decides the weights' names and where biases are."""
        return self.architectures[0]

    @property
    def qkv_bias(self):
        """Whether the projections to queries, keys and values have a bias."""
        return {
            "Qwen2ForCausalLM": True,
            "InternLM2ForCausalLM": self.extra.get("bias", True),
            "InternLM3ForCausalLM": self.extra.get("qkv_bias", False),
            "GptOssForCausalLM": self.extra.get("attention_bias", True),
            "Phi3ForCausalLM": False,
        }.get(self.family, self.extra.get("attention_bias", False))

    @property
    def o_bias(self):
        """Whether the output projection of attention has a bias."""
        if self.family == "InternLM3ForCausalLM":
            return self.extra.get("bias", False)
        return self.qkv_bias and self.family != "Qwen2ForCausalLM"

    @property
    def mlp_bias(self):
        """Whether the MLP has biases; those of experts: :attr:`experts`."""
        key = {"InternLM3ForCausalLM": "bias", "LlamaForCausalLM": "mlp_bias"}.get(self.family)
        return key is not None and self.extra.get(key, False)

    @property
    def qk_norm(self):
        """Whether queries and keys of each head are normalised before they are rotated."""
        return self.family in ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM")

    @property
    def may_lack_head(self):
        """Whether files without an output head of its own are whole: Qwen3's are published tied, untied, and saying either."""
        return self.family in ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM")

    @property
    def sinks(self):
        """Whether each head has a learned logit that takes part in its softmax and stands for no token."""
        return self.family == "GptOssForCausalLM"

    @property
    def swiglu_limit(self):
        """Where gpt-oss cuts what goes into its gate (arXiv 2508.10925); None for a plain SiLU gate."""
        return self.extra.get("swiglu_limit", 7.0) if self.family == "GptOssForCausalLM" else None

    @property
    def experts(self):
        """The :class:`Experts` of the sparse layers, or None where there are none."""
        get = self.extra.get
        if self.family == "GptOssForCausalLM":
            return Experts(
                get("num_local_experts", 128), get("num_experts_per_tok", 4), self.intermediate_size, normalised=True, bias=True
            )
        if self.family == "Qwen3MoeForCausalLM" and get("num_experts", 128):
            return Experts(
                get("num_experts", 128),
                get("num_experts_per_tok", 8),
                get("moe_intermediate_size", 768),
                normalised=get("norm_topk_prob", False),
                bias=False,
            )
        return None

    def is_sparse(self, layer):
        """Whether layer number ``layer`` has experts in place of one MLP."""
        if self.experts is None or layer in (self.extra.get("mlp_only_layers") or ()):
            return False
        return (layer + 1) % self.extra.get("decoder_sparse_step", 1) == 0

    def window(self, layer):
        """How many positions, its own included, a token sees in layer number ``layer``; None for all."""
        if self.family != "GptOssForCausalLM":
            return None
        kinds = self.extra.get("layer_types")
        sliding = kinds[layer] == "sliding_attention" if kinds else layer % 2 == 0
        return self.extra.get("sliding_window", 128) if sliding else None

    @property
    def rope_type(self):
        """``default``, ``linear``, ``dynamic`` (NTK), ``yarn`` or ``longrope`` (Phi-3's, called ``su`` in older files)."""
        scaling = self.rope_scaling or {}
        kind = scaling.get("type", scaling.get("rope_type", "default"))
        return "longrope" if kind == "su" else kind

    @property
    def original_max_position_embeddings(self):
        """Context length before Phi-3's long-context scaling, or YaRN's."""
        scaling = self.rope_scaling or {}
        return (
            self.extra.get("original_max_position_embeddings")
            or scaling.get("original_max_position_embeddings")
            or self.max_position_embeddings
        )

    @property
    def context_length(self):
        """Largest number of positions that the model is defined for: prompt and answer together.

        Dynamic NTK scaling stretches ``max_position_embeddings`` by its factor. A sliding window, where one is in use,
        bounds it, because attention here always sees the whole context.
        """
        length = self.max_position_embeddings
        if self.rope_type == "dynamic":
            length = int(length * self.rope_scaling.get("factor", 1.0))
        uses_window = self.family == "Phi3ForCausalLM" or self.extra.get("use_sliding_window", False)
        window = self.extra.get("sliding_window") if uses_window else None
        return min(length, window) if window else length
