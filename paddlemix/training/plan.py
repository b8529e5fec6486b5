"""What a run will cost, before it starts: parameters, memory of a device, steps and tokens.

  python -m paddlemix.training.plan --processes 8 FLAGS    the plan of a run with the trainer's flags (same as its --dry_run)
  python -m paddlemix.training.plan --table                memory for each published model and method (docs/finetune.md)

Everything is computed from the configuration and the arguments. Weights, gradients and optimiser states follow
:mod:`~.optimizer` and are exact. Activations are what the blocks keep for the backward pass, counted operator by operator;
the counts were checked against Paddle's own allocation counters on CPU (``tests/training/test_plan.py``).
"""

import copy
import dataclasses
import math
import os
import re
import sys
from dataclasses import dataclass

from paddlemix import device
from paddlemix.checkpoints.checkpoint import NOTHING
from paddlemix.datasets.records import read_meta
from paddlemix.errors import DataError, DeviceError, command_main
from paddlemix.models.blocks.adapters import adapted_weights, with_adapters
from paddlemix.models.blocks.division import Division
from paddlemix.models.internvl2.configuration import InternVLChatConfig
from paddlemix.quantised import bytes_per_value

from .arguments import parse
from .published import is_known, published_config

GB = 1e9

# ---------------------------------------------------------------------- parameters


def learns(name, model_args, vision_depth):
    """Whether a parameter of the model is trained.

    Args:
        name: the parameter's in the model.
        model_args: :class:`~.arguments.ModelArguments`.
        vision_depth: number of blocks of the vision tower.
    """
    if ".lora_" in name:
        return True
    part = name.split(".")[0]
    if part == "mlp1":
        return not model_args.freeze_mlp
    if part == "vision_model":
        if name.endswith(".position_embedding") and getattr(model_args, "tune_vit_pos_embedding", False):
            return True
        block = re.match(r"vision_model\.encoder\.layers\.(\d+)\.", name)
        chosen = range(vision_depth)[model_args.unfreeze_vit_layers :] if model_args.unfreeze_vit_layers else ()
        if block and int(block[1]) in chosen:
            return True
        return not (model_args.freeze_backbone or model_args.use_backbone_lora)
    if model_args.unfreeze_lm_head and name.startswith("language_model.lm_head."):
        return True
    return not (model_args.freeze_llm or model_args.use_llm_lora)


def parameters(config, model_args):
    """``{name: (number of values, whether it is trained)}`` of all parameters, new adapters included.

    Args:
        config: :class:`InternVLChatConfig` of the model that is started from.
        model_args: :class:`~.arguments.ModelArguments`.
    """
    plain = dataclasses.replace(config, use_llm_lora=0, use_backbone_lora=0)
    ranks = dict(
        use_llm_lora=model_args.use_llm_lora or config.use_llm_lora,
        use_backbone_lora=model_args.use_backbone_lora or config.use_backbone_lora,
    )
    depth = config.vision_config.num_hidden_layers
    table = with_adapters(plain.weight_table(), dataclasses.replace(config, **ranks))
    return {weight.name: (math.prod(weight.shape), learns(weight.name, model_args, depth)) for weight in table}


# ---------------------------------------------------------------------- memory


@dataclass(frozen=True)
class Batch:
    """The largest batch that a device computes at once: rows of so many tokens each, and tiles of all rows together."""

    rows: int
    tokens: int
    tiles: int


def largest_batch(config, data_args, train_args, text_tokens=512):
    """The :class:`Batch` of samples with all the tiles that they may have and ``text_tokens`` of text.

    Args:
        config: :class:`InternVLChatConfig`.
        data_args, train_args: the trainer's arguments.
        text_tokens: length of a sample without its tiles.
    """
    rows = train_args.per_device_train_batch_size
    side = data_args.force_image_size // config.vision_config.patch_size
    per_tile = int(side**2 * data_args.down_sample_ratio**2)
    if data_args.use_packed_ds:
        return Batch(rows, data_args.max_packed_tokens, rows * data_args.num_images_expected)
    tiles = data_args.max_dynamic_patch if data_args.dynamic_image_size else 1
    tiles += data_args.use_thumbnail and tiles > 1
    if data_args.multi_scale:  # the coarser scale's, at most, beside them
        tiles += 8 if data_args.multi_scale == "chat" else 4
    return Batch(rows, min(data_args.max_seq_length, tiles * per_tile + text_tokens), rows * tiles)


@dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    ``gradients`` and ``activations`` are there together in the backward pass; ``update`` is what the optimiser needs for a
    moment once activations are gone.
    """

    weights: float
    optimizer: float
    gradients: float
    activations: float
    update: float

    @property
    def peak(self):
        """The most that is in use at any time."""
        return self.weights + self.optimizer + self.gradients + max(self.activations, self.update)


def rounded(config, model_args):
    """``{name: number of values}`` of the weights under adapters that are in few bits."""
    if model_args.weight_dtype is None:
        return {}
    table = dataclasses.replace(config, use_llm_lora=0).weight_table()
    return {weight.name: math.prod(weight.shape) for weight in adapted_weights(table, "language_model")}


def memory(config, counts, train_args, batch, processes, flash, freeze_backbone, image_size, ranks=1, few=({}, None)):
    """Memory of a training step on one device.

    Args:
        config: :class:`InternVLChatConfig`.
        counts: from :func:`parameters`.
        train_args: :class:`~.arguments.PreTrainingArguments`.
        batch: :class:`Batch`.
        processes: of the whole run, or those that divide states.
        flash: whether attention runs in a kernel that never holds the scores.
        freeze_backbone: whether nothing of the vision tower is trained.
        image_size: side of a tile in pixels.
        ranks: how many divide every layer; ``counts`` and ``processes`` are then of one of them, and of those with its share.
        few: what :func:`rounded` gave, and in how many bits it is, as ``weight_dtype``.
    """
    config = config if ranks == 1 else _narrowed(config, ranks)
    half = train_args.half is not None
    weight = 2 if half and train_args.fp16_opt_level == "O2" else 4
    total = sum(size for size, _ in counts.values())
    trained = {name: size for name, (size, learned) in counts.items() if learned}
    learned = sum(trained.values())
    stage = int(train_args.sharding[-1]) if train_args.sharding and processes > 1 else 0
    owners = divide(trained, processes)
    owned = _largest_share(trained, owners, processes) if stage else learned
    gradients = weight * learned  # what the backward pass leaves
    gone = 0  # by the time of the update
    if stage == 3:
        total, least, gradients = _divided_weights(counts, processes, train_args.overlap_communication)
        gradients *= weight
        gone = weight * (total - least) + gradients
    if stage >= 2:
        gradients += 4 * owned
    elif train_args.amp_master_grad:
        gradients += 4 * learned
    masters = 4 * owned if weight == 2 else 0
    states = 0 if train_args.offload_optim else 8 * owned + masters
    element = 2 if half else 4
    codes, weight_dtype = few
    packed, widest = 0, 0
    if codes:  # one at a time becomes floating point, first in float32
        total, widest = total - sum(codes.values()), max(codes.values()) * (8 + element)
        packed = sum(codes.values()) * bytes_per_value(weight_dtype)
    inputs = _adapter_inputs(config, counts)
    kept, moments = zip(
        _vision_activations(config, batch, element, flash, freeze_backbone, train_args.recompute, image_size),
        _language_activations(config, batch, element, flash, train_args.recompute, inputs, widest),
    )
    activations = sum(kept) + max(moments)
    # float32 copies of the gradients where they are not sums in float32 already, and these again after scaling
    update = 4 * owned * (2 if weight == 2 and not (stage >= 2 or train_args.amp_master_grad) else 1)
    return Memory(weight * total + packed, states, gradients, activations, max(update - gone, 0))


def _narrowed(config, ranks):
    """A configuration whose blocks keep what those of one of ``ranks`` do: inner widths are divided, the width is not."""
    config, llm, vision = (copy.copy(part) for part in (config, config.llm_config, config.vision_config))
    config.llm_config, config.vision_config = llm, vision
    for part, name in (
        (llm, "num_attention_heads"),
        (llm, "num_key_value_heads"),
        (llm, "intermediate_size"),
        (llm, "vocab_size"),
        (vision, "num_attention_heads"),
        (vision, "intermediate_size"),
    ):
        setattr(part, name, -(-getattr(part, name) // ranks))
    return config


def divide(sizes, processes):
    """Owner of each parameter: the largest go first, each to the process that has least.

    Args:
        sizes: ``{name: number of values}``.
        processes: how many there are.

    Returns:
        ``{name: number of a process}``.
    """
    loads, owners = [0] * processes, {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        owners[name] = loads.index(min(loads))
        loads[owners[name]] += sizes[name]
    return owners


def deal(counts, processes):
    """:func:`divide` with stage 3, what is trained and what is frozen separately; ``counts`` as from :func:`parameters`."""
    owners = {}
    for wanted in (True, False):
        owners |= divide({name: size for name, (size, learned) in counts.items() if learned == wanted}, processes)
    return owners


def _largest_share(sizes, owners, processes):
    """Values that the fullest process keeps of ``sizes``."""
    loads = [0] * processes
    for name, size in sizes.items():
        loads[owners[name]] += size
    return max(loads)


_BLOCK = re.compile(r"(?:vision_model\.encoder|language_model\.model)\.layers\.\d+\.")


def _divided_weights(counts, processes, overlap):
    """With stage 3, in values: the most weights that a process has at once, those that it owns, and gradients before sums.

    At most what it owns, what is outside the blocks, and one block; with ``overlap`` one more block, whose weights are on their
    way, and the gradients of another, which are on theirs; see :mod:`~.sharding`.
    """
    owners, blocks, learning = deal(counts, processes), {}, {}
    outside = learning_outside = 0
    inside, owned = [0] * processes, [0] * processes
    for name, (size, learned) in counts.items():
        block = _BLOCK.match(name)
        owned[owners[name]] += size
        if block:
            inside[owners[name]] += size
            blocks[block[0]] = blocks.get(block[0], 0) + size
            learning[block[0]] = learning.get(block[0], 0) + size * learned
        else:
            outside += size
            learning_outside += size * learned
    largest = max(learning.values(), default=0)
    # The gradients of a block, and the same once more in one piece that is sent.
    ahead = 1 + overlap
    return max(inside) + outside + ahead * max(blocks.values(), default=0), max(owned), learning_outside + (1 + ahead) * largest


def _adapter_inputs(config, counts):
    """Inputs that the adapters of one block of the language model keep, in values a token."""
    first = "language_model.model.layers.0."
    llm = config.llm_config
    wide = llm.intermediate_size if llm.experts is None else llm.experts.width
    at_work = 1.0 if llm.experts is None else llm.experts.active / llm.experts.count
    names = [name for name in counts if name.startswith(first) and ".lora_A." in name]
    return sum((wide if ".down_proj." in name else llm.hidden_size) * (at_work if ".experts." in name else 1) for name in names)


def _language_activations(config, batch, element, flash, recompute, adapter_inputs, widest):
    """Bytes that are kept until the backward pass, and the most that is in use for a moment beside them.

    ``widest``: bytes that a weight in few bits takes while it is in floating point.
    """
    llm = config.llm_config
    width, kv, hidden = llm.hidden_size, llm.num_key_value_heads * llm.head_dim, llm.intermediate_size
    heads = llm.num_attention_heads * llm.head_dim
    if llm.experts is not None:  # each token's experts keep their inner activations, and their input and output
        hidden = llm.experts.active * (llm.experts.width + width)
    # What a block keeps of a token.
    norms = 2 * (4 + 2 * element) * width  # each: the input in float32, and the result before and after its weight
    rope = 8 * (heads + kv)  # queries and keys in float32, and these with their halves swapped
    qkv = element * (2 * heads + 2 * kv)  # what attention takes and gives
    # No kernel knows the sinks of gpt-oss, whose scores are therefore held.
    scores = 0 if flash and not llm.sinks else (4 if element == 4 else 4 + element) * llm.num_attention_heads * batch.tokens
    mlp = element * 3 * hidden  # gate and up, and their product
    adapters = (element + 1) * adapter_inputs  # inputs after dropout, and where it struck
    block = norms + rope + qkv + scores + mlp + adapters
    tokens = batch.rows * batch.tokens
    ends = element * 6 * width  # embeddings with features in place, the final norm, and their gradients
    # Logits of one chunk, probabilities and their gradient, in float32 or the first of them in half precision twice.
    chunk = min(tokens, LOSS_CHUNK) * llm.vocab_size * 12
    if recompute:
        # The backward pass of a block starts with all that it keeps; at its attention the MLP's share is gone again.
        attention = norms / 2 + rope + qkv + 3 * scores
        return tokens * (llm.num_hidden_layers * element * width + ends), max(tokens * max(block, attention) + widest, chunk)
    return tokens * (llm.num_hidden_layers * block + ends), max(tokens * 2 * scores, widest, chunk)


def _vision_activations(config, batch, element, flash, frozen, recompute, image_size):
    """The same of the vision tower and the projector."""
    vision = config.vision_config
    width, tokens = vision.hidden_size, 1 + (image_size // vision.patch_size) ** 2
    scores = 0 if flash else vision.num_attention_heads * tokens
    # Pixels, and what the projector keeps: its input twice, and both sides of GELU.
    side = round(1 / config.downsample_ratio)
    projector = tokens / side**2 * element * (2 * width * side**2 + 3 * config.llm_config.hidden_size)
    ends = batch.tiles * (4 * 3 * image_size**2 + projector)
    if frozen:  # nothing is kept; one block at work on a few tiles at a time
        working = max(8 * element * width + 12 * scores, element * (4 * width + 2 * vision.intermediate_size))
        return ends, min(batch.tiles, VISION_BATCH) * tokens * working
    norms = 10 * element * width + (2 * (4 + 2 * element) * width if vision.qk_normalization else 0)
    block = norms + 2 * element * vision.intermediate_size + (4 if element == 4 else 4 + element) * scores
    depth = vision.num_hidden_layers
    if recompute:
        working = max(block, norms / 2 + 12 * scores)
        return ends + batch.tiles * tokens * depth * element * width, batch.tiles * tokens * working
    return ends + batch.tiles * tokens * depth * block, batch.tiles * tokens * 8 * scores


LOSS_CHUNK = 512  # labelled tokens, as chunked_causal_loss
VISION_BATCH = 4  # tiles, as InternVLChatModel.vision_batch
OVERHEAD = 1.5 * GB  # the framework's own: context, kernels, workspaces, communication buffers


# ---------------------------------------------------------------------- steps


def count_steps(samples, train_args, processes):
    """Updates of a run over ``samples`` samples an epoch."""
    if train_args.max_steps > 0:
        return train_args.max_steps
    at_once = train_args.per_device_train_batch_size * train_args.gradient_accumulation_steps * processes
    an_epoch = samples // at_once if train_args.dataloader_drop_last else math.ceil(samples / at_once)
    return math.ceil(an_epoch * train_args.num_train_epochs)


# ---------------------------------------------------------------------- the command


@dataclass
class PlanArguments:
    """The plan alone."""

    processes: int = dataclasses.field(default=1, metadata={"help": "processes of the run, one a device"})
    device_memory: float | None = dataclasses.field(
        default=None, metadata={"help": "memory of a device in GB; default: that of the device here"}
    )
    table: bool = dataclasses.field(default=False, metadata={"help": "only print memory for each published model and method"})
    dry_run: bool = dataclasses.field(default=True, metadata={"help": "print the plan and start nothing"})


def plan(config, model_args, data_args, train_args, processes, kind):
    """Parameters, largest batch and memory of a run.

    Args:
        config: :class:`InternVLChatConfig` of the model that is started from.
        model_args, data_args, train_args: the trainer's arguments.
        processes: number of processes.
        kind: of the device: ``cpu``, ``gpu``, ``npu`` or another's name.

    Returns:
        (counts as from :func:`parameters`, :class:`Batch`, :class:`Memory`).
    """
    if device.is_cpu(kind):  # weights, gradients and most of what is kept are in float32 there
        train_args = dataclasses.replace(train_args, bf16=False, fp16=False, amp_master_grad=False)
    counts = parameters(config, model_args)
    batch = largest_batch(config, data_args, train_args)
    frozen = not any(learned for name, (_, learned) in counts.items() if name.startswith("vision_model."))
    flash = device.never_holds_scores(kind, train_args.half)
    shares = train_args.tensor_parallel_degree
    own = counts if shares == 1 else _divided(config, model_args, counts, shares)
    few = rounded(config, model_args), model_args.weight_dtype
    sharded = processes // shares
    if 0 < train_args.sharding_parallel_degree < sharded:
        sharded = train_args.sharding_parallel_degree
    needed = memory(config, own, train_args, batch, sharded, flash, frozen, data_args.force_image_size, shares, few)
    return counts, batch, needed


def _divided(config, model_args, counts, ranks):
    """``counts`` of the first of so many ranks that divide every layer, which has the largest share."""
    chosen = {"use_llm_lora": model_args.use_llm_lora, "use_backbone_lora": model_args.use_backbone_lora}
    config = dataclasses.replace(config, **{key: value or getattr(config, key) for key, value in chosen.items()})
    division, shapes = Division(config, 0, ranks), {weight.name: weight.shape for weight in config.weight_table()}
    own = {}
    for name, (size, learned) in counts.items():
        share = division.share(name)
        if share is not NOTHING:
            own[name] = (size if share is None else math.prod(share.of(shapes[name])), learned)
    return own


def describe(config, model_args, data_args, train_args, processes, kind, device_memory=None):
    """The plan as text.

    Args:
        config, model_args, data_args, train_args, processes, kind: see :func:`plan`.
        device_memory: bytes that a device has; None if unknown.
    """
    counts, batch, needed = plan(config, model_args, data_args, train_args, processes, kind)
    lines = ["parameters (millions)       trained      frozen"]
    parts = {"vision tower": "vision_model.", "projector": "mlp1.", "language model": "language_model."}
    sums = []
    for title, prefix in parts.items():
        own = [value for name, value in counts.items() if name.startswith(prefix)]
        sums.append([sum(size for size, learned in own if learned == wanted) / 1e6 for wanted in (True, False)])
        lines.append(f"  {title:20}{sums[-1][0]:13,.1f}{sums[-1][1]:12,.1f}")
    lines.append(f"  {'all':20}{sum(s[0] for s in sums):13,.1f}{sum(s[1] for s in sums):12,.1f}")
    where = f"each of {processes} devices" if processes > 1 else "the device"
    lines.append(f"memory of {where} (GB)")
    for title, value in (
        ("weights", needed.weights),
        ("optimizer states", needed.optimizer),
        ("gradients", needed.gradients),
        ("activations", needed.activations),
        ("the framework's own", OVERHEAD),
        ("peak", needed.peak + OVERHEAD),
    ):
        lines.append(f"  {title:20}{value / GB:13,.1f}")
    share = processes if device.is_cpu(kind) else 1  # processes on CPU share one memory
    if device_memory is None:
        lines.append(f"  there is no {kind} here to compare with: give --device_memory GB")
    elif (needed.peak + OVERHEAD) * share > device_memory:
        lines.append(f"  does NOT fit into {device_memory / GB:,.0f} GB: see 'Out of memory' in docs/finetune.md")
    else:
        lines.append(f"  fits into {device_memory / GB:,.0f} GB")
    recompute = "with" if train_args.recompute else "without"
    lines.append(f"  for batches of {batch.rows} x {batch.tokens} tokens and {batch.tiles} tiles, {recompute} recompute")
    if data_args.meta_path is not None:
        try:
            samples = sum(len(source) for source in read_meta(data_args.meta_path))
        except DataError as error:  # a plan can be made before the data are here
            return "\n".join([*lines, f"number of steps not known: {error}"])
        shares = processes // train_args.tensor_parallel_degree
        steps = count_steps(samples, train_args, shares)
        an_update = train_args.per_device_train_batch_size * train_args.gradient_accumulation_steps * shares
        lines.append(f"samples of an epoch   {samples:11,}")
        lines.append(f"samples of an update  {an_update:11,}")
        lines.append(f"updates               {steps:11,}")
        lines.append(f"tokens                {steps * an_update * batch.tokens / 1e6:11,.1f} million at most")
    return "\n".join(lines)


def read_config(model_args):
    """The configuration of the model that is started from: its ``config.json``, or the sizes that are known for its name.

    Of a model that is put together: those of its two parts. Of a language model that is MXFP4 the plan counts bfloat16, which
    it is read into.

    Raises:
        UserError: there is no such directory, and the name is not that of a published model.
    """
    from paddlemix.checkpoints.hub import resolve

    from .parts import parts_config

    whole = model_args.model_name_or_path
    name = os.path.basename(os.path.normpath(whole or model_args.llm_path))
    if not os.path.isdir(whole or model_args.llm_path) and is_known(name):
        return published_config(name)
    if whole is None:
        return parts_config(resolve(model_args.vision_path), resolve(model_args.llm_path), 0.5)[0]
    return InternVLChatConfig.from_pretrained(resolve(model_args.model_name_or_path))


@command_main
def main(argv=None, extra=()):
    """The command line; ``extra`` are dataclasses of flags that say nothing about memory."""
    argv = sys.argv[1:] if argv is None else argv
    if argv == ["--table"]:
        from .plan_table import memory_table

        print(memory_table())
        return
    *arguments, own = parse(argv, prog="python -m paddlemix.training.plan", extra=(*extra, PlanArguments))
    arguments = arguments[:3]
    model_args, _, train_args = arguments
    total = None if own.device_memory is None else own.device_memory * GB
    kind = train_args.device.split(":")[0]
    try:
        kind = device.set_device(train_args.device)
        total = device.total_memory() if total is None else total
    except DeviceError:
        pass  # a plan for another machine
    print(describe(read_config(model_args), *arguments, own.processes, kind, total))


if __name__ == "__main__":
    main()
