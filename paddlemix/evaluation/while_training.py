"""Benchmarks as scores of a model in training. The trainer is handed a :class:`TaskScorer` and knows nothing of benchmarks."""

import dataclasses
import os
from pathlib import Path

from paddlemix.errors import ConfigError, TrainingError

from .answers import lines_of
from .features import written
from .local import LocalModel
from .runner import ask, batches, conclude, prepare
from .tasks import select


class TaskScorer:
    """Asks a model some questions of benchmarks and scores its answers.

    Args:
        tasks: names, as on the command line of ``paddlemix evaluate``.
        folder: for answers and scores, ``STEP/TASK`` below it.
        settings: a :class:`~.runner.Settings`; its model is not used.

    Attributes:
        names: of the tasks, which are the keys of the scores.

    Raises:
        ConfigError: a task is not known, or is scored by its server or a judge. DataError: its data is missing.
    """

    def __init__(self, tasks, folder, settings):
        self.tasks, self.folder, self.settings = select(tasks), Path(folder), settings
        for task in self.tasks:
            if task.scorer is None or task.prediction_key == "review":
                who = "its server" if task.scorer is None else "a judge"
                raise ConfigError(f"--eval_tasks: {task.name} is scored by {who}, which training cannot ask: leave it out")
        self.names = [task.name for task in self.tasks]
        self._questions = {task.name: prepare(task, settings) for task in self.tasks}

    def __call__(self, model, tokenizer, processes, together, step):
        """``{task: score}``, the same in all processes.

        Args:
            model: in the state of evaluation.
            tokenizer: its tokenizer.
            processes: who they are and what they tell each other, as :class:`~paddlemix.training.processes.Processes`.
            together: whether all processes must run the model in step, since its weights are divided: then each asks all
                questions, otherwise its share.
            step: steps done.

        Raises:
            TrainingError: no question of a task could be asked.
        """
        return {task.name: self._score(task, model, tokenizer, processes, together, step) for task in self.tasks}

    def _score(self, task, model, tokenizer, processes, together, step):
        found = self._questions[task.name]
        local = LocalModel(model, tokenizer, self.settings)
        # Memory may differ between processes, and what runs at once must not.
        size, memory = map(min, zip(*processes.gather((local.batch_size(task), local.memory()))))
        local = LocalModel(model, tokenizer, dataclasses.replace(self.settings, batch_size=size), memory)
        others = set() if together else set(range(len(found))) - set(range(processes.rank, len(found), processes.world))
        rows = []
        ask(local, task, batches(found, others, size), rows.extend)
        if not together:
            processes.wait()  # by the store: collectives give up on who waits for long
            rows = sum(processes.gather(rows), [])
        rows.sort(key=lambda row: row["index"])
        failed = [row for row in rows if "error" in row]
        if len(failed) == len(rows):
            raise TrainingError(f"--eval_tasks: no question of {task.name} could be asked: {failed[0]['error']}")
        value = None
        if processes.is_first:
            directory = self.folder / str(step) / task.name
            os.makedirs(directory, exist_ok=True)
            with written(str(directory / "answers.jsonl")) as file:
                file.write(lines_of(rows).encode("utf-8"))
            value = conclude(task, rows, directory)["score"][task.metric]
        return processes.gather(value)[0]
