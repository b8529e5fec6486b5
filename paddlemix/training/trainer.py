"""The training loop, and what starts it.

Not PaddleNLP's ``Trainer``: its loop averages losses over batches and processes, so that samples with short answers weigh
more the fewer processes there are, and it resumes, logs and rotates checkpoints differently with one process than with
many. Here a step is the mean over all labelled tokens of the global batch, however that is cut.
"""

import contextlib
import math
import os
import signal
import time

import numpy as np
import paddle

from paddlemix import device
from paddlemix.datasets.internvl2 import BadSampleLog
from paddlemix.errors import ConfigError, TrainingError, UserError
from paddlemix.kernels.bfloat16 import Bfloat16Products
from paddlemix.models.blocks.engine import fuse_frozen_tower
from paddlemix.models.blocks.parallel import whole_parameters
from paddlemix.parallel.groups import now_doing

from .building import train_mode
from .checkpoints import Checkpoints, read_optimizer, read_state, save_model
from .divided import DividedParameters
from .log import TrainLog, peak_flops, summary, training_flops
from .objective import CausalObjective
from .optimizer import Optimizer
from .plan import deal, parameters
from .processes import Processes
from .recipe import ChatRecipe, PackedRows, training_data, validation_data
from .recipe import SampledBatches as SampledBatches
from .recipe import data_options as data_options
from .schedule import learning_rate, learning_rates
from .sharding import ShardedWeights


class BatchStats:
    """What a batch amounts to.

    Attributes:
        segments: tokens of each sample, int array.
        labels: labelled tokens.
        places: tokens with padding.
        tiles: tiles, blank ones included.
    """

    def __init__(self, batch):
        # As in the loss: the first token of a row is predicted from nothing.
        self.labels = int((batch["labels"][:, 1:] >= 0).sum())
        numbers = batch.get("segment_ids")
        self.segments = (
            batch["attention_mask"].sum(1)
            if numbers is None
            else np.concatenate([np.bincount(row)[1:] for row in numbers])  # number 0 is padding
        )
        self.places = batch["input_ids"].size
        self.tiles = len(batch["pixel_values"]) if "pixel_values" in batch else 0


