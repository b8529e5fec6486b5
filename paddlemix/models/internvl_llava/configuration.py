"""Configuration of InternVL-Chat-LLaVA, read from a released ``config.json``.

The file is flat: the language model's keys, and beside them those of pictures, which begin with ``mm_``. It names the vision
tower but does not describe it; that is in the tower's own file.
"""

import dataclasses
import os
import re
from dataclasses import dataclass

from paddlemix.errors import ConfigError
from paddlemix.models.blocks.configuration import Config, LanguageConfig, VisionConfig, class_names
from paddlemix.validation import LAYERS, RANK, SIDE, WIDTH, Flag, Integer, OneOf, Text, check, optional, shown

MODEL_TYPES = ("llava_llama", "llava")
_RULES = {
    "mm_vision_tower": optional(Text(4096)),
    "mm_hidden_size": optional(WIDTH),
    "mm_projector_type": Text(100),
    "mm_vision_select_layer": Integer(-LAYERS.high - 1, LAYERS.high),
    "mm_vision_select_feature": OneOf(("patch", "cls_patch")),
    "mm_use_im_start_end": Flag(),
    "mm_use_im_patch_token": Flag(),
    "image_aspect_ratio": optional(Text(100)),
    "mm_image_size": optional(SIDE),
    "use_llm_lora": RANK,
}
_OTHER_TOWERS = re.compile(r"clip|eva|internvl[-_]?14b", re.IGNORECASE)


def is_llava(values):
    """Whether the dictionary of a ``config.json`` is of such a checkpoint, by any of the marks that published ones have."""
    return str(values.get("model_type")).startswith("llava") or any("Llava" in name for name in class_names(values))


