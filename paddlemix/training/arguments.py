"""What a fine-tuning run is told, as flags or as a JSON or YAML file. The dataclasses are the command line and its help.

Names and defaults are those of the existing Paddle port and of PaddleNLP's ``TrainingArguments``, so that existing scripts
run unchanged. Flags of PaddleNLP's that only say how it divides a model over devices are accepted where they ask for what
happens here anyway, and refused otherwise: nothing is ignored silently.
"""

import argparse
import dataclasses
import json
import os
import typing
from dataclasses import dataclass, field

from paddlemix.commands import Parser
from paddlemix.errors import ConfigError


def _arg(default, help, choices=None):
    return field(default=default, metadata={"help": help, "choices": choices})


REPORTS = ("visualdl", "tensorboard", "wandb")


def targets(report_to):
    """Names of :data:`REPORTS` in ``--report_to``, by commas; none for ``none``.

    Raises:
        ConfigError: a name is another.
    """
    names = list(dict.fromkeys(name.strip() for name in report_to.split(",") if name.strip()))
    unknown = [name for name in names if name not in (*REPORTS, "none")]
    if unknown or ("none" in names and len(names) > 1):
        raise ConfigError(f"--report_to is '{report_to}': use one or more of {', '.join(REPORTS)}, by commas, or none")
    return [name for name in names if name != "none"]


@dataclass
class ModelArguments:
    """Which model, and which of its parts learn."""

    model_name_or_path: str | None = _arg(None, "chat model to start from: a directory or a name")
    vision_path: str | None = _arg(None, "vision tower to start from, with --llm_path, instead of a whole chat model")
    llm_path: str | None = _arg(None, "language model to start from, with --vision_path")
    mlp_path: str | None = _arg(None, "projector to start from; default: random weights")
    freeze_llm: bool = _arg(False, "keep the language model as it is")
    freeze_backbone: bool = _arg(False, "keep the vision tower as it is")
    freeze_mlp: bool = _arg(False, "keep the projector as it is")
    unfreeze_vit_layers: int = _arg(
        0, "with --freeze_backbone, train some vision blocks: from this one on if positive, the last ones if negative"
    )
    vision_select_layer: int = _arg(-1, "hidden state of the vision tower that is used; -1 for the last")
    use_backbone_lora: int = _arg(0, "rank of LoRA adapters in the vision tower; 0 for none")
    use_llm_lora: int = _arg(0, "rank of LoRA adapters in the language model; 0 for none")
    lora_dropout: float = _arg(0.05, "share of the inputs of LoRA adapters that training leaves out")
    load_4bit: bool = _arg(False, "with --use_llm_lora: weights under the language model's adapters in 4 bits (QLoRA)")
    load_8bit: bool = _arg(False, "the same in 8 bits")
    unfreeze_lm_head: bool = _arg(False, "train the output head even if the language model is frozen")
    grad_checkpoint: bool = _arg(False, "same as --recompute")
    drop_path_rate: float = _arg(0.0, "stochastic depth of the last vision block that is trained")
    ps_version: str = _arg("v2", "pixel shuffle: v2, or v1 for the oldest models", ("v1", "v2"))
    use_fast_tokenizer: bool = _arg(False, "prefer tokenizer.json; the ids are the same either way")
    use_custom_trainer: bool = _arg(False, "without effect, as ever")
    _adapters = "--use_llm_lora 16"  # how a user asks for some

    def __post_init__(self):
        parts = self.vision_path is not None and self.llm_path is not None
        if self.model_name_or_path is None and not parts:
            raise ConfigError("no model to train: set --model_name_or_path, or both --vision_path and --llm_path")
        if not 0 <= self.lora_dropout < 1:
            raise ConfigError(f"--lora_dropout is {self.lora_dropout}: it must be from 0 to below 1")
        if self.model_name_or_path is not None and (self.vision_path or self.llm_path):
            raise ConfigError("--model_name_or_path is a whole model: leave out --vision_path and --llm_path, or it")
        self._check_bits()

    def _check_bits(self):
        if self.weight_dtype is None:
            return
        if self.load_4bit and self.load_8bit:
            raise ConfigError("--load_4bit and --load_8bit exclude each other: choose one")
        if not self.use_llm_lora:
            raise ConfigError(f"weights in few bits do not learn: train adapters on them ({self._adapters}), or keep all bits")
        if self.model_name_or_path is None:
            raise ConfigError(
                "--load_4bit and --load_8bit need a whole model: put it together first (a run of --max_steps 1 without them), "
                "and start from its --output_dir by --model_name_or_path"
            )

    @property
    def weight_dtype(self):
        """``int4`` or ``int8`` for weights under adapters in few bits; None for all bits."""
        return "int4" if self.load_4bit else "int8" if self.load_8bit else None


