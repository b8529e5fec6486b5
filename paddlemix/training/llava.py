"""Training InternVL-Chat-LLaVA: its arguments, which are the original's, and what is its own in a run of the one trainer."""

import dataclasses
import os
import re
from dataclasses import dataclass

from paddlemix.checkpoints.hub import resolve
from paddlemix.errors import ConfigError, UserError
from paddlemix.files import read_json

from .arguments import DataTrainingArguments, ModelArguments, PreTrainingArguments, _arg, parse
from .building import prepare
from .recipe import ChatRecipe

# Flags of the original's that say how its framework works, or where things are kept.
_IGNORED = "without effect"


@dataclass
class LlavaModelArguments(ModelArguments):
    """Which model, and which of its parts learn. The vision tower never does."""

    version: str = _arg("v0", "how text is written: plain for pictures and captions, v1, or a template's name")
    vision_tower: str | None = _arg(None, "vision tower: a directory or a name")
    mm_vision_select_layer: int = _arg(-1, "hidden state of the vision tower that is used; -1 for the last")
    mm_vision_select_feature: str = _arg("patch", "cls_patch keeps the class token", ("patch", "cls_patch"))
    mm_projector_type: str = _arg("linear", "mlpNx_gelu, linear or identity")
    mm_use_im_start_end: bool = _arg(False, "put tokens around pictures")
    mm_use_im_patch_token: bool = _arg(True, "add <im_patch> to the vocabulary")
    mm_image_size: int | None = _arg(None, "side of a picture in pixels, instead of 448 or 336 by the tower's name")
    pretrain_mm_mlp_adapter: str | None = _arg(None, "mm_projector.bin of the first stage, to start from")
    tune_mm_mlp_adapter: bool = _arg(False, "train the projector alone, and write it alone")
    freeze_mm_mlp_adapter: bool = _arg(False, "keep the projector as it is")
    tune_vit_pos_embedding: bool = _arg(False, "train the vision tower's positions too")
    lora_enable: bool = _arg(False, "train adapters in the language model's blocks instead of its weights")
    lora_r: int = _arg(64, "rank of the adapters")
    lora_alpha: float = _arg(16, "adapters are scaled by this, divided by the rank")
    lora_dropout: float = _arg(0.05, "share of the adapters' inputs that training leaves out")
    lora_weight_path: str = _arg("", _IGNORED)
    lora_bias: str = _arg("none", "none is supported", ("none",))
    bits: int = _arg(16, "8 or 4: weights of so many bits under the adapters", (16, 8, 4))
    double_quant: bool = _arg(True, _IGNORED)
    quant_type: str = _arg("nf4", "without effect: codes of 4 bits are evenly spaced", ("nf4", "fp4", "int4"))

    _adapters = "--lora_enable True"

    def __post_init__(self):
        if self.lora_enable and self.lora_r < 1:
            raise ConfigError(f"--lora_r is {self.lora_r}: it must be at least 1")
        frozen = self.freeze_llm or self.freeze_backbone or self.tune_mm_mlp_adapter  # backbone: the original's word for it
        self.use_llm_lora = self.lora_r if self.lora_enable and not self.tune_mm_mlp_adapter else 0
        self.freeze_llm, self.freeze_mlp = (
            frozen or self.lora_enable,
            self.freeze_mm_mlp_adapter and not self.tune_mm_mlp_adapter,
        )
        self.freeze_backbone = True
        self.load_4bit, self.load_8bit = self.load_4bit or self.bits == 4, self.load_8bit or self.bits == 8
        super().__post_init__()  # of what the original's words mean here
        if self.vision_path or self.mlp_path:
            raise ConfigError(
                "--vision_path and --mlp_path are for other models: use --vision_tower, --pretrain_mm_mlp_adapter"
            )


