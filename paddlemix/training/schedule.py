"""How fast each parameter learns in each step."""

import math
import re


def learning_rate(step, total, args):
    """Learning rate of a step, the first being 0: linear warm-up, then as ``lr_scheduler_type`` says.

    Args:
        step: steps done before.
        total: steps of the run.
        args: :class:`~.arguments.PreTrainingArguments`.
    """
    kind, peak = args.lr_scheduler_type, args.learning_rate
    warmup = args.warmup_steps or math.ceil(args.warmup_ratio * total)
    if kind == "constant":
        return peak
    if step < warmup:
        return peak * step / warmup
    progress = (step - warmup) / max(total - warmup, 1)
    if kind == "constant_with_warmup":
        return peak
    if kind == "cosine":
        return peak * max(0.0, 0.5 * (1 + math.cos(2 * math.pi * args.num_cycles * progress)))
    if kind == "polynomial":
        return args.lr_end + (peak - args.lr_end) * (1 - progress) ** args.power
    return peak * (1 - progress)


def learning_rates(args, depth):
    """What the learning rate of each part is multiplied by: a function from a parameter's name, or None where all are alike.

    Args:
        args: :class:`~.arguments.PreTrainingArguments`.
        depth: blocks of the vision tower; every one before the last learns ``vit_layer_decay_rate`` times as fast as the next.
    """
    if args.mm_projector_lr is None and args.vit_lr is None and args.vit_layer_decay_rate == 1:
        return None
    projector, tower = ((rate or args.learning_rate) / args.learning_rate for rate in (args.mm_projector_lr, args.vit_lr))

    def factor(name):
        if name.startswith("mlp1."):
            return projector
        if not name.startswith("vision_model."):
            return 1.0
        block = re.match(r"vision_model\.encoder\.layers\.(\d+)\.", name)
        behind = depth if block is None else depth - 1 - int(block[1])  # the embedding comes before all blocks
        return tower * args.vit_layer_decay_rate**behind

    return factor