@dataclass
class DataTrainingArguments:
    """Which data, and how it becomes tokens and tiles."""

    meta_path: str | None = _arg(None, "JSON file that lists the data sets")
    eval_meta_path: str | None = _arg(None, "JSON file of held-out data sets, for the validation loss")
    allowed_media_domains: list[str] | None = _arg(None, "hosts that pictures of records may be fetched from; default: none")
    max_seq_length: int = _arg(2048, "longest sample in tokens, those of pictures included")
    force_image_size: int = _arg(448, "side of a tile in pixels")
    down_sample_ratio: float = _arg(0.5, "pixel shuffle's factor: 0.5 makes 256 tokens of a tile of 448 pixels")
    pad2square: bool = _arg(False, "pad pictures to squares with their mean colour, where they are not tiled")
    conv_style: str | None = _arg(None, "conversation template; default: the checkpoint's own")
    use_data_resampling: bool = _arg(False, "draw from data sets in proportion to the square roots of their sizes")
    dynamic_image_size: bool = _arg(False, "cut pictures into tiles; otherwise each picture is one tile")
    use_thumbnail: bool = _arg(False, "add a small copy of a picture to its tiles")
    multi_scale: str | None = _arg(None, "Mini-Monkey's tiles at two scales, by this rule", ("chat", "training"))
    min_dynamic_patch: int = _arg(1, "fewest tiles of a picture")
    max_dynamic_patch: int = _arg(12, "most tiles of a picture, or of all pictures of a sample")
    min_num_frame: int = _arg(8, "fewest frames of a video")
    max_num_frame: int = _arg(32, "most frames of a video")
    normalize_type: str = _arg("imagenet", "mean and deviation of pixels", ("imagenet", "clip", "siglip"))
    max_bad_samples: float = _arg(0.01, "share of samples that may be unusable before training stops")
    use_packed_ds: bool = _arg(False, "put several samples into one row, isolated from each other")
    num_images_expected: int = _arg(40, "with --use_packed_ds: most tiles of a row")
    max_packed_tokens: int = _arg(8192, "with --use_packed_ds: most tokens of a row")
    max_buffer_size: int = _arg(20, "with --use_packed_ds: rows that are filled at a time")
    log_freq: int = _arg(1000, "without effect: every line of the log says how much is padding")
    strict_mode: bool = _arg(True, "with --use_packed_ds: fill every row up to num_images_expected with blank tiles")
    replacement: bool = _arg(False, "with --use_packed_ds: start data sets again when they end before others")
    allow_overflow: bool = _arg(False, "with --use_packed_ds: cut a row that is too long instead of keeping samples whole")
    loss_reduction: str = _arg(
        "token", "what counts alike: tokens, samples, or samples by the root of their length", ("token", "sample", "square")
    )
    loss_reduction_all_gather: bool = _arg(False, "without effect: weights are always normalised over all processes")

    def __post_init__(self):
        if not 1 <= self.min_dynamic_patch <= self.max_dynamic_patch:
            raise ConfigError(f"--min_dynamic_patch is {self.min_dynamic_patch}: it must be 1 to {self.max_dynamic_patch}")
        if not 1 <= self.min_num_frame <= self.max_num_frame:
            raise ConfigError(f"--min_num_frame {self.min_num_frame} must be from 1 to --max_num_frame {self.max_num_frame}")


