"""Fine-tuning InternVL for retrieval: what learns, how fast each block does, and the run."""

import re
from dataclasses import dataclass

import paddle

from paddlemix import device
from paddlemix.checkpoints import resolve
from paddlemix.datasets.annotations import read_captions
from paddlemix.datasets.retrieval import RetrievalPairs
from paddlemix.errors import ConfigError
from paddlemix.models.blocks.lora import wrap_tower
from paddlemix.models.internvl import InternVLModel, load_tokenizer

from .arguments import PreTrainingArguments
from .arguments import _arg as argument
from .building import set_mode
from .checkpoints import Checkpoints
from .objective import BatchObjective
from .processes import Processes
from .runs import run, steps_of
from .trainer import Trainer


@dataclass
class RetrievalModelArguments:
    """Which model, and which of its parts learn."""

    model_name_or_path: str = argument("OpenGVLab/InternVL-14B-224px", "model to start from: a directory or a name")
    freeze_model: bool = argument(False, "keep everything as it is that is not unfrozen below")
    freeze_vision_model: bool = argument(False, "keep the vision tower as it is")
    freeze_qllama: bool = argument(False, "keep QLLaMA as it is, its cross-attention too")
    unfreeze_qllama_head: bool = argument(False, "train lm_head and text_projection all the same")
    use_backbone_lora: int = argument(0, "rank of LoRA adapters in the vision tower; 0 for none")
    use_qllama_lora: int = argument(0, "rank of LoRA adapters in QLLaMA; 0 for none")
    drop_path_rate: float = argument(0.0, "stochastic depth of the last vision block")
    qllama_layer_decay_rate: float = argument(1.0, "learning rate of a block of QLLaMA divided by that of the next")


@dataclass
class RetrievalDataArguments:
    """Which pictures and captions."""

    images: str | None = argument(None, "folder that the names of pictures are relative to")
    annotations: str | None = argument(None, "pictures and their captions: image,caption lines, or COCO's Karpathy JSON")
    force_image_size: int | None = argument(None, "side of a picture in pixels; default: the model's")
    least_part: float = argument(0.5, "least share of a picture's area that is cut out; 1 for whole pictures")
    flip: float = argument(0.5, "share of pictures whose left and right are changed; 0 where captions speak of places")

    def __post_init__(self):
        if not (0 < self.least_part <= 1 and 0 <= self.flip <= 1):
            raise ConfigError("--least_part must be above 0 and at most 1, and --flip from 0 to 1")
        if self.images is None or self.annotations is None:
            raise ConfigError("--images and --annotations are missing: name the pictures and their captions")


CLASSES = (RetrievalModelArguments, RetrievalDataArguments, PreTrainingArguments)


def prepare(model, model_args, recompute=False):
    """Freeze, add adapters, and set up regularisation and recompute: ``{name: parameter}`` of what learns.

    Raises:
        ConfigError: nothing does, or a rank does not fit the adapters that there are.
    """
    for parameter in model.parameters():
        parameter.stop_gradient = model_args.freeze_model
    for tower, frozen, rank in (
        ("vision_model", model_args.freeze_vision_model, model_args.use_backbone_lora),
        ("qllama", model_args.freeze_qllama, model_args.use_qllama_lora),
    ):
        if frozen:
            for parameter in getattr(model, tower).parameters():
                parameter.stop_gradient = True
        if rank:
            wrap_tower(model, tower, rank)
    if model_args.unfreeze_qllama_head:
        model.qllama.lm_head.weight.stop_gradient = model.text_projection.stop_gradient = False
    layers = model.vision_model.encoder.layers
    for i, layer in enumerate(layers):
        layer.drop_path = model_args.drop_path_rate * i / max(len(layers) - 1, 1)
    model.vision_model.encoder.enable_recompute = model.qllama.model.enable_recompute = recompute
    set_mode(model, True)
    model.qllama.model.training = True  # gradients pass through it, and it is recomputed in training mode only
    trained = {name: p for name, p in model.named_parameters() if not p.stop_gradient}
    if not trained:
        raise ConfigError("nothing is left to train: freeze less, or use LoRA")
    return trained


def layer_rates(config, vit_decay, qllama_decay):
    """A function from a parameter's name to the factor on its learning rate.

    The last block of each tower has one factor of decay, the one before it two, and so on; embeddings one more than the first
    block. What is behind the blocks has none.
    """
    towers = {
        "vision_model": (vit_decay, config.vision_config.num_hidden_layers),
        "qllama": (qllama_decay, config.qllama_config.num_hidden_layers),
    }

    def rate(name):
        decay, depth = towers.get(name.split(".")[0], (1.0, 0))
        if match := re.search(r"\.layers\.(\d+)\.", name):
            return decay ** (depth - int(match[1]))
        return decay ** (depth + 1) if ".embeddings." in name or ".embed_tokens." in name else 1.0

    return rate


def finetune(model_args, data_args, args):
    """A whole run: build, resume, train, save.

    Raises:
        UserError: something that was given cannot be used; the sentence says what.
    """
    device.set_device(args.device)
    if args.tensor_parallel_degree > 1:
        raise ConfigError("--tensor_parallel_degree is for chat models: leave it out here")
    processes = Processes(sharding=args.sharding_parallel_degree)
    checkpoints = Checkpoints(args.output_dir, processes, args.save_total_limit)
    checkpoints.start(args.overwrite_output_dir)
    resumed = args.resume_from_checkpoint or checkpoints.last()
    directory = resolve(resumed or model_args.model_name_or_path)
    half = None if device.is_cpu() else args.half
    dtype = half if half and args.fp16_opt_level == "O2" else "float32"
    paddle.seed(args.seed)
    model = InternVLModel.from_pretrained(directory, dtype=dtype, engine="eager", merge=not resumed)
    tokenizer = load_tokenizer(directory)
    trained = prepare(model, model_args, args.recompute)
    size = data_args.force_image_size or model.config.image_size
    if size % model.config.vision_config.patch_size:
        raise ConfigError(f"--force_image_size is {size}: it must be a multiple of {model.config.vision_config.patch_size}")
    pairs = RetrievalPairs(
        *read_captions(data_args.annotations, data_args.images), tokenizer, size, args.seed,
        scale=(data_args.least_part, 1.0), flip=data_args.flip, workers=args.dataloader_num_workers,
    )  # fmt: skip
    micro_batches, epoch, total = steps_of(len(pairs), args, processes.world)
    rates = layer_rates(model.config, args.vit_layer_decay_rate, model_args.qllama_layer_decay_rate)
    trainer = Trainer(model, trained, args, processes, total, rates=rates, objective=BatchObjective(_loss))

    def batches(step):
        return pairs.batch(step, micro_batches, args.per_device_train_batch_size, processes.rank, processes.world)

    def write(folder):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    run(trainer, batches, write, resumed, epoch)


def _loss(model, **batch):
    return model.retrieval_loss(**batch).loss
