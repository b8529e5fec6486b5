"""Several processes, on this machine or on those of a Ray cluster, that share the questions of a task by pulling."""

import dataclasses
import threading

from paddlemix import crew

from .runner import ask

_BATCHES = 2  # that a worker holds: it has the next when it has answered one


class Worker:
    """A model that answers lists of (index, question).

    Args:
        task: the benchmark.
        settings: a :class:`~.runner.Settings`.
    """

    def __init__(self, task, settings):
        from paddlemix.kernels import cpu as kernels

        from .local import load_model

        kernels.set_num_threads(max(1, kernels.num_threads() // settings.processes))
        self.task, self.model, self._lock = task, load_model(settings, crew.number()), threading.Lock()

    def answer(self, batch):
        """The rows of the answers to a batch; one batch at a time, whatever thread calls."""
        rows = []
        with self._lock:
            ask(self.model, self.task, [batch], rows.extend)
        return rows


def ask_with_workers(task, settings, work, write):
    """Hand out the lists of ``work`` to processes that ask for them; ``write`` gets rows as they come."""
    task = dataclasses.replace(task, scorer=None, submission=None)  # of no use there, and some cannot be sent
    items = ((number, batch) for number, batch in enumerate(work))
    workers = None if settings.ray and settings.processes == 1 else settings.processes  # None: one a machine
    for _, rows in crew.answers(Worker, (task, settings), items, _BATCHES, workers, settings.ray):
        write(rows)