@dataclass
class PreTrainingArguments:
    """How to train."""

    output_dir: str | None = _arg(None, "directory of checkpoints, logs and the final model")
    overwrite_output_dir: bool = _arg(False, "start anew even if the directory holds a checkpoint")
    do_train: bool = _arg(False, "train")
    do_eval: bool = _arg(False, "compute the loss on --eval_meta_path, at the end at least")
    device: str = _arg("auto", "auto, cpu, gpu, npu or another Paddle device")
    seed: int = _arg(42, "of the order of data, augmentation, dropout and new weights")

    per_device_train_batch_size: int = _arg(8, "samples (rows, when packed) that one process computes at once")
    per_device_eval_batch_size: int = _arg(8, "the same for validation")
    gradient_accumulation_steps: int = _arg(1, "batches of each process between two updates")
    group_by_length: bool = _arg(True, "put samples of similar length into a batch")
    dataloader_num_workers: int = _arg(0, "processes that prepare data; 0 for none but the training process")
    dataloader_drop_last: bool = _arg(False, "leave out the last samples of an epoch where they do not fill a step")

    num_train_epochs: float = _arg(1.0, "passes over the data")
    max_steps: int = _arg(-1, "updates in all, instead of --num_train_epochs")
    optim: str = _arg("adamw", "optimiser", ("adamw",))
    learning_rate: float = _arg(5e-5, "peak learning rate")
    mm_projector_lr: float | None = _arg(None, "peak learning rate of the projector; default: --learning_rate")
    vit_lr: float | None = _arg(None, "peak learning rate of the vision tower; default: --learning_rate")
    vit_layer_decay_rate: float = _arg(1.0, "learning rate of a vision block divided by that of the next")
    weight_decay: float = _arg(0.0, "of all weights but biases and norms")
    adam_beta1: float = _arg(0.9, "AdamW's first decay")
    adam_beta2: float = _arg(0.999, "AdamW's second decay")
    adam_epsilon: float = _arg(1e-8, "AdamW's epsilon")
    max_grad_norm: float = _arg(1.0, "longer gradients are scaled down to this norm; 0 for no limit")
    lr_scheduler_type: str = _arg(
        "linear", "how the learning rate falls", ("linear", "cosine", "constant", "constant_with_warmup", "polynomial")
    )
    warmup_ratio: float = _arg(0.0, "share of all steps in which the learning rate rises")
    warmup_steps: int = _arg(0, "the same as a number of steps; goes before --warmup_ratio")
    num_cycles: float = _arg(0.5, "waves of the cosine: 0.5 falls to 0 once")
    lr_end: float = _arg(1e-7, "last learning rate of polynomial")
    power: float = _arg(1.0, "power of polynomial")

    fp16: bool = _arg(False, "compute in float16 (V100); on CPU training is in float32 all the same")
    bf16: bool = _arg(False, "compute in bfloat16; on CPU the products of linear layers, forward and backward")
    fp16_opt_level: str = _arg("O1", "O1: weights in float32; O2: weights in half precision too", ("O1", "O2"))
    amp_master_grad: bool = _arg(False, "with O2: sum gradients in float32")
    scale_loss: float = _arg(2.0**15, "with --fp16: the first loss scale")
    recompute: bool = _arg(False, "compute activations again for gradients instead of keeping them")
    sharding: str = _arg(
        "",
        "divide over processes: optimizer states (stage1), gradients too (stage2), and weights too (stage3, with --recompute)",
        ("", "stage1", "stage2", "stage3"),
    )
    sharding_parallel_degree: int = _arg(
        -1, "of the processes that divide the data, how many divide states with --sharding: all"
    )
    offload_optim: bool = _arg(False, "keep master weights and moments in the host's memory, and update there")
    overlap_communication: bool = _arg(True, "send gradients and weights while something is computed")
    tensor_parallel_degree: int = _arg(1, "processes that divide every layer; those of one share of the data")
    expert_parallel_degree: int = _arg(-1, "processes that experts are dealt over: those of --tensor_parallel_degree")

    logging_steps: int = _arg(500, "steps between two lines of the log")
    logging_first_step: bool = _arg(False, "log the first step too")
    logging_dir: str | None = _arg(None, "directory of curves; default: runs in --output_dir")
    report_to: str = _arg(
        "visualdl",
        "where curves go, by commas: visualdl, tensorboard (files in --logging_dir), wandb (which sends them); or none. "
        "train_log.jsonl is always written",
    )
    disable_tqdm: bool = _arg(False, "no progress bar")

    evaluation_strategy: str = _arg("no", "when to compute the validation loss and --eval_tasks", ("no", "steps", "epoch"))
    eval_steps: int | None = _arg(None, "with --evaluation_strategy steps; default: --logging_steps")
    eval_tasks: str | None = _arg(None, "benchmarks to score at each evaluation, by commas, as paddlemix evaluate names them")
    eval_limit: int | None = _arg(None, "most questions of each of --eval_tasks; default: all")
    eval_data_root: str = _arg("data", "folder of the data sets of --eval_tasks")
    metric_for_best_model: str | None = _arg(None, "one of --eval_tasks, or loss: the best model by it is kept in best/")
    load_best_model_at_end: bool = _arg(False, "leave the best model in --output_dir in place of the last")
    max_evaluate_steps: int = _arg(-1, "most batches of a validation; -1 for all")
    save_strategy: str = _arg("steps", "when to write a checkpoint", ("no", "steps", "epoch"))
    save_steps: int = _arg(500, "with --save_strategy steps")
    save_total_limit: int | None = _arg(None, "checkpoints to keep; default: all")
    save_safetensors: bool = _arg(True, "weights are always written as safetensors")
    resume_from_checkpoint: str | None = _arg(None, "checkpoint directory; default: the last one in --output_dir, if any")
    ignore_load_lr_and_optim: bool = _arg(False, "when resuming, take nothing but the weights")

    def __post_init__(self):
        if self.output_dir is None:
            raise ConfigError("--output_dir is missing: name a directory for checkpoints and the final model")
        self.output_dir = os.path.expanduser(self.output_dir)
        for name in ("mm_projector_lr", "vit_lr", "vit_layer_decay_rate"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ConfigError(f"--{name} is {getattr(self, name)}: it must be above 0")
        targets(self.report_to)  # says what is wrong
        if self.fp16 and self.bf16:
            raise ConfigError("--fp16 and --bf16 exclude each other: use --bf16 where the device has it, --fp16 on V100")
        positive = "per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps logging_steps save_steps"
        for name in positive.split():
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name} is {getattr(self, name)}: it must be at least 1")
        self.tensor_parallel_degree = max(1, self.tensor_parallel_degree)
        if self.expert_parallel_degree not in (-1, 0, 1, self.tensor_parallel_degree):
            raise ConfigError(
                f"--expert_parallel_degree is {self.expert_parallel_degree}: experts are dealt over the ranks that divide the "
                "other layers, so set --tensor_parallel_degree and leave it out"
            )
        if not self.sharding:
            self.sharding_parallel_degree = -1
        if self.sharding == "stage3":
            self.recompute = True  # the weights of a block are gone by the time of its backward pass
        if not 0 <= self.warmup_ratio <= 1:
            raise ConfigError(f"--warmup_ratio is {self.warmup_ratio}: it must be from 0 to 1")
        if self.eval_steps is None:
            self.eval_steps = self.logging_steps
        if self.eval_limit is not None and self.eval_limit < 1:
            raise ConfigError(f"--eval_limit is {self.eval_limit}: it must be at least 1")
        if self.metric_for_best_model:
            self.metric_for_best_model = self.metric_for_best_model.removeprefix("eval_")
        elif self.load_best_model_at_end:
            self.metric_for_best_model = "loss"

    @property
    def half(self):
        """``bfloat16``, ``float16`` or None: what products are computed in, if not in float32."""
        return "bfloat16" if self.bf16 else "float16" if self.fp16 else None


