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


@dataclass
class LanguageConfig(Config):
    """The decoder. InternLM2, Llama, Qwen2 and Phi-3 differ only in the values here and in their weights' names."""

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
    rope_scaling: dict | None = None
    hidden_act: str = "silu"
    bos_token_id: int | None = None
    eos_token_id: int | list | None = None
    pad_token_id: int | None = None
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02

    def __post_init__(self):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        check_decoder(self)
        if (self.extra.get("head_dim") or self.head_dim) != self.head_dim:
            raise ConfigError(
                f"llm_config.head_dim is {self.extra['head_dim']}: only hidden_size / num_attention_heads "
                f"({self.head_dim}) is supported"
            )

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
        return cls._pick(values, _LANGUAGE_DEFAULTS[architectures[0]])

    @property
    def family(self):
        """The published class name, such as ``Qwen2ForCausalLM``: it decides the weights' names and where biases are."""
        return self.architectures[0]

    @property
    def head_dim(self):
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def qkv_bias(self):
        """Whether the projections to queries, keys and values have a bias."""
        return {
            "Qwen2ForCausalLM": True,
            "InternLM2ForCausalLM": self.extra.get("bias", True),
            "LlamaForCausalLM": self.extra.get("attention_bias", False),
            "Phi3ForCausalLM": False,
        }[self.family]

    @property
    def o_bias(self):
        """Whether the output projection of attention has a bias."""
        return self.qkv_bias and self.family != "Qwen2ForCausalLM"

    @property
    def rope_type(self):
        """``default``, ``linear``, ``dynamic`` (NTK) or ``longrope`` (Phi-3's, called ``su`` in older files)."""
        scaling = self.rope_scaling or {}
        kind = scaling.get("type", scaling.get("rope_type", "default"))
        return "longrope" if kind == "su" else kind

    @property
    def original_max_position_embeddings(self):
        """Context length before Phi-3's long-context scaling."""
        return self.extra.get("original_max_position_embeddings") or self.max_position_embeddings

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