class Trainer:
    """Trains a model that :func:`~.building.prepare` has set up.

    Args:
        model: :class:`InternVLChatModel`.
        parameters: ``{name: parameter}`` of what learns.
        args: :class:`~.arguments.PreTrainingArguments`.
        processes: :class:`~.processes.Processes`.
        total: steps of the whole run.
        decays, rates: see :class:`Optimizer`.
        objective: what a step makes small; cross entropy by default.

    Attributes:
        optimizer: the :class:`Optimizer`.
        weights: :class:`ShardedWeights` with stage 3, otherwise None.
    """

    write = staticmethod(save_model)

    def __init__(self, model, parameters, args, processes, total, decays=None, rates=None, objective=None):
        self.model, self.args, self.processes, self.total = model, args, processes, total
        divided = None if getattr(model, "group", None) is None else DividedParameters(model)
        groups = (processes.sharded, processes.replicas) if processes.sharded.size > 1 else (processes.data, None)
        self.optimizer = Optimizer(parameters, args, decays, rates, groups[0], divided, groups[1])
        self.weights = ShardedWeights(model, self.optimizer) if self.optimizer.stage == 3 else None
        self.optimizer.watch(model)
        self.half = None if device.is_cpu() else args.half
        self.products = Bfloat16Products() if device.is_cpu() and args.bf16 else None
        rounds = self.products is not None and self.products.packed is None  # which the engine does not
        if device.is_cpu() and self.weights is None and not rounds:
            fuse_frozen_tower(model, "float32" if self.products is None else self.products.packed)
        self.set_objective(objective or CausalObjective())

    def set_objective(self, objective):
        """Make this what a step makes small."""
        self.objective = objective
        if self.weights:
            objective.holding = self.weights.hold

    def autocast(self):
        """A context in which products are computed in half precision, if that is asked for."""
        if self.products is not None:
            return self.products
        if self.half is None or self.args.fp16_opt_level == "O2":  # O2: the weights' own dtype decides
            return contextlib.nullcontext()
        return paddle.amp.auto_cast(level="O1", dtype=self.half)

    def _loss(self, batch, totals, update=True):
        with self.autocast():
            return self.objective.loss(self.model, batch, totals, update)

    def step(self, number, batches):
        """One update.

        Args:
            number: of the step; the first is 0.
            batches: this process's share of it, as :class:`Collator` makes them.

        Returns:
            (loss: the weighted mean over all labels of all processes, gradient norm, learning rate).

        Raises:
            TrainingError: the loss or the gradients are not finite; nothing was updated.
        """
        # Dropout and stochastic depth are decided by the step, so that a resumed run goes on as the first would have.
        now_doing(f"step {number + 1}")
        paddle.seed((self.args.seed * 1_000_003 + number) * 4099 + self.processes.rank)
        totals = self.processes.sum(np.sum([self.objective.weights(batch) for batch in batches], axis=0))
        losses = []
        if self.objective.moves_weights:
            self.optimizer.arrive()
        else:
            self.optimizer.arrive_outside()
        for number_here, batch in enumerate(batches, 1):
            loss = self._loss(batch, totals)
            self.optimizer.begin_backward(last=number_here == len(batches))
            with self.products or contextlib.nullcontext():  # activations may be computed again
                (loss * self.optimizer.loss_scale).backward()
            self.optimizer.accumulate()
            if self.weights:
                self.weights.end_backward()
            losses.append(loss.detach())
        losses = [float(loss) for loss in losses]
        (loss,) = self.processes.sum([sum(losses)])
        if not math.isfinite(loss):
            bad = [name for batch, value in zip(batches, losses) if not math.isfinite(value) for name in batch["names"]]
            self._fail(number, f"loss is {loss}", bad)
        rate = learning_rate(number, self.total, self.args)
        scale = self.optimizer.loss_scale
        norm = self.optimizer.step(rate)
        if self.products is not None:
            self.products.forget()
        if not math.isfinite(norm) and scale == 1.0:
            self._fail(number, "gradients are not finite", [name for batch in batches for name in batch["names"]])
        return loss, norm, rate

    def _fail(self, number, what, names):
        self.optimizer.clear()
        names = sum(self.processes.gather(names), [])
        shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        raise TrainingError(
            f"step {number + 1}: the {what}; its samples are {shown or 'of all processes'}: check them or the --learning_rate"
        )

    @paddle.no_grad()
    def evaluate(self, batches):
        """Mean loss over all labels (or pairs) of ``batches`` and of those of the other processes."""
        self.optimizer.arrive()
        self.model.eval()
        loss = weight = 0.0
        for batch in batches if self.weights is None else self._in_step(batches):
            own = self.objective.weights(batch)
            loss, weight = loss + float(self._loss(batch, own, update=False)) * own[0], weight + own[0]
        train_mode(self.model)
        loss, weight = self.processes.sum([loss, weight])
        return loss / max(weight, 1.0)

    @paddle.no_grad()
    def score(self, scorer, tokenizer, step):
        """What ``scorer`` makes of the model now: ``{name: number}``.

        With stage 3 each block has its weights while it runs, so that all processes run all of them in step.
        """
        self.optimizer.arrive()
        self.model.eval()
        holding = self.weights.hold() if self.weights else contextlib.nullcontext()
        with self.autocast(), holding:
            scores = scorer(self.model, tokenizer, self.processes, self.weights is not None, step)
        train_mode(self.model)
        return scores

    def _in_step(self, batches):
        """``batches``; while other processes have more of them, helps with theirs."""
        batches = iter(batches)
        while True:
            batch = next(batches, None)
            (busy,) = self.processes.sum([batch is not None])
            if batch is not None:
                yield batch
            elif busy and (idle := self.objective.idle()) is not None:
                yield idle
            elif busy:
                self.weights.attend()
            else:
                return

    def save(self, tokenizer, source):
        """Function that writes the model to a directory; all processes call this, and the first one what it returns."""
        self.optimizer.arrive()
        weights = self.weights and self.weights.whole(self.processes.rank == 0)
        if self.optimizer.divided is not None:
            weights = whole_parameters(self.model, weights) if self.processes.rank == 0 else None
        return lambda directory: self.write(self.model, tokenizer, directory, source, weights)

    def states(self):
        """What a checkpoint keeps of the optimiser here; None where another process has the same. All processes call this."""
        shards = self.optimizer.world if self.optimizer.stage else 1
        return self.optimizer.state() if self.processes.rank < shards else None