@dataclass
class PreferenceArguments:
    """How preferences are learned (internvl_chat_mpo.py)."""

    loss_type: str = _arg("sigmoid,bco_pair", "preference losses, by commas: sigmoid, bco_pair, hinge, ipo")
    sigmoid_loss_weight: float = _arg(0.8, "of the loss sigmoid")
    bco_pair_loss_weight: float = _arg(0.2, "of the loss bco_pair")
    hinge_loss_weight: float = _arg(1.0, "of the loss hinge")
    ipo_loss_weight: float = _arg(1.0, "of the loss ipo")
    rpo_alpha: float = _arg(1.0, "weight of the cross entropy of the chosen answers")
    beta: float = _arg(0.1, "how far the model may leave the reference; small is far")
    label_smoothing: float = _arg(0.0, "share of pairs whose preference may be wrong; for the loss sigmoid")
    reference_model: str | None = _arg(None, "checkpoint of the same shape to compare with; default: the start of the run")
    precompute_reference: bool = _arg(
        False, "compute what the reference says of all pairs once, before the first step, and keep it in the output directory"
    )

    @property
    def weights(self):
        """``{loss type: weight}``."""
        names = [name.strip() for name in self.loss_type.split(",") if name.strip()]
        return {name: getattr(self, f"{name}_loss_weight", 1.0) for name in names}


