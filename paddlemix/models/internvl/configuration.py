"""Configuration of InternVL-14B, read from a released ``config.json``."""

import dataclasses
from dataclasses import dataclass

from paddlemix.errors import ConfigError
from paddlemix.models.blocks.configuration import Config, LanguageConfig, VisionConfig
from paddlemix.validation import DEVIATION, HEADS, LAYERS, RANK, SIDE, WIDTH, Number, check, optional

_RULES = {
    "clip_embed_dim": WIDTH,
    "attn_pool_num_heads": HEADS,
    "num_query_token": WIDTH,
    "cross_attention_frequency": LAYERS,
    "label_smoothing": Number(0, 1, below=True),
    "use_backbone_lora": RANK,
    "use_qllama_lora": RANK,
    "force_image_size": optional(SIDE),
    "initializer_range": DEVIATION,
}


@dataclass
class QLLaMAConfig(LanguageConfig):
    """LLaMA-7B with a multilingual vocabulary, and cross-attention to a picture in some of its blocks."""

    cross_attention_frequency: int = 0
    cross_attention_width: int = 0
    cross_attention_positions: int = 0
    fused_projections: bool = False  # the file's names are the model's

    def to_dict(self):
        values = super().to_dict()
        for name in ("cross_attention_frequency", "cross_attention_width", "cross_attention_positions", "fused_projections"):
            del values[name]  # the whole model's configuration says so
        return values


@dataclass
class InternVLConfig(Config):
    """A whole model: vision tower, QLLaMA, and the two poolings between them. Defaults are those of InternVL-14B-224px."""

    vision_config: VisionConfig
    qllama_config: QLLaMAConfig
    clip_embed_dim: int = 768
    attn_pool_num_heads: int = 16
    num_query_token: int = 96
    cross_attention_frequency: int = 2
    label_smoothing: float = 0.0
    use_backbone_lora: int = 0
    use_qllama_lora: int = 0
    force_image_size: int | None = None
    initializer_range: float = 0.02

    def __post_init__(self):
        check({**self.extra, **vars(self)}, _RULES)
        for part in (self.vision_config, self.qllama_config):
            if part.hidden_size % self.attn_pool_num_heads:
                raise ConfigError(
                    f"attn_pool_num_heads is {self.attn_pool_num_heads}: both widths, {self.vision_config.hidden_size} and "
                    f"{self.qllama_config.hidden_size}, must be multiples of it"
                )
        if self.force_image_size:  # the table of positions in the file is for pictures of this size
            self.vision_config = dataclasses.replace(self.vision_config, image_size=self.force_image_size)
        self.qllama_config.cross_attention_frequency = self.cross_attention_frequency
        self.qllama_config.cross_attention_width = self.vision_config.hidden_size
        self.qllama_config.cross_attention_positions = self.num_query_token

    @classmethod
    def from_dict(cls, values):
        """Build from the dictionary of a ``config.json``.

        Raises:
            ConfigError: a part is missing, or describes something that is not supported.
        """
        for key in ("vision_config", "qllama_config"):
            if not isinstance(values.get(key), dict):
                raise ConfigError(f"'{key}' is missing: this is not the config.json of InternVL-14B (InternVL-C and -G)")
        values = dict(values)
        values["vision_config"] = VisionConfig._pick(values["vision_config"])
        language = {"vocab_size": 49954, **values["qllama_config"]}
        language["architectures"] = language.get("architectures") or ["LlamaForCausalLM"]
        try:
            values["qllama_config"] = QLLaMAConfig.from_dict(language)
        except ConfigError as error:
            raise ConfigError(str(error).replace("llm_config", "qllama_config")) from None
        return cls._pick(values)

    def to_dict(self):
        values = super().to_dict()
        values.setdefault("architectures", ["InternVLModel"])
        values.setdefault("model_type", "internvl")
        return values

    @property
    def image_size(self):
        """Side of a picture in pixels that the model was trained with."""
        return self.vision_config.image_size

    def weight_table(self):
        """How each parameter of the model is made of published tensors: see :mod:`paddlemix.checkpoints.names`."""
        from paddlemix.checkpoints import names  # here, because reading a configuration needs none of it
        from paddlemix.models.blocks.adapters import with_adapters

        vision, language = self.vision_config, self.qllama_config
        table = [
            *names.vision(vision),
            *names.attention_pooling("clip_projector", vision.hidden_size, self.clip_embed_dim),
            *names.attention_pooling("clip_projector2", language.hidden_size, self.clip_embed_dim),
            names.plain("query_tokens", 1, self.num_query_token, language.hidden_size),
            names.plain("text_projection", language.hidden_size, self.clip_embed_dim),
            names.plain("logit_scale"),
            *names.linear("itm_head", language.hidden_size, 2, bias=True),
            *names.language(language, "qllama"),
        ]
        return with_adapters(table, self)


@dataclass
class TowerConfig(Config):
    """A vision tower by itself, or the part of a whole model's file that is one.

    Attributes:
        vision_config: the tower.
        reads_only: what the names of its tensors begin with in the file.
        use_backbone_lora: rank of the adapters in the file.
    """

    vision_config: VisionConfig
    reads_only: str = ""
    use_backbone_lora: int = 0

    @classmethod
    def from_dict(cls, values):
        """Of a tower's own ``config.json``, or of a whole model's."""
        inner = values.get("vision_config")
        if not isinstance(inner, dict):
            return cls(VisionConfig._pick(values))
        rank = values.get("use_backbone_lora") or 0
        check({"use_backbone_lora": rank}, {"use_backbone_lora": RANK})
        config = cls(VisionConfig._pick(inner), "vision_model.", rank)
        if "qllama_config" in values and values.get("force_image_size"):  # see InternVLConfig
            config.vision_config = dataclasses.replace(config.vision_config, image_size=values["force_image_size"])
        return config

    def to_dict(self):
        values = self.vision_config.to_dict()
        return {**values, "architectures": ["InternVisionModel"], "model_type": "intern_vit_6b"}

    def weight_table(self):
        """As :meth:`InternVLConfig.weight_table`, of a model that has the tower as ``vision_model``."""
        from paddlemix.checkpoints import names
        from paddlemix.models.blocks.adapters import with_adapters

        table = with_adapters(names.vision(self.vision_config), self)
        if self.reads_only:
            return table
        return [w._replace(parts=tuple(p._replace(name=p.name.removeprefix("vision_model.")) for p in w.parts)) for w in table]
