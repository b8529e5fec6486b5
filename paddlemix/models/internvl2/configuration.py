"""Configurations of the InternVL chat models, read from any released ``config.json``.

Keys that a file omits take the defaults of the original's classes, which matter for old checkpoints: a 6B vision tower
without ``norm_type`` is RMSNorm. Keys that are not used here are kept and written back by :meth:`InternVLChatConfig.save`.
"""

import dataclasses
import json
import os
from dataclasses import dataclass, field

from paddlemix.errors import ConfigError

TEMPLATES = ("Hermes-2", "internlm2-chat", "phi3-chat", "internvl2_5", "internvl_zh")


@dataclass
class _Config:
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
        own = {k: v.to_dict() if isinstance(v, _Config) else v for k, v in own.items()}
        return {**self.extra, **own}


@dataclass
class VisionConfig(_Config):
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
        if self.norm_type not in ("rms_norm", "layer_norm"):
            raise ConfigError(f"vision_config.norm_type is '{self.norm_type}': it must be rms_norm or layer_norm")
        if self.hidden_act != "gelu":
            raise ConfigError(f"vision_config.hidden_act is '{self.hidden_act}': only gelu is supported")
        _check_divides("vision_config", self.hidden_size, self.num_attention_heads)

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
class LanguageConfig(_Config):
    """The decoder. InternLM2, Llama, Qwen2 and Phi-3 differ only in the values here and in their weights' names."""

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
        if self.hidden_act != "silu":
            raise ConfigError(f"llm_config.hidden_act is '{self.hidden_act}': only silu is supported")
        if self.extra.get("head_dim", self.head_dim) != self.head_dim:
            raise ConfigError(
                f"llm_config.head_dim is {self.extra['head_dim']}: only hidden_size / num_attention_heads "
                f"({self.head_dim}) is supported"
            )
        _check_divides("llm_config", self.hidden_size, self.num_attention_heads)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"llm_config.num_attention_heads ({self.num_attention_heads}) is not a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.rope_type not in ("default", "linear", "dynamic", "longrope"):
            raise ConfigError(
                f"llm_config.rope_scaling has type '{self.rope_type}': supported are linear, dynamic, su and longrope"
            )

    @classmethod
    def from_dict(cls, values):
        """Read ``llm_config`` of a chat model's ``config.json``.

        Raises:
            ConfigError: ``architectures`` is missing or names a language model that is not supported.
        """
        family = (values.get("architectures") or [None])[0]
        if family not in _LANGUAGE_DEFAULTS:
            raise ConfigError(
                f"llm_config.architectures is {values.get('architectures')}: supported are {', '.join(_LANGUAGE_DEFAULTS)}"
            )
        return cls._pick(values, _LANGUAGE_DEFAULTS[family])

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


@dataclass
class InternVLChatConfig(_Config):
    """A whole chat model: vision tower, projector, language model, and how pictures and prompts are prepared."""

    vision_config: VisionConfig
    llm_config: LanguageConfig
    select_layer: int = -1
    force_image_size: int | None = None
    downsample_ratio: float = 0.5
    template: str | None = None
    ps_version: str = "v1"
    dynamic_image_size: bool = False
    use_thumbnail: bool = False
    min_dynamic_patch: int = 1
    max_dynamic_patch: int = 6
    pad2square: bool = False
    use_backbone_lora: int = 0
    use_llm_lora: int = 0
    system_message: str | None = None

    def __post_init__(self):
        if self.template is not None and self.template not in TEMPLATES:
            raise ConfigError(f"template is '{self.template}': supported are {', '.join(TEMPLATES)}")
        if self.ps_version not in ("v1", "v2"):
            raise ConfigError(f"ps_version is '{self.ps_version}': it must be v1 or v2")
        # The depth that the feature layer names counts from the embedding (0) to the last block.
        depth = self.vision_config.num_hidden_layers
        if not -depth - 1 <= self.select_layer <= depth:
            raise ConfigError(f"select_layer is {self.select_layer}, but the vision model has {depth} layers")

    @classmethod
    def from_dict(cls, values):
        """Build from the dictionary of a ``config.json``.

        Raises:
            ConfigError: a part is missing, or describes something that is not supported.
        """
        for key in ("vision_config", "llm_config"):
            if not isinstance(values.get(key), dict):
                raise ConfigError(f"'{key}' is missing: this is not the config.json of an InternVL chat model")
        values = dict(values)
        values["vision_config"] = VisionConfig._pick(values["vision_config"])
        values["llm_config"] = LanguageConfig.from_dict(values["llm_config"])
        return cls._pick(values)

    @classmethod
    def from_pretrained(cls, directory):
        """Read ``config.json`` of a checkpoint directory.

        Raises:
            ConfigError: the file is missing, is not JSON, or describes something that is not supported.
        """
        path = os.path.join(directory, "config.json")
        try:
            with open(path, encoding="utf-8") as file:
                values = json.load(file)
        except FileNotFoundError:
            raise ConfigError(f"{path} does not exist: a checkpoint directory needs its config.json") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is not valid JSON ({error}): download or copy it again") from None
        if not isinstance(values, dict):
            raise ConfigError(f"{path} holds no JSON object: download or copy it again")
        try:
            return cls.from_dict(values)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None
        except TypeError as error:
            raise ConfigError(f"{path} has a value of the wrong type ({error})") from None

    def to_dict(self):
        values = super().to_dict()
        if self.system_message is None:  # optional in published files: absent means the template's own
            values.pop("system_message")
        values.setdefault("architectures", ["InternVLChatModel"])
        values.setdefault("model_type", "internvl_chat")
        values.setdefault("hidden_size", self.llm_config.hidden_size)
        return values

    def save(self, directory):
        """Write ``config.json`` into ``directory``, atomically."""
        path = os.path.join(directory, "config.json")
        with open(path + ".tmp", "w", encoding="utf-8") as file:
            json.dump(self.to_dict(), file, ensure_ascii=False, indent=2)
            file.write("\n")
        os.replace(path + ".tmp", path)

    @property
    def image_size(self):
        """Side of a tile in pixels."""
        return self.force_image_size or self.vision_config.image_size

    @property
    def num_image_token(self):
        """Tokens that one tile becomes: 256 for 448-pixel tiles."""
        return int((self.image_size // self.vision_config.patch_size) ** 2 * self.downsample_ratio**2)


def _check_divides(part, hidden_size, heads):
    if hidden_size % heads:
        raise ConfigError(f"{part}.hidden_size ({hidden_size}) is not a multiple of num_attention_heads ({heads})")