CLASSES = (ModelArguments, DataTrainingArguments, PreTrainingArguments)

# PaddleNLP's flags about how it divides the work: their values that describe what is done here.
_ONLY = {
    **dict.fromkeys(
        [f"{kind}_parallel_degree" for kind in ("pipeline", "sep", "context")],
        ("-1", "0", "1"),
    ),
    "hybrid_parallel_topo_order": ("pp_first", "sharding_first"),
    "unified_checkpoint": ("true", "false", "1", "0"),
    "remove_unused_columns": ("true", "false", "1", "0"),
    "logging_strategy": ("steps",),
    "flatten_param_grads": ("false", "0"),
    "do_predict": ("false", "0"),
    "do_export": ("false", "0"),
}


def parse(argv, prog="internvl_chat_finetune.py", extra=(), classes=CLASSES, description=None):
    """Read the command line.

    Args:
        argv: flags; a first word that ends in ``.json``, ``.yaml`` or ``.yml`` is a file with the same names as keys,
            which flags after it replace.
        prog: the program's name in its help.
        extra: dataclasses of further flags.
        classes: in place of :data:`CLASSES`.
        description: first line of the help.

    Returns:
        (ModelArguments, DataTrainingArguments, PreTrainingArguments, *extra).

    Raises:
        ConfigError: a file cannot be read, or a name or a value is not known.
    """
    epilog = "A JSON or YAML file of the same names may come first. --devices N trains with N processes, one a device."
    parser = _Parser(prog=prog, description=description or __doc__.split("\n")[0], epilog=epilog)
    classes = (*classes, *extra)
    for cls in classes:
        group = parser.add_argument_group(cls.__doc__.split("\n")[0])
        for item in dataclasses.fields(cls):
            _add(group, item)
    for name in _ONLY:
        parser.add_argument(f"--{name}", type=str, default=None, nargs="?", const="true", help=argparse.SUPPRESS)
    argv = list(argv)
    given = _read_file(argv.pop(0)) if argv and argv[0].endswith((".json", ".yaml", ".yml")) else {}
    flags = []
    for name, value in given.items():
        if value is not None:
            flags += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    values = vars(parser.parse_args(flags + argv))
    for name, allowed in _ONLY.items():
        value = values.pop(name)
        if value is not None and value.lower() not in allowed:
            raise ConfigError(f"--{name} {value} is not supported: leave it out, or use one of {', '.join(allowed)}")
    return tuple(cls(**{f.name: values[f.name] for f in dataclasses.fields(cls)}) for cls in classes)


class _Parser(Parser):
    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message):
        raise ConfigError(f"{message} (--help lists all arguments)")


def _add(group, item):
    kinds = [kind for kind in typing.get_args(item.type) or (item.type,) if kind is not type(None)]
    several = typing.get_origin(kinds[0]) is list
    kind = _boolean if kinds[0] is bool else str if several else kinds[0]
    shown = item.metadata["help"] + ("" if item.default is None else f" (default: {item.default!r})")
    options = dict(nargs="?", const=True) if kind is _boolean else dict(nargs="+") if several else {}
    choices = item.metadata.get("choices")
    group.add_argument(
        f"--{item.name}", type=_none_or(kind), default=item.default, choices=choices, help=shown.replace("%", "%%"), **options
    )


def _none_or(kind):
    def read(text):
        return None if text == "None" else kind(text)

    read.__name__ = kind.__name__.strip("_")  # argparse's word for it
    return read


def _boolean(text):
    if text.lower() in ("true", "1", "yes", "on"):
        return True
    if text.lower() in ("false", "0", "no", "off"):
        return False
    raise argparse.ArgumentTypeError(f"'{text}' is neither True nor False")


def _read_file(path):
    is_json = path.endswith(".json")
    try:
        with open(path, encoding="utf-8") as file:
            values = json.load(file) if is_json else _read_yaml(file)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not valid {'JSON' if is_json else 'YAML'}: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold names and values of arguments")
    return values


def _read_yaml(file):
    import yaml  # only who writes YAML needs it

    try:
        return yaml.safe_load(file)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
