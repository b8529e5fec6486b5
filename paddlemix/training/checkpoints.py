"""Checkpoints that are whole or not there: ``checkpoint-N`` in the output directory after ``N`` steps.

Each is a model like any other, to chat with or to start from, and beside it what resuming needs: the optimiser states of
every process (``optimizer-R.safetensors``) and ``trainer_state.json``. ``best`` is the model with the best score so far, where
one is asked for. All is written to a directory of another name, which is renamed once everything is on the disk.
"""

import glob
import json
import os
import re
import shutil

from safetensors.numpy import load_file, save_file

from paddlemix.errors import CheckpointError, ConfigError
from paddlemix.models.blocks.quantising import originals
from paddlemix.models.internvl2.checkpoint import save_checkpoint

_STATE = "trainer_state.json"
_UNFINISHED = "unfinished-checkpoint"
_BEST, _TOLD = "best", "best.json"


def save_model(model, tokenizer, directory, source=None, weights=None):
    """Write a model in the original's layout with all that an engine needs to load it.

    Args:
        model: :class:`InternVLChatModel`.
        tokenizer: its tokenizer.
        directory: is made if it does not exist.
        source: directory that the model came from, whose further small files go along (remote code, preprocessor).
        weights: ``{name: array}``, where the model itself does not have them all.
    """
    dtype = str(model.mlp1["1"].weight.dtype).removeprefix("paddle.")
    model.config.extra["torch_dtype"] = dtype
    with originals(model, dtype) as rounded:
        save_checkpoint({**(weights or model.state_dict()), **rounded}, model.config, directory)
    model.config.save(directory)
    tokenizer.save_pretrained(directory)
    for pattern in ("generation_config.json", "preprocessor_config.json", "*.py"):
        for path in glob.glob(os.path.join(glob.escape(source), pattern)) if source else ():
            if os.path.realpath(os.path.dirname(path)) != os.path.realpath(directory):
                shutil.copy(path, directory)
    path = os.path.join(directory, "generation_config.json")
    if not os.path.exists(path):
        # The original takes these from the template anew for each chat; other engines read them here.
        stop = tokenizer.convert_tokens_to_ids(model.template().stop)
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"eos_token_id": stop, "pad_token_id": tokenizer.pad_token_id}, file, indent=2)
            file.write("\n")


