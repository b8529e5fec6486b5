"""A run of training whose batches are made from the number of a step alone: it resumes exactly and needs no state of data."""

import functools
import math
import time

from paddlemix import device
from paddlemix.errors import ConfigError

from .checkpoints import Checkpoints, read_optimizer, read_state
from .log import TrainLog
from .trainer import Sigterm, due, in_all


def steps_of(count, args, world):
    """(batches a process computes in a step, steps of an epoch, steps of the run) for ``count`` samples.

    Raises:
        ConfigError: there are fewer samples than a step takes.
    """
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * world
    epoch = count // batch
    if not epoch:
        raise ConfigError(f"a step takes {batch} samples, but there are {count}: use a smaller --per_device_train_batch_size")
    total = args.max_steps if args.max_steps > 0 else math.ceil(epoch * args.num_train_epochs)
    return args.gradient_accumulation_steps, epoch, total


def run(trainer, batches, write_model, resumed=None, epoch=None):
    """All steps of a run, with log and checkpoints, and the model in the output directory at its end.

    Args:
        trainer: :class:`~.trainer.Trainer`; its model has the weights of ``resumed``.
        batches: called with the number of a step; this process's batches of it.
        write_model: called with a directory in the first process.
        resumed: a checkpoint's directory whose steps and optimiser states are taken over.
        epoch: steps of an epoch, for strategies that go by epochs.

    Raises:
        SystemExit: with 143, after SIGTERM and a checkpoint.
    """
    args, processes, total = trainer.args, trainer.processes, trainer.total
    checkpoints = Checkpoints(args.output_dir, processes, args.save_total_limit)
    done = 0
    if resumed:
        done, _ = read_state(resumed)
        read_optimizer(resumed, trainer.optimizer)
    log = TrainLog(args, total, done, processes.is_first)
    noted, since = [], time.perf_counter()
    try:
        with Sigterm() as interrupted:
            while done < total:
                work = in_all(processes, functools.partial(batches, done))
                loss, norm, rate = trainer.step(done, work)
                done += 1
                noted.append(loss)
                log.step(loss)
                if done % args.logging_steps == 0 or done == total:
                    elapsed = (time.perf_counter() - since) / len(noted)
                    values = {"loss": sum(noted) / len(noted), "learning_rate": rate, "grad_norm": norm, "step_time": elapsed}
                    log.write(done, {**values, "memory_gb": device.peak_memory() / 1e9})
                    noted, since = [], time.perf_counter()
                (stop,) = processes.sum([interrupted()])
                if stop or due(args.save_strategy, args.save_steps, done, total, lambda at: epoch and at % epoch == 0):
                    checkpoints.save(done, write_model, trainer.states(), {})
                if stop and done < total:
                    log.say(f"interrupted after {done} steps; checkpoint-{done} is complete: the same command goes on")
                    raise SystemExit(143)
    finally:
        log.close()
    if processes.is_first:
        write_model(args.output_dir)
    processes.wait()
