"""One replica: the server of one accelerator in a process of Ray Serve's, whose requests come as ASGI scopes."""

import asyncio
import os

__all__ = ["Replica", "merged"]


class Replica:
    """A :class:`~paddlemix.serving.api.Server` without a socket.

    Args:
        args: the server's flags.
    """

    async def __init__(self, args):
        from paddlemix.serving.api import Server

        if args.threads == 0 and args.replica_threads:
            args.threads = args.replica_threads
        self.server = Server(args)
        self.server.begin(asyncio.get_running_loop())
        while not self.server.engine.loaded.is_set():
            await asyncio.sleep(0.02)
        if self.server.engine.failure is not None:
            raise RuntimeError(f"[replica] {self.server.engine.failure} [end]")
        self.server.get_ready()

    def check_health(self):
        """Ray Serve calls it now and then, and puts another replica in the place of one that raises."""
        self.server.check_health()

    def describe(self):
        """(largest context, names of adapters, what the server prints at its start)."""
        engine = self.server.engine
        return self.server.longest, list(engine.adapters), engine.summary

    def metrics(self):
        """(whose they are, what ``/metrics`` of this replica tells)."""
        return str(os.getpid()), self.server.metrics.text().decode()

    async def respond(self, scope, body):
        """ASGI messages that answer a request.

        Args:
            scope: of ASGI.
            body: the request's, bytes.
        """
        messages, gone, pieces = asyncio.Queue(), asyncio.Event(), [body]

        async def receive():
            if pieces:
                return {"type": "http.request", "body": pieces.pop(), "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        task = asyncio.create_task(self.server.app(scope, receive, messages.put))
        task.add_done_callback(lambda _: messages.put_nowait(None))
        try:
            while (message := await messages.get()) is not None:
                yield message
        finally:
            gone.set()  # who asked has gone: the request leaves the engine


def merged(texts):
    """One text in the format of Prometheus from those of several replicas: sums, and of shares the mean.

    Args:
        texts: ``(text, alive)`` of each replica; of one that has died counters count on, and what it did at last does not.
    """
    from prometheus_client import CollectorRegistry, generate_latest
    from prometheus_client.core import Metric
    from prometheus_client.parser import text_string_to_metric_families

    families, alive = {}, max(1, sum(living for _, living in texts))
    for text, living in texts:
        for family in text_string_to_metric_families(text):
            if family.type == "gauge" and not living:
                continue
            _, samples = families.setdefault(family.name, (family, {}))
            for sample in family.samples:
                key = (sample.name, tuple(sorted(sample.labels.items())))
                if sample.name.endswith("_created"):
                    samples[key] = min(samples.get(key, sample.value), sample.value)
                else:
                    share = alive if family.name.endswith("_perc") else 1
                    samples[key] = samples.get(key, 0) + sample.value / share

    class All:
        def collect(self):
            for name, (family, samples) in families.items():
                metric = Metric(name, family.documentation, family.type)
                for (sample, labels), value in samples.items():
                    metric.add_sample(sample, dict(labels), value)
                yield metric

    registry = CollectorRegistry(auto_describe=False)
    registry.register(All())
    return generate_latest(registry)