def due(strategy, every, done, total, epoch_ends):
    """Whether a thing with ``strategy`` is due after ``done`` steps."""
    return (strategy == "steps" and done % every == 0) or (strategy == "epoch" and (epoch_ends(done) or done == total))


def _check_evaluation(data_args, args, scorer):
    """Raise ConfigError where there is nothing to evaluate, or the best model is to be told by what is not evaluated."""
    if args.eval_tasks and scorer is None:
        raise ConfigError("--eval_tasks is not supported by this command: leave it out, or use paddlemix evaluate afterwards")
    known = [*(scorer.names if scorer else ()), *(["loss"] if data_args.eval_meta_path else ())]
    if (args.do_eval or args.evaluation_strategy != "no") and not known:
        raise ConfigError(
            "--eval_meta_path is missing: name the held-out data for the validation loss, or benchmarks with --eval_tasks"
        )
    metric = args.metric_for_best_model
    if metric and metric not in known:
        raise ConfigError(
            f"--metric_for_best_model {metric} is not evaluated: use {' or '.join(known) or '--eval_tasks or --eval_meta_path'}"
        )


def finetune(model_args, data_args, args, recipe=None, scorer=None):
    """A whole run: build, resume, train, save.

    Args:
        model_args, data_args, args: from :func:`~.arguments.parse`.
        recipe: what the model's family does in its own way; see :class:`ChatRecipe`.
        scorer: what else is evaluated: ``names``, and a call with (model, tokenizer, processes, whether all must run it in
            step, steps done) that gives ``{name: number}``, higher being better.

    Raises:
        UserError: something that was given cannot be used; the sentence says what.
        SystemExit: with 143, after SIGTERM and a checkpoint.
    """
    recipe = recipe or ChatRecipe()
    if data_args.meta_path is None and args.do_train:
        raise ConfigError("--meta_path is missing: name the JSON file that lists your data sets")
    if data_args.use_packed_ds and "epoch" in (args.save_strategy, args.evaluation_strategy):
        raise ConfigError("--use_packed_ds has no common epochs: use steps for --save_strategy and evaluation")
    _check_evaluation(data_args, args, scorer)
    device.set_device(args.device)
    if args.tensor_parallel_degree > 1 and not recipe.divides_layers:
        raise ConfigError("--tensor_parallel_degree is for fine-tuning and pretraining of chat models: leave it out here")
    if model_args.weight_dtype and (args.tensor_parallel_degree > 1 or args.sharding == "stage3"):
        raise ConfigError(
            "weights in few bits (--load_4bit, --load_8bit, --bits) are whole in each process: leave out "
            "--tensor_parallel_degree, and use stage2 instead of stage3"
        )
    processes = Processes(args.tensor_parallel_degree, args.sharding_parallel_degree)
    checkpoints = Checkpoints(args.output_dir, processes, args.save_total_limit)
    checkpoints.start(args.overwrite_output_dir)
    resumed = args.resume_from_checkpoint or checkpoints.last()
    if not resumed and args.do_train:
        checkpoints.forget_best()
    half = None if device.is_cpu() else args.half
    dtype = half if half and args.fp16_opt_level == "O2" else "float32"
    paddle.seed(args.seed)  # new weights are alike in all processes
    keep = _owned(model_args, processes) if args.sharding == "stage3" else None
    more = {"ranks": processes.tensor} if processes.tensor.size > 1 else {}
    model, tokenizer, source = recipe.build_model(model_args, data_args, dtype, resumed, keep, **more)
    trained = recipe.prepare(model, model_args, args.recompute or model_args.grad_checkpoint)

    data, total = training_data(model, tokenizer, data_args, args, processes, recipe) if args.do_train else (None, 0)
    validation = validation_data(model, tokenizer, data_args, args, processes, recipe)
    rates = learning_rates(args, len(model.vision_model.encoder.layers))
    trainer = Trainer(model, trained, args, processes, total, rates=rates)
    trainer.set_objective(recipe.objective(model, bool(resumed), processes))  # of weights that are divided by now
    trainer.write = recipe.save_model
    done, states = 0, None
    if resumed and args.do_train and not args.ignore_load_lr_and_optim:
        done, states = read_state(resumed)
        data.check(states[0])
        state = states[processes.rank] if processes.rank < len(states) else states[0]
        read_optimizer(resumed, trainer.optimizer)
        if state.get("objective") is not None:
            trainer.objective.load_state(state["objective"])

    log = TrainLog(args, total, done, processes.is_first)
    log.say(summary(model, args, total, processes, dtype, half, trainer.products))
    if resumed:
        log.say(f"going on from {resumed} after {done} steps")
    try:
        with Sigterm() as interrupted:
            bad_samples = BadSampleLog(os.path.join(args.output_dir, "bad_samples.jsonl"), data_args.max_bad_samples)
            run = _Run(trainer, data, (validation, scorer), checkpoints, log, (tokenizer, source), bad_samples)
            if args.do_train:
                trainer.objective.prepare(trainer, data)
                run.train(done, states, interrupted)
            elif args.do_eval:
                run.evaluate(done)
            best = checkpoints.best() if args.load_best_model_at_end else None
            if best:
                log.say(f"the model is that after {best['step']} steps, whose {best['metric']} was {best['value']:.4f}")
    finally:
        log.close()
    if args.do_train:
        write = trainer.save(tokenizer, source) if best is None else lambda directory: checkpoints.take_best()
        if processes.is_first:
            write(args.output_dir)
    processes.wait()


