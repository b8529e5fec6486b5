"""The server's engine without HTTP: a request goes in, its answer comes out."""

import os
import threading
import time

from paddlemix.errors import ConfigError

from .answers import Answer, prepare
from .engine import Engine
from .metrics import Metrics
from .protocol import RequestError, parse_request

__all__ = ["Offline"]


class Offline:
    """Answers requests; from any number of threads.

    Args:
        args: the server's flags.

    Raises:
        ConfigError: the model cannot be loaded.
    """

    def __init__(self, args):
        self.args, self.metrics = args, Metrics(args.served_model_name)
        self._waiting = {}  # (answer, what tells that it is over) of each job
        # Threads that read pictures take Python's lock from the engine: one core is left to it.
        self._preparing = threading.Semaphore(max(1, len(os.sched_getaffinity(0)) - 1))
        self.engine = Engine(args, self.metrics, self._deliver, at_once=True)
        self.engine.thread.start()
        self.engine.loaded.wait()
        if self.engine.failure is not None:
            raise ConfigError(self.engine.failure)
        self.engine.get_ready()

    def answer(self, value):
        """``(status, body)`` as the server would answer the parsed JSON ``value``."""
        try:
            return 200, self._answer(value)
        except RequestError as error:
            return error.status, error.body

    def _answer(self, value):
        arrived = time.monotonic()
        request = parse_request(value)
        name = request.model or self.args.served_model_name
        adapter = name if name in self.engine.adapters else None  # files that name a model of OpenAI's are answered too
        with self._preparing:
            jobs = prepare(request, self.engine, adapter)
        answer = Answer(request, jobs, name, self.engine.tokens, self.metrics, arrived)
        over = threading.Event()
        answer.failure = None
        for job in jobs:
            self._waiting[job] = answer, over
        self.engine.submit(jobs)
        over.wait()
        if answer.failure is not None:
            raise answer.failure
        return answer.whole()

    def _deliver(self, events):
        for job, event in events:
            answer, over = self._waiting.get(job, (None, None))
            if answer is None:
                continue
            try:
                answer.take(job, event)
            except RequestError as error:
                answer.failure = error
                self.engine.cancel(answer.jobs)
            if answer.failure is not None or answer.is_over:
                for other in answer.jobs:
                    self._waiting.pop(other, None)
                over.set()