@dataclass
class LlavaDataArguments(DataTrainingArguments):
    """Which data, and how it becomes tokens and pixels."""

    data_path: str | None = _arg(None, "JSON file of records: one list, or one record a line")
    image_folder: str | None = _arg(None, "folder that the records' pictures are relative to")
    image_aspect_ratio: str = _arg("square", "pad: pictures on a square; square: their middle", ("pad", "square"))
    is_multimodal: bool = _arg(False, _IGNORED)
    lazy_preprocess: bool = _arg(False, _IGNORED)
    image_grid_pinpoints: str | None = _arg(None, _IGNORED)

    def __post_init__(self):
        super().__post_init__()
        if self.use_packed_ds:
            raise ConfigError("--use_packed_ds is not for these models: leave it out")
        if self.meta_path is None:
            self.meta_path = self.data_path  # what the trainer asks for
        else:
            self.data_path = None
        self.dynamic_image_size, self.down_sample_ratio = False, 1.0


@dataclass
class LlavaTrainingArguments(PreTrainingArguments):
    """How to train."""

    do_train: bool = _arg(True, "train")
    optim: str = _arg("adamw_torch", "optimiser", ("adamw", "adamw_torch"))
    per_device_train_batch_size: int = _arg(8, "samples that one process computes at once")
    group_by_length: bool = _arg(False, "put samples of similar length into a batch")
    group_by_modality_length: bool = _arg(False, "the same, and batches of one kind: with pictures, or without")
    model_max_length: int = _arg(512, "longest sample in ids, a picture being one")
    gradient_checkpointing: bool = _arg(False, "same as --recompute")
    deepspeed: str | None = _arg(None, "DeepSpeed's configuration: its ZeRO stage is what --sharding says")
    report_to: str = _arg("none", "where curves go: visualdl, tensorboard, wandb, several by commas, or none")
    tf32: bool = _arg(False, _IGNORED)
    cache_dir: str | None = _arg(None, _IGNORED)
    local_rank: int = _arg(-1, _IGNORED)
    mpt_attn_impl: str = _arg("triton", _IGNORED)
    run_name: str | None = _arg(None, _IGNORED)

    def __post_init__(self):
        if self.deepspeed is not None and not self.sharding:
            self.sharding = zero_stage(self.deepspeed)
        self.recompute = self.recompute or self.gradient_checkpointing
        self.group_by_length = self.group_by_length or self.group_by_modality_length
        if self.model_max_length < 2:
            raise ConfigError(f"--model_max_length is {self.model_max_length}: it must be at least 2")
        super().__post_init__()


CLASSES = (LlavaModelArguments, LlavaDataArguments, LlavaTrainingArguments)


def zero_stage(path):
    """``stageN``, or nothing for stage 0, of a DeepSpeed configuration; where there is no such file, of its name.

    Raises:
        ConfigError: neither says a stage.
    """
    stage = None
    if os.path.isfile(path):
        values = read_json(path).get("zero_optimization", {})
        stage = values.get("stage", 0) if isinstance(values, dict) else None
    elif match := re.search(r"(?:zero|stage)_?(?:stage_?)?([0-3])", os.path.basename(path)):
        stage = int(match[1])
    if stage not in (0, 1, 2, 3):
        raise ConfigError(f"--deepspeed {path} tells no ZeRO stage of 0 to 3: use --sharding stage1, stage2 or stage3 instead")
    return f"stage{stage}" if stage else ""


def parse_llava(argv, extra=()):
    """The arguments of a run: (:class:`LlavaModelArguments`, :class:`LlavaDataArguments`, :class:`LlavaTrainingArguments`)."""
    arguments = parse(argv, prog="train.py", extra=extra, classes=CLASSES)
    arguments[1].max_seq_length = arguments[2].model_max_length
    if arguments[1].meta_path is None and arguments[2].do_train:
        raise ConfigError("--data_path is missing: name the JSON file of your records, and its pictures by --image_folder")
    return arguments


# ---------------------------------------------------------------------- the model