def _owned(model_args, processes):
    """For :func:`build_model`: keeps what this process owns with stage 3."""

    def keep(config):
        owners = deal(parameters(config, model_args), processes.sharded.size)
        return lambda name: owners[name] == processes.sharded.rank

    return keep


def in_all(processes, load):
    """What ``load()`` returns; where it fails for one process with a :class:`UserError`, all stop."""
    loaded, error = None, None
    try:
        loaded = load()
    except UserError as caught:
        error = caught
    (errors,) = processes.sum([error is not None])
    if error:
        raise error
    if errors:
        raise TrainingError("another process cannot go on with its data: see its log")
    return loaded


class Sigterm:
    """Takes note of SIGTERM while it is entered: calling it tells whether one came."""

    def __enter__(self):
        self._came = False
        self._before = signal.signal(signal.SIGTERM, self._note)
        signal.siginterrupt(signal.SIGTERM, False)  # a launcher's second one must not break off what saving waits for
        return self

    def __exit__(self, *_):
        signal.signal(signal.SIGTERM, self._before)

    def _note(self, *_):
        self._came = True

    def __call__(self):
        return self._came


class _Run:
    """The steps of a run and what is due between them."""

    def __init__(self, trainer, data, held_out, checkpoints, log, origin, bad_samples):
        self.trainer, self.data, (self.validation, self.scorer) = trainer, data, held_out
        self.checkpoints, self.log, self.origin = checkpoints, log, origin
        self.args, self.processes = trainer.args, trainer.processes
        self.bad_samples = bad_samples
        self._peak = peak_flops(trainer.half or "float32")
        self._reset()

    def train(self, done, states, interrupted):
        """Steps ``done`` to the last; ``interrupted`` is asked after each whether to stop."""
        args, total, epoch_ends = self.args, self.trainer.total, self._epoch_ends()
        batches = self.data.start(done, states)
        saved = done
        while done < total:
            began = time.perf_counter()
            work = self._load(batches)
            loaded = time.perf_counter()
            loss, norm, rate = self.trainer.step(done, work)
            done += 1
            self._note(work, loss, loaded - began, time.perf_counter() - began)
            self.log.step(loss)
            if done % args.logging_steps == 0 or done == total or (done == 1 and args.logging_first_step):
                self._write(done, norm, rate)
            if due(args.evaluation_strategy, args.eval_steps, done, total, epoch_ends):
                self.evaluate(done)
            (stop,) = self.processes.sum([interrupted()])
            if stop or due(args.save_strategy, args.save_steps, done, total, epoch_ends):
                self._save(done)
                saved = done
            if stop and done < total:
                self.log.say(f"interrupted after {done} steps; checkpoint-{saved} is complete: the same command goes on")
                raise SystemExit(143)
        if (args.do_eval or self.scorer) and args.evaluation_strategy == "no":
            self.evaluate(done)

    def _epoch_ends(self):
        if isinstance(self.data, PackedRows):
            return lambda done: False
        an_epoch = self.data.sampler.steps_per_epoch
        return lambda done: done % an_epoch == 0

    def _load(self, batches):
        """The batches of a step; where one process cannot have them, all stop."""
        count = self.args.gradient_accumulation_steps
        return in_all(self.processes, lambda: [self.bad_samples.take(next(batches)) for _ in range(count)])

    def _reset(self):
        self._noted, self._since = [], time.perf_counter()

    def _note(self, work, loss, data_time, step_time):
        stats = [BatchStats(batch) for batch in work]
        flops = sum(training_flops(self.trainer.model, s.segments, s.labels, s.tiles) for s in stats)
        sums = [
            sum(int(s.segments.sum()) for s in stats),
            sum(s.places for s in stats),
            sum(len(s.segments) for s in stats),
            sum(s.tiles for s in stats),
            flops,
            data_time,
            step_time,
        ]
        self._noted.append((loss, sums))

    def _write(self, done, norm, rate):
        """One line about the steps since the last."""
        steps, elapsed = len(self._noted), time.perf_counter() - self._since
        losses = [loss for loss, _ in self._noted]
        local = np.sum([sums for _, sums in self._noted], axis=0)
        tokens, places, samples, tiles, flops, data_time, step_time = self.processes.sum(local)
        world = self.processes.world
        values = {
            "loss": sum(losses) / steps,
            "learning_rate": rate,
            "grad_norm": norm,
            "tokens_per_second": tokens / elapsed,
            "samples_per_second": samples / elapsed,
            "tiles_per_step": tiles / steps,
            "mfu": flops / self.processes.everybody.size / elapsed / self._peak,
            "step_time": step_time / world / steps,
            "data_time": data_time / world / steps,
            "memory_gb": device.peak_memory() / 1e9,
            "padding": 1 - tokens / places,
            "bad_samples": self.bad_samples.bad,
            "epoch": self.data.epoch(done),
        }
        values |= self.trainer.objective.metrics(self.processes)
        if self.args.fp16:
            values["loss_scale"] = self.trainer.optimizer.loss_scale
        self.log.write(done, values)
        self._reset()

    def evaluate(self, done):
        """Write the validation loss and the scores, and keep the best model."""
        values = {}
        if self.validation is not None:
            loss = self.trainer.evaluate(map(self.bad_samples.take, self.validation()))
            told = self.trainer.objective.metrics(self.processes, update=False)
            values |= {"loss": loss, **told}
            self.log.say(f"step {done}: validation loss {loss:.4f}")
        if self.scorer is not None:
            scores = self.trainer.score(self.scorer, self.origin[0], done)
            values |= scores
            self.log.say(f"step {done}: {', '.join(f'{name} {value:.4f}' for name, value in scores.items())}")
        self.log.write(done, {f"eval_{name}": value for name, value in values.items()})
        if self.args.metric_for_best_model and self.args.do_train:
            self._keep_best(done, values[self.args.metric_for_best_model])
        self._reset()

    def _keep_best(self, done, value):
        metric, before = self.args.metric_for_best_model, self.checkpoints.best()
        sign = -1 if metric == "loss" else 1
        better = before is None or before["metric"] != metric or sign * value > sign * before["value"]
        # By the first process: others may read when it has written.
        if self.processes.sum([better and self.processes.is_first])[0]:
            self.checkpoints.save_best(self.trainer.save(*self.origin), {"metric": metric, "value": value, "step": done})

    def _save(self, done):
        arrays, write = self.trainer.states(), self.trainer.save(*self.origin)
        state = {**self.data.state(), "objective": self.trainer.objective.state()}
        self.checkpoints.save(done, write, arrays, state)
        self._reset()
