"""Configuration of the InternVL chat models, read from any released ``config.json``."""

from dataclasses import dataclass

from paddlemix.checkpoints.mxfp4 import without_mark
from paddlemix.errors import ConfigError
from paddlemix.models.blocks.configuration import Config, LanguageConfig, VisionConfig
from paddlemix.models.blocks.validation import check_chat
from paddlemix.validation import shown

from . import hf

__all__ = ["TEMPLATES", "InternVLChatConfig", "LanguageConfig", "VisionConfig"]

TEMPLATES = ("Hermes-2", "internlm2-chat", "phi3-chat", "internvl2_5", "internvl_zh", "internvl3_5_gpt_oss")


@dataclass
class InternVLChatConfig(Config):
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
        check_chat(self, TEMPLATES)

    @classmethod
    def from_dict(cls, values):
        """Build from the dictionary of a ``config.json``.

        Raises:
            ConfigError: a part is missing, or describes something that is not supported.
        """
        kind = values.get("model_type")
        if isinstance(kind, str) and kind in hf.OTHER_FAMILIES:
            raise ConfigError(f"model_type {shown(kind)} is not supported: {hf.OTHER_FAMILIES[kind]}")
        values = without_mark(values)
        if hf.is_hf(values):
            values = hf.original_config(values)
        for key in ("vision_config", "llm_config"):
            if not isinstance(values.get(key), dict):
                raise ConfigError(f"'{key}' is missing: this is not the config.json of an InternVL chat model")
        values = dict(values)
        values["vision_config"] = VisionConfig._pick(values["vision_config"])
        tied = values.get("tie_word_embeddings", False)  # the language model's own value decides, where it has one
        values["llm_config"] = LanguageConfig.from_dict({"tie_word_embeddings": tied, **values["llm_config"]})
        return cls._pick(values)

    @classmethod
    def from_pretrained(cls, directory):
        """Read the configuration of a checkpoint directory, in the original's layout or in transformers'.

        Raises:
            ConfigError: a file is missing, is not JSON, or describes something that is not supported.
        """
        config = super().from_pretrained(directory)
        if config.extra.get(hf.FROM_HF):
            hf.apply_preprocessor(config, directory)
        return config

    def to_dict(self):
        values = super().to_dict()
        values.pop(hf.FROM_HF, None)
        if self.system_message is None:  # optional in published files: absent means the template's own
            values.pop("system_message")
        values.setdefault("architectures", ["InternVLChatModel"])
        values.setdefault("model_type", "internvl_chat")
        values.setdefault("hidden_size", self.llm_config.hidden_size)
        return values

    def weight_table(self, layout="torch", stacked=False):
        """How each parameter of the model is made of published tensors: see :func:`~.checkpoint.weight_table`."""
        from .checkpoint import weight_table  # here, because reading a configuration needs none of it

        return weight_table(self, layout, stacked)

    @property
    def has_router(self):
        """Whether the checkpoint has the visual resolution router of the Flash models, in use or not."""
        return "flash_mode" in self.extra or "flash_relative_threshold" in self.extra

    @property
    def flash_mode(self):
        """Whether that router is in use."""
        return self.extra.get("flash_mode", False)

    @property
    def image_size(self):
        """Side of a tile in pixels."""
        return self.force_image_size or self.vision_config.image_size

    def tiling(self, max_num=None):
        """Arguments of :func:`~paddlemix.processors.image.load_image` with which this checkpoint was trained to look.

        Args:
            max_num: most tiles of a picture; None for the checkpoint's own.
        """
        return {
            "input_size": self.image_size,
            "min_num": self.min_dynamic_patch,
            "max_num": self.max_dynamic_patch if max_num is None else max_num,
            "use_thumbnail": self.use_thumbnail,
            "pad2square": self.pad2square,
            "dynamic": self.dynamic_image_size,
        }

    @property
    def num_image_token(self):
        """Tokens that one tile becomes: 256 for 448-pixel tiles."""
        return int((self.image_size // self.vision_config.patch_size) ** 2 * self.downsample_ratio**2)