def start_config(model_args):
    """Configuration of the model that a run starts from, and where its tower is if a directory is known.

    Raises:
        UserError: files are missing, or a tower is not named.
    """
    from paddlemix.models.internvl_llava import checkpoint as files
    from paddlemix.models.internvl_llava.configuration import MODEL_TYPES, LlavaConfig
    from paddlemix.models.internvl_llava.modeling import find_tower

    directory = resolve(model_args.model_name_or_path)
    values = read_json(os.path.join(directory, "config.json"), absent="a language model needs its config.json")
    options = {
        "mm_vision_tower": model_args.vision_tower or values.get("mm_vision_tower"),
        "mm_vision_select_layer": model_args.mm_vision_select_layer,
        "mm_vision_select_feature": model_args.mm_vision_select_feature,
        "mm_projector_type": model_args.mm_projector_type,
        "mm_use_im_start_end": model_args.mm_use_im_start_end,
        "mm_use_im_patch_token": model_args.mm_use_im_patch_token,
    }
    if model_args.mm_image_size:
        options["mm_image_size"] = model_args.mm_image_size
    if values.get("model_type") in MODEL_TYPES:
        config = LlavaConfig.from_dict({**values, **options})
        form = files.form_of(directory)
        config, tower = find_tower(directory, config, model_args.vision_tower, form.whole)
        return config, tower, directory
    if model_args.vision_tower is None:
        raise ConfigError("--vision_tower is missing: name the vision tower that the language model shall see with")
    tower = files.tower_in(resolve(model_args.vision_tower))
    config = LlavaConfig.from_language(values, **options, mm_hidden_size=tower.config.hidden_size, vision_config=tower.config)
    return config, tower, directory


