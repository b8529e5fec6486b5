"""What ``/metrics`` tells, under vLLM's names."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_BUCKETS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """The server's counters, each with the label ``model_name``."""

    def __init__(self, model_name):
        self.registry, self._name = CollectorRegistry(), model_name
        self.running = self._make(Gauge, "num_requests_running", "answers being made")
        self.waiting = self._make(Gauge, "num_requests_waiting", "requests that wait for their turn")
        self.cache_usage = self._make(Gauge, "kv_cache_usage_perc", "share of the cache's pages in use, 0 to 1")
        self.prompt_tokens = self._make(Counter, "prompt_tokens", "tokens of prompts")
        self.generation_tokens = self._make(Counter, "generation_tokens", "tokens of answers")
        self.prefix_queries = self._make(Counter, "prefix_cache_queries", "tokens of prompts looked up")
        self.prefix_hits = self._make(Counter, "prefix_cache_hits", "of these, tokens that were there")
        self.image_queries = self._make(Counter, "image_cache_queries", "pictures of requests")
        self.image_hits = self._make(Counter, "image_cache_hits", "of these, pictures that were there")
        self.first_token = self._make(Histogram, "time_to_first_token_seconds", "from arrival to the first token")
        self.inter_token = self._make(Histogram, "inter_token_latency_seconds", "between tokens of an answer")
        self.latency = self._make(Histogram, "e2e_request_latency_seconds", "from arrival to the end")
        self.queue_time = self._make(Histogram, "request_queue_time_seconds", "from arrival to the first work")
        self._success = Counter(
            "paddlemix:request_success", "requests by their end", ["model_name", "finished_reason"], registry=self.registry
        )
        for reason in ("stop", "length", "abort"):
            self._success.labels(model_name, reason)

    def _make(self, kind, name, text):
        more = {"buckets": _BUCKETS} if kind is Histogram else {}
        return kind(f"paddlemix:{name}", text, ["model_name"], registry=self.registry, **more).labels(self._name)

    def finished(self, reason):
        """Count the end of a request: ``stop``, ``length`` or ``abort``."""
        self._success.labels(self._name, reason).inc()

    def text(self):
        """Everything in the text format of Prometheus."""
        return generate_latest(self.registry)