@dataclass
class LlavaConfig(Config):
    """A whole model. Defaults are what the original takes for keys that a file lacks.

    Attributes:
        vision_config: of the tower; None until its file was read.
        mm_image_size: side of a picture in pixels, a key of ours that goes before the original's rule.
        use_llm_lora: rank of adapters that are not merged.
        use_backbone_lora: the same of the vision tower, which has none.
    """

    # What every chat model says of its pictures: here each is one tile, and all its patches are kept.
    has_hf_layout = False
    downsample_ratio = 1.0
    template = "vicuna_v1"
    system_message = None
    dynamic_image_size = use_thumbnail = False
    min_dynamic_patch = max_dynamic_patch = 1

    llm_config: LanguageConfig
    vision_config: VisionConfig | None = None
    mm_vision_tower: str | None = None
    mm_hidden_size: int | None = None
    mm_projector_type: str = "linear"
    mm_vision_select_layer: int = -1
    mm_vision_select_feature: str = "patch"
    mm_use_im_start_end: bool = False
    mm_use_im_patch_token: bool = True
    image_aspect_ratio: str | None = "square"
    mm_image_size: int | None = None
    use_llm_lora: int = 0
    use_backbone_lora: int = 0

    def __post_init__(self):
        check({**self.extra, **vars(self)}, _RULES)
        self.projector_layers()
        if _OTHER_TOWERS.search(os.path.basename(self.mm_vision_tower or "")):
            raise ConfigError(f"mm_vision_tower is {shown(self.mm_vision_tower)}: only InternViT towers are supported")
        if self.vision_config is not None:
            self._check_tower()

    def _check_tower(self):
        depth = self.vision_config.num_hidden_layers
        if not -depth - 1 <= self.select_layer <= depth:
            raise ConfigError(f"mm_vision_select_layer is {self.select_layer}, but the vision tower has {depth} layers")
        width = self.vision_config.hidden_size
        if self.mm_hidden_size not in (None, width):
            raise ConfigError(
                f"mm_hidden_size is {self.mm_hidden_size}, but the vision tower {self.mm_vision_tower} is {width} wide: give "
                "the tower that the projector was trained with"
            )
        patch = self.vision_config.patch_size
        if self.image_size % patch:
            raise ConfigError(f"mm_image_size is {self.image_size}: it must be a multiple of the patches of {patch} pixels")

    @classmethod
    def from_dict(cls, values):
        """Build from the dictionary of a ``config.json``.

        Raises:
            ConfigError: it is of another kind of model, or describes something that is not supported.
        """
        kind, architectures = values.get("model_type"), values.get("architectures") or []
        if kind not in MODEL_TYPES and "LlavaLlamaForCausalLM" not in architectures:
            raise ConfigError(
                f"model_type is {shown(kind)}: an InternVL-Chat-LLaVA checkpoint has one of {', '.join(MODEL_TYPES)}"
            )
        values = dict(values)
        tower = values.pop("mm_vision_config", None)
        try:
            llm = LanguageConfig.from_dict({**values, "architectures": ["LlamaForCausalLM"]})
        except ConfigError as error:
            raise ConfigError(str(error).replace("llm_config.", "")) from None
        own = {f.name for f in dataclasses.fields(cls)}
        language = {f.name for f in dataclasses.fields(LanguageConfig)} - {"extra"}
        # In its own part, a file's key would be there twice.
        llm.extra = {key: value for key, value in llm.extra.items() if key in ("attention_bias", "head_dim")}
        rest = {
            key: value for key, value in values.items() if key not in language and key not in ("vision_config", "llm_config")
        }
        known = {key: value for key, value in rest.items() if key in own}
        extra = {key: value for key, value in rest.items() if key not in own}
        if isinstance(tower, dict):
            known["vision_config"] = VisionConfig._pick(tower)
        return cls(llm_config=llm, **known, extra=extra)

    @classmethod
    def from_language(cls, values, **options):
        """Of a plain Llama's ``config.json`` that pictures are added to; ``options`` are fields of this class."""
        values = {**values, "model_type": "llava_llama", **{k: v for k, v in options.items() if k != "vision_config"}}
        config = cls.from_dict(values)
        return dataclasses.replace(config, vision_config=options.get("vision_config"))

    def to_dict(self):
        values = super().to_dict()
        language, vision = values.pop("llm_config"), values.pop("vision_config")
        values = {**self.extra, **language, **{k: v for k, v in values.items() if k not in self.extra}}
        if vision is not None:
            values["mm_vision_config"] = vision
        for name in ("mm_image_size", "use_llm_lora", "use_backbone_lora"):
            if not values.get(name):
                values.pop(name, None)
        values["architectures"] = ["LlavaLlamaForCausalLM"]
        values.setdefault("model_type", "llava_llama")
        values["use_mm_proj"] = True
        return values

    def with_tower(self, vision_config, name=None):
        """The same with the tower ``vision_config``, called ``name`` if that is not None."""
        name = self.mm_vision_tower if name is None else name
        return dataclasses.replace(self, vision_config=vision_config, mm_vision_tower=name)

    @property
    def select_layer(self):
        """Which hidden state of the tower: 0 is the embedding, -1 the last block's output."""
        return self.mm_vision_select_layer

    @property
    def image_size(self):
        """Side of a picture in pixels: 448 for towers that are named or made so, else 336, as the original has it."""
        if self.mm_image_size:
            return self.mm_image_size
        made_for = self.vision_config.image_size if self.vision_config else 0
        return 448 if made_for == 448 or "448" in os.path.basename((self.mm_vision_tower or "").rstrip("/")) else 336

    @property
    def num_image_token(self):
        """Tokens that a picture becomes: 576 at 336 pixels."""
        return (self.image_size // self.vision_config.patch_size) ** 2 + (self.mm_vision_select_feature == "cls_patch")

    def projector_layers(self):
        """The projector's layers in order: ``(number in the published name or None, whether it is a norm)``.

        Raises:
            ConfigError: there is no such projector here.
        """
        kind = self.mm_projector_type
        if kind == "identity":
            return []
        if kind == "linear":
            return [(None, False)]
        normed = "ln" in kind
        match = re.fullmatch(r"mlp(\d{1,2})x_gelu", re.sub("_?ln_?", "_", kind).strip("_"))
        if not match or not 1 <= int(match[1]) <= 16:
            raise ConfigError(
                f"mm_projector_type is {shown(kind)}: supported are mlpNx_gelu (such as mlp2x_gelu, with ln for a norm before "
                "it), linear and identity"
            )
        return [(0, True)] * normed + [(normed + 2 * i, False) for i in range(int(match[1]))]

    def weight_table(self):
        """How each parameter of the model is made of published tensors: see :mod:`paddlemix.checkpoints.names`."""
        from .checkpoint import weight_table  # here, because reading a configuration needs none of it

        return weight_table(self)