class LlavaRecipe(ChatRecipe):
    """What a run of the trainer does in LLaVA's own way; see :class:`~.recipe.ChatRecipe`.

    Args:
        model_args, data_args, args: from :func:`parse_llava`.
    """

    divides_layers = False

    def __init__(self, model_args, data_args, args):
        self.model_args, self.data_args, self.args = model_args, data_args, args
        self._adapters = None

    def build_model(self, model_args, data_args, dtype, checkpoint=None, keep=None):
        """The model and its tokenizer; see :func:`~.building.build_model`. Weights are divided once all are there."""
        import paddle

        from paddlemix.checkpoints.checkpoint import Checkpoint
        from paddlemix.models.blocks.quantising import prepare_adapted, settle
        from paddlemix.models.internvl_llava import LlavaForCausalLM, load_tokenizer
        from paddlemix.models.internvl_llava import checkpoint as files
        from paddlemix.models.internvl_llava.modeling import grow_vocabulary
        from paddlemix.models.internvl_llava.tokenization import add_picture_tokens

        form = None if checkpoint is None else files.form_of(checkpoint)
        if form and form.whole:
            model = LlavaForCausalLM.from_pretrained(checkpoint, dtype=dtype, engine="eager")
            model.config.image_aspect_ratio = data_args.image_aspect_ratio
            return model, load_tokenizer(checkpoint), resolve(checkpoint)
        config, tower, directory = start_config(model_args)
        config.image_aspect_ratio = data_args.image_aspect_ratio
        tokenizer = load_tokenizer(directory)
        add_picture_tokens(tokenizer, config.to_dict())
        start = files.form_of(directory)
        if not start.whole:
            raise ConfigError(f"{directory} has no weights of a language model: start from one, with --pretrain_mm_mlp_adapter")
        has_projector = any(".mm_projector" in name for name in _names(directory))
        inside = tower.directory == directory
        parts = ["language_model."] + ["mlp1"] * has_projector + ["vision_model."] * inside
        sources = [Checkpoint(directory, files.part(config, *parts))]
        sources += [] if inside else [Checkpoint(tower.directory, tower.part(config))]
        if model_args.weight_dtype is None:
            model = LlavaForCausalLM(config)
            model.to(dtype=dtype)
        else:
            with paddle.LazyGuard():  # all but the projector is read
                model = LlavaForCausalLM(config)
            for parameter in model.mlp1.parameters():
                parameter.initialize()
            model.mlp1.to(dtype=dtype)
            prepare_adapted(model, model_args.weight_dtype, dtype)
        for source in sources:
            files.read_part(model, source, dtype)
        settle(model)
        if len(tokenizer) > config.llm_config.vocab_size:
            grow_vocabulary(model, len(tokenizer))
        path = model_args.pretrain_mm_mlp_adapter
        if checkpoint is not None:
            path = form.others or form.projector
            self._adapters = checkpoint if form.adapters else None
        if path is not None:
            if not os.path.isfile(path):
                raise ConfigError(f"--pretrain_mm_mlp_adapter {path} does not exist: it is what the first stage writes")
            files.read_file(model, model.config, path, dtype, prefix="mlp1")
        return model, tokenizer, directory

    def prepare(self, model, model_args, recompute):
        """What learns; see :func:`~.building.prepare`."""
        from paddlemix.models.blocks.lora import LoRALinear
        from paddlemix.models.internvl_llava.saving import load_lora

        trained = prepare(model, model_args, recompute)
        for layer in model.sublayers():
            if isinstance(layer, LoRALinear):
                layer.scale, layer.dropout.p = model_args.lora_alpha / model_args.lora_r, model_args.lora_dropout
        if self._adapters:
            load_lora(model, self._adapters)
        return trained

    def save_model(self, model, tokenizer, directory, source=None, weights=None):
        """Write what the run made: a projector, adapters, or the whole model with its tokenizer."""
        from paddlemix.models.internvl_llava import saving

        state = model.config.extra
        state["torch_dtype"] = str(model.language_model.lm_head.weight.dtype).removeprefix("paddle.")
        state["tune_mm_mlp_adapter"] = self.model_args.tune_mm_mlp_adapter
        state["freeze_mm_mlp_adapter"] = self.model_args.freeze_mm_mlp_adapter
        positions = self.model_args.tune_vit_pos_embedding
        if self.model_args.tune_mm_mlp_adapter:
            saving.save_projector(model, directory, positions, weights)
        elif self.model_args.use_llm_lora:
            saving.save_lora(model, directory, source, positions, weights)
        else:
            saving.save_whole(model, directory, weights)
            tokenizer.save_pretrained(directory)

    def _dataset(self, model, tokenizer, data_args, seed, sources):
        from paddlemix.datasets.dataset import InternVLDataset
        from paddlemix.datasets.internvl_llava import LlavaEncoder

        config = model.config
        encoder = LlavaEncoder(
            tokenizer,
            self.model_args.version,
            config.image_size,
            config.num_image_token,
            self.args.model_max_length,
            data_args.image_aspect_ratio,
            config.mm_use_im_start_end,
        )
        for source in sources:
            source.domains = tuple(data_args.allowed_media_domains or ())
        return InternVLDataset(sources, encoder, seed)

    def dataset(self, model, tokenizer, data_args, seed):
        """The training data."""
        from paddlemix.datasets.internvl_llava import read_sources

        meta = None if data_args.data_path else data_args.meta_path
        sources = read_sources(data_args.data_path, data_args.image_folder, meta)
        return self._dataset(model, tokenizer, data_args, seed, sources)

    def validation(self, model, tokenizer, data_args, seed):
        """The held-out data: a meta file, or a file of records with the pictures of the training data."""
        from paddlemix.datasets.internvl_llava import read_sources

        path = data_args.eval_meta_path
        try:
            sources = read_sources(meta_path=path)
        except UserError:
            sources = read_sources(path, data_args.image_folder)
        return self._dataset(model, tokenizer, data_args, seed, sources)

    def measure(self, dataset, cache_dir=None, progress=None):
        """Words and pictures of samples."""
        from paddlemix.datasets.internvl_llava import words

        lengths, pictures = words(dataset)
        return (lengths if self.args.group_by_modality_length else abs(lengths)), pictures

    def order(self, dataset, data_args, args, processes):
        """The order of samples: batches of one kind if that is asked for, and both kinds are there."""
        from paddlemix.datasets.internvl_llava import ModalityOrder
        from paddlemix.datasets.samplers import SampleOrder

        if args.group_by_modality_length:
            _, pictures = self.measure(dataset)
            if 0 < pictures.sum() < len(pictures):
                batch = args.per_device_train_batch_size * processes.world
                return ModalityOrder(dataset.source_sizes(), args.seed, pictures, batch)
        return SampleOrder(
            dataset.source_sizes(), args.seed, resample=data_args.use_data_resampling, replacement=data_args.replacement
        )