class Checkpoints:
    """The checkpoints of a run.

    Args:
        directory: the output directory, which all processes share.
        processes: :class:`~.processes.Processes`.
        keep: how many to keep; None for all.
    """

    def __init__(self, directory, processes, keep=None):
        self.directory, self.processes, self.keep = directory, processes, keep
        self._replaced = []

    def start(self, overwrite):
        """Make the directory, and clear away what an interrupted run left unfinished.

        Args:
            overwrite: whether existing checkpoints are of no interest; they go once a new one is there.
        """
        os.makedirs(self.directory, exist_ok=True)
        if self.processes.is_first:
            for name in os.listdir(self.directory):
                if name.startswith(_UNFINISHED):
                    shutil.rmtree(os.path.join(self.directory, name))
        if overwrite:
            self._replaced = [path for _, path in self._all()]
        self.processes.wait()

    def _all(self):
        """(step, path) of every checkpoint, the first step first."""
        found = []
        for name in os.listdir(self.directory) if os.path.isdir(self.directory) else ():
            path = os.path.join(self.directory, name)
            if (match := re.fullmatch(r"checkpoint-(\d+)", name)) and os.path.isfile(os.path.join(path, _STATE)):
                found.append((int(match[1]), path))
        return sorted(found)

    def last(self):
        """Path of the last one, or None."""
        known = [path for _, path in self._all() if path not in self._replaced]
        return known[-1] if known else None

    def save(self, step, write_model, optimizer_arrays, state):
        """Write a checkpoint; every process calls this.

        Args:
            step: steps done.
            write_model: called with a directory in the first process.
            optimizer_arrays: what :meth:`Optimizer.state` gave; None where another process has the same.
            state: what else this process needs to resume, as for JSON.
        """
        rank = self.processes.rank
        unfinished = os.path.join(self.directory, f"{_UNFINISHED}-{step}")
        final = os.path.join(self.directory, f"checkpoint-{step}")
        self.processes.first_then_others(lambda: os.makedirs(unfinished, exist_ok=True))
        if optimizer_arrays is not None and self.processes.tensor.is_first:
            save_file(optimizer_arrays, os.path.join(unfinished, f"optimizer-{rank}.safetensors"))
        if self.processes.is_first:
            write_model(unfinished)
        self.processes.wait()
        states = self.processes.gather(state)
        if self.processes.is_first:
            with open(os.path.join(unfinished, _STATE), "w", encoding="utf-8") as file:
                json.dump({"step": step, "processes": states}, file, indent=1)
            for name in os.listdir(unfinished):
                _flush(os.path.join(unfinished, name))
            shutil.rmtree(final, ignore_errors=True)
            os.rename(unfinished, final)
            _flush(self.directory)
            self._remove_old(final)
        self.processes.wait()

    def best(self):
        """What :meth:`save_best` was told of the best model so far, or None."""
        try:
            with open(os.path.join(self.directory, _BEST, _TOLD), encoding="utf-8") as file:
                return json.load(file)
        except FileNotFoundError:
            return None

    def forget_best(self):
        """Remove the best model of another run; every process calls this."""
        path = os.path.join(self.directory, _BEST)
        if self.processes.is_first and os.path.isdir(path):
            doomed = os.path.join(self.directory, f"{_UNFINISHED}-{_BEST}")
            os.rename(path, doomed)
            shutil.rmtree(doomed)
        self.processes.wait()

    def save_best(self, write_model, told):
        """Write a model to ``best``, in the place of the one before, and what it is; every process calls this.

        Args:
            write_model: called with a directory in the first process.
            told: ``metric``, ``value`` and ``step``.
        """
        if self.processes.is_first:
            unfinished = os.path.join(self.directory, f"{_UNFINISHED}-{_BEST}-{told['step']}")
            shutil.rmtree(unfinished, ignore_errors=True)
            os.makedirs(unfinished)
            write_model(unfinished)
            with open(os.path.join(unfinished, _TOLD), "w", encoding="utf-8") as file:
                json.dump(told, file, indent=1)
            for name in os.listdir(unfinished):
                _flush(os.path.join(unfinished, name))
        self.forget_best()
        if self.processes.is_first:
            os.rename(unfinished, os.path.join(self.directory, _BEST))
            _flush(self.directory)
        self.processes.wait()

    def take_best(self):
        """Copy the best model's files to the output directory, one whole file after the other; in the first process."""
        folder = os.path.join(self.directory, _BEST)
        for name in sorted(os.listdir(folder)):
            if name != _TOLD:
                unfinished = os.path.join(self.directory, f".{name}.tmp")
                shutil.copy(os.path.join(folder, name), unfinished)
                os.replace(unfinished, os.path.join(self.directory, name))

    def _remove_old(self, newest):
        outdated = [path for path in self._replaced if path != newest]
        self._replaced = []
        kept = [path for _, path in self._all() if path not in outdated]
        if self.keep:
            outdated += kept[: -self.keep]
        for path in outdated:
            # Renamed first: what is half removed must not look like a checkpoint.
            doomed = os.path.join(self.directory, f"{_UNFINISHED}-{os.path.basename(path)}")
            os.rename(path, doomed)
            shutil.rmtree(doomed)


def _flush(path):
    """Have a file, or a directory's entries, on the disk before what comes next."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_state(directory):
    """What :meth:`Checkpoints.save` was given as ``state``: ``(step, list of all processes' states)``.

    Raises:
        CheckpointError: it is no checkpoint of a run, or its state is damaged.
    """
    path = os.path.join(directory, _STATE)
    try:
        with open(path, encoding="utf-8") as file:
            values = json.load(file)
        return values["step"], values["processes"]
    except OSError:
        raise CheckpointError(f"{directory} has no {_STATE}: to go on, pass a checkpoint-N directory of a run") from None
    except (ValueError, KeyError):
        raise CheckpointError(f"{path} is damaged: go on from an earlier checkpoint") from None


def read_optimizer(directory, optimizer):
    """Give an optimiser the states in a checkpoint, which may be of another number of processes.

    Raises:
        CheckpointError: a file is missing or damaged. ConfigError: the states are not of the parameters that are trained.
    """
    arrays = {}
    for path in sorted(glob.glob(os.path.join(glob.escape(directory), "optimizer-*.safetensors"))):
        try:
            arrays |= load_file(path)
        except Exception as error:  # safetensors' own class, which is not public
            raise CheckpointError(f"{path} is damaged ({error}): go on from an earlier checkpoint") from None
    try:
        optimizer.load_state(arrays)
    except KeyError as error:
        raise ConfigError(
            f"{directory} has no optimizer state {error}: go on with the same --freeze_*, LoRA and precision as before, "
            "or with --ignore_load_lr_and_optim"
        ) from None
