"""What a run says of itself: a progress bar, ``train_log.jsonl`` and curves, with the speed that was reached."""

import importlib
import json
import os
import time

import numpy as np
import paddle
from tqdm import tqdm

from paddlemix import device
from paddlemix.errors import ConfigError
from paddlemix.extras import how_to_install
from paddlemix.models.blocks.flops import decoder_flops, vision_flops

from .arguments import targets


def training_flops(model, segments, labels, tiles):
    """FLOPs of the forward and backward pass of a batch, without what recompute adds.

    Args:
        model: :class:`InternVLChatModel` with its parts frozen or not.
        segments: tokens of each sample.
        labels: labelled tokens together.
        tiles: number of tiles.

    A backward pass costs as much as the forward pass for gradients of the inputs, where something before them learns, and
    as much again for those of the weights that learn.
    """
    config = model.config
    llm = sum(decoder_flops(config, int(tokens), logits=0) for tokens in segments)
    llm += 2 * labels * config.llm_config.hidden_size * config.llm_config.vocab_size
    vision = vision_flops(config, tiles)
    llm_learns = _learning_share(model.language_model)
    vision_learns = _learning_share(model.vision_model)
    return llm * (2 + llm_learns) + vision * (1 + (1 + vision_learns if vision_learns else 0))


def _learning_share(layer):
    sizes = [(p.size, not p.stop_gradient) for p in layer.parameters()]
    return sum(size for size, learns in sizes if learns) / sum(size for size, _ in sizes)


def peak_flops(dtype, seconds=0.2):
    """FLOPs a second of a large matrix product on this device in ``dtype``: what 100% utilisation means."""
    size, best = 512, 0.0
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        a = paddle.ones([size, size], dtype)
        paddle.matmul(a, a)
        device.synchronize()
        began = time.perf_counter()
        paddle.matmul(a, a)
        device.synchronize()
        best = max(best, 2 * size**3 / (time.perf_counter() - began))
        size = min(2 * size, 8192)
    return best


class _Curves:
    """Points of curves for VisualDL or TensorBoard, in files of a folder."""

    def __init__(self, writer):
        self._writer = writer

    def add(self, step, values):
        """A point of each curve, ``{name: number}``."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self):
        """Write what is left."""
        self._writer.close()


def _visualdl(folder, args):
    return _Curves(_module("visualdl").LogWriter(logdir=folder))


def _tensorboard(folder, args):
    return _Curves(_module("tensorboardX").SummaryWriter(logdir=folder))


class _Wandb:
    """Points of curves for Weights & Biases; its environment variables (``WANDB_MODE``, ``WANDB_PROJECT``) say where to."""

    def __init__(self, folder, args):
        os.makedirs(folder, exist_ok=True)
        name = os.path.basename(os.path.abspath(args.output_dir))
        self._run = _module("wandb").init(project=os.environ.get("WANDB_PROJECT", "paddlemix"), name=name, dir=folder)

    def add(self, step, values):
        """As of the other writers."""
        self._run.log(values, step=step)

    def close(self):
        """Send or write what is left."""
        self._run.finish()


WRITERS = {"visualdl": _visualdl, "tensorboard": _tensorboard, "wandb": _Wandb}


def _module(name):
    try:
        return importlib.import_module(name)
    except ImportError:
        extra = {"tensorboardX": "tensorboard", "wandb": "wandb"}.get(name)
        raise ConfigError(
            f"{name} is not installed, which --report_to {extra or name} needs: {how_to_install(name, extra)}, or use none"
        ) from None


class TrainLog:
    """Progress of a run; only the first process says anything.

    Args:
        args: :class:`~.arguments.PreTrainingArguments`.
        total: steps in all.
        done: steps done by the run that is resumed.
        active: whether this process is the first.
    """

    def __init__(self, args, total, done=0, active=True):
        self.active, self._sums, self._steps = active, {}, 0
        if not active:
            return
        self.path = os.path.join(args.output_dir, "train_log.jsonl")
        kept = [row for row in read_log(self.path) if row.get("step", 0) <= done] if done else []
        # What a killed run wrote after its last checkpoint happens again.
        with open(self.path, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in kept)
        places = args.logging_dir or os.path.join(args.output_dir, "runs")
        self._writers = [WRITERS[name](places, args) for name in targets(args.report_to)]
        self._bar = tqdm(total=total, initial=done, disable=args.disable_tqdm, unit="step", dynamic_ncols=True)

    def step(self, loss):
        """One step is done."""
        if self.active:
            self._bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
            self._bar.update()

    def write(self, step, values):
        """One line of the log, and a point of every curve, without what is not a number: the norm after an overflow."""
        if not self.active:
            return
        values = {name: value for name, value in values.items() if np.isfinite(value)}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **{k: _rounded(v) for k, v in values.items()}}) + "\n")
        for writer in self._writers:
            writer.add(step, {name: float(value) for name, value in values.items()})

    def say(self, text):
        """A line above the progress bar."""
        if self.active:
            self._bar.write(text)

    def close(self):
        """End the progress bar."""
        if self.active:
            self._bar.close()
            for writer in self._writers:
                writer.close()


def read_log(path):
    """Lines of a ``train_log.jsonl`` as dictionaries; one that a killed run left half written is left out."""
    rows = []
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            for line in file:
                try:
                    rows.append(json.loads(line))
                except ValueError:
                    continue
    return rows


def _rounded(value):
    return float(f"{value:.9g}") if isinstance(value, (float, np.floating)) else value


def summary(model, args, total, processes, dtype, half, products=None):
    """What a run of ``total`` steps is, in a sentence.

    Args:
        model: what learns, with its parameters frozen or not.
        args: :class:`~.arguments.PreTrainingArguments`.
        total: steps.
        processes: :class:`~.processes.Processes`.
        dtype, half: of the weights, and of products on devices that have it.
        products: :class:`~paddlemix.kernels.bfloat16.Bfloat16Products` where they compute them, on CPU.
    """
    sizes = [(p.size, p.stop_gradient) for p in model.parameters()]
    sizes += [(layer.in_features * layer.out_features, True) for layer in model.quantised_layers.values()]
    learned = sum(size for size, frozen in sizes if not frozen)
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * processes.world
    computed = "" if half is None or dtype == half else f", products in {half}"
    under = f", under adapters in {model.weight_dtype}" if model.quantised_layers else ""
    note = " (Paddle trains in nothing else on CPU)" if args.half and half is None else ""
    if products is not None:
        computed, note = ", products in bfloat16", products.note
    return (
        f"{learned / 1e6:,.1f} of {sum(size for size, _ in sizes) / 1e6:,.1f} million parameters learn; {total} steps of "
        f"{batch} rows on {processes.everybody.size} x {device.current()}; weights in {dtype}{under}{computed}{note}"
    )