def _names(directory):
    from paddlemix.checkpoints.files import find_weight_files, open_weight_file

    for path in find_weight_files(directory)[0]:
        with open_weight_file(path) as stored:
            yield from stored


def train(model_args, data_args, args):
    """A whole run."""
    from .trainer import finetune

    return finetune(model_args, data_args, args, LlavaRecipe(model_args, data_args, args))


# ---------------------------------------------------------------------- the plan

_SIZES = {"7b": (4096, 32, 11008), "13b": (5120, 40, 13824)}


def planned_config(model_args):
    """Configuration for a plan: of the files, or of the sizes that are known for published names."""
    from paddlemix.models.internvl_llava.configuration import LlavaConfig
    from paddlemix.models.internvl_llava.modeling import published_tower

    name, tower_name = model_args.model_name_or_path, model_args.vision_tower or ""
    size = re.search(r"vicuna[-_](7b|13b)", name.lower())
    tower = published_tower(os.path.basename(tower_name.rstrip("/")))
    if os.path.isdir(name) or size is None or (tower is None and not os.path.isdir(tower_name)):
        return start_config(model_args)[0]
    if os.path.isdir(tower_name):
        from paddlemix.models.internvl_llava.checkpoint import tower_in

        tower = tower_in(tower_name).config
    hidden, layers, wide = _SIZES[size[1]]
    values = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 128,
        "intermediate_size": wide,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
    }
    return LlavaConfig.from_language(
        values,
        mm_vision_tower=tower_name,
        mm_vision_select_layer=model_args.mm_vision_select_layer,
        mm_projector_type=model_args.mm_projector_type,
        mm_use_im_patch_token=model_args.mm_use_im_patch_token,
        vision_config=dataclasses.replace(tower),
    )


def print_plan(argv):
    """The plan of a run with these flags: what ``train.py --dry_run`` prints."""
    from paddlemix import device
    from paddlemix.errors import DeviceError

    from .plan import GB, PlanArguments, describe

    *arguments, own = parse_llava(argv, extra=(PlanArguments,))
    model_args, data_args, args = arguments
    config = planned_config(model_args)
    data_args.force_image_size = config.image_size
    data_args.max_seq_length = args.model_max_length + config.num_image_token - 1
    if data_args.data_path:  # the plan counts the samples of a meta file
        data_args.meta_path = None
    kind, total = args.device.split(":")[0], None if own.device_memory is None else own.device_memory * GB
    try:
        kind = device.set_device(args.device)
        total = device.total_memory() if total is None else total
    except DeviceError:
        pass  # a plan for another machine
    print(f"learns: {trains(model_args)}")
    print(describe(config, model_args, data_args, args, own.processes, kind, total))
    if data_args.data_path and os.path.exists(data_args.data_path):
        from paddlemix.datasets.internvl_llava import read_sources

        from .plan import count_steps

        samples = sum(map(len, read_sources(data_args.data_path, data_args.image_folder)))
        print(f"samples of an epoch   {samples:11,}\nupdates               {count_steps(samples, args, own.processes):11,}")


def trains(model_args):
    """What learns, in words."""
    parts = ["projector"] * (not model_args.freeze_mlp) + ["language model"] * (not model_args.freeze_llm)
    parts += ["adapters in the language model"] * bool(model_args.use_llm_lora)
    parts += ["the vision tower's positions"] * model_args.tune_vit_pos_embedding
    return ", ".join(parts) or "nothing"


__all__ = ["CLASSES", "LlavaRecipe", "parse_llava", "print_plan", "train", "zero_stage"]
