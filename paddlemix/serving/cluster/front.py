"""What listens: it passes requests to replicas, and asks another where one died on the way.

An answer is decided by its request and a seed, whoever computes it. So a request without a seed is given one here, and when its
replica dies another makes the same answer: what the client has of a stream by then is left out.
"""

import asyncio
import contextlib
import json
import os
import re
import secrets
import threading

import anyio
from fastapi.responses import Response, StreamingResponse

from ..api import Server, _disconnected, _dump
from ..protocol import RequestError
from .replica import Replica, merged

__all__ = ["Cluster", "Front"]

_ATTEMPTS = 4
_NAMES = re.compile(rb'"id":"(chatcmpl-\w+)","created":(\d+)')
_APP = "paddlemix"


class Cluster:
    """Ray and the replicas; to a :class:`Front` what an engine is to a server.

    Args:
        args: parsed flags.

    Attributes:
        loaded, ready, failure, summary, adapters: as of :class:`~paddlemix.serving.engine.Engine`.
        handle: asks the replicas.
        longest: the largest context, in tokens.
    """

    def __init__(self, args):
        self.args = args
        self.ready, self.loaded, self.failure, self.adapters = threading.Event(), threading.Event(), None, []
        self.handle = self.longest = self.summary = None
        self._ending = threading.Event()
        self.thread = threading.Thread(target=self._begin, name="cluster", daemon=True)

    def _begin(self):
        try:
            self._deploy()
            self.ready.set()
        except Exception as error:  # whatever it is, the command has to end in a sentence
            told = re.search(r"\[replica\] (.*?) \[end\]", str(error), re.DOTALL)
            text = told[1] if told else f"the replicas could not be started ({type(error).__name__}: {str(error)[:300]})"
            self.failure = " ".join(text.split())
        self.loaded.set()
        self._ending.wait()  # Linux ends Ray's processes with the thread that started them

    def _deploy(self):
        args = self.args
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is told to anybody
        os.environ.setdefault("RAY_SERVE_LOG_TO_STDERR", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        import ray
        from ray import serve

        cores, most = os.cpu_count() or 1, max(args.replicas, args.max_replicas or 0)
        quiet = {"log_to_driver": False, "logging_level": "error", "configure_logging": True}
        if args.address:
            ray.init(args.address, **quiet)
        else:
            ray.init(num_cpus=max(cores, most) + 1, include_dashboard=False, object_store_memory=256 << 20,
                     _node_ip_address="127.0.0.1", **quiet)  # fmt: skip
        args.replica_threads = 0 if args.address else max(1, len(os.sched_getaffinity(0)) // args.replicas)
        scaling = {"num_replicas": args.replicas}
        if args.max_replicas:
            scaling = {"autoscaling_config": {
                "min_replicas": args.replicas, "max_replicas": most, "target_ongoing_requests": args.target_ongoing_requests,
            }}  # fmt: skip
        replica = serve.deployment(Replica).options(
            name="Replica",
            ray_actor_options=self._resources(ray.cluster_resources()),
            max_ongoing_requests=args.max_num_seqs + args.max_queue + 16,
            health_check_period_s=2,
            health_check_timeout_s=30,
            graceful_shutdown_timeout_s=args.shutdown_timeout,
            max_constructor_retry_count=1,
            **scaling,
        )
        serve.start(proxy_location="Disabled", logging_config={"log_level": "ERROR"})
        self.handle = serve.run(replica.bind(args), name=_APP, route_prefix=None)
        self.longest, self.adapters, summary = self.handle.describe.remote().result()
        self.summary = f"{args.replicas} replica(s), each:\n{summary}"

    def _resources(self, found):
        """What a replica takes: one accelerator, or a core where there is none."""
        wished = self.args.device.partition(":")[0].upper()
        kinds = [wished] if wished != "AUTO" else [kind for kind in ("GPU", "NPU") if found.get(kind)]
        if kinds and kinds[0] == "GPU":
            return {"num_cpus": 1, "num_gpus": 1}
        return {"num_cpus": 1, **({"resources": {kinds[0]: 1}} if kinds and kinds[0] != "CPU" else {})}

    def stop(self):
        """End the replicas and, where it is ours, Ray."""
        import ray
        from ray import serve

        if not ray.is_initialized():
            return
        if self.args.address:
            serve.delete(_APP)
        else:
            serve.shutdown()
        ray.shutdown()
        self._ending.set()


class Front(Server):
    """A server whose answers come from replicas."""

    def __init__(self, args, key=None):
        super().__init__(args, key)
        self.engine = Cluster(args)
        self._told = {}  # of each replica, what it measured

    def get_ready(self):
        """Nothing is left to prepare."""

    @property
    def longest(self):
        """The largest context, in tokens."""
        return self.engine.longest

    def check_health(self):
        """Ray Serve looks after replicas."""

    async def metrics_text(self):
        """The metrics of all replicas as one."""
        from ray.exceptions import RayError
        from ray.serve.exceptions import RayServeException

        told = {}
        with contextlib.suppress(RayError, RayServeException, TimeoutError):  # one has just died
            answers = self.engine.handle.broadcast("metrics").results_async(return_exceptions=True)
            with anyio.fail_after(5):
                told = dict(a for a in await answers if not isinstance(a, Exception))
        self._told |= told
        alive = set(told) or set(self._told)
        return merged([(text, name in alive) for name, text in self._told.items()])

    def cut(self):
        """End all answers that are still being made."""
        for relay in list(self.active):
            relay.ending.set()

    async def chat(self, http):
        """``POST /v1/chat/completions``."""
        self._check_ready()
        value = await self._body(http)
        self._check_ready()
        if isinstance(value, dict) and value.get("seed") is None and value.get("temperature") != 0:
            value["seed"] = secrets.randbits(63)
        body = await asyncio.to_thread(lambda: json.dumps(value).encode())
        once = isinstance(value, dict) and value.get("n") in (None, 1)
        relay = Relay(self.engine.handle, _scope(http.scope, len(body)), body, once)
        self.active.add(relay)
        messages, gone = relay.messages(), asyncio.create_task(_disconnected(http))
        streams = False
        try:
            start = await relay.unless(anext(messages), gone)
            if start is None:
                return Response(status_code=499)
            headers = {k.decode(): v.decode() for k, v in start["headers"] if k not in (b"x-request-id", b"content-length")}
            streams = headers.get("content-type", "").startswith("text/event-stream")
            if streams:
                return StreamingResponse(self._pieces(relay, messages), start["status"], headers)
            whole = bytearray()
            while (message := await relay.unless(anext(messages, {}), gone)) != {}:
                if message is None:
                    return Response(status_code=499)
                whole += message["body"]
            return Response(bytes(whole), start["status"], headers)
        finally:
            gone.cancel()
            if not streams:
                self.active.discard(relay)
                await messages.aclose()

    async def embeddings(self, http):
        """``POST /v1/embeddings``; replicas refuse what is not theirs."""
        return await self.chat(http)

    async def _pieces(self, relay, messages):
        try:
            while (message := await relay.unless(anext(messages, {}))) != {}:
                yield message["body"]
        except RequestError as error:
            yield f"data: {_dump(error.body)}\n\n".encode()
        finally:
            self.active.discard(relay)
            await messages.aclose()


def _scope(scope, length):
    """What of an ASGI scope a replica needs: plain data, and no key."""
    kept = ("type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path")
    headers = [(b"content-type", b"application/json"), (b"content-length", str(length).encode())]
    headers += [(name, value) for name, value in scope["headers"] if name == b"x-request-id"]
    return {**{name: scope[name] for name in kept if name in scope}, "headers": headers}


class Relay:
    """One request on its way to a replica, or to several in turn.

    Args:
        handle: asks the replicas.
        scope, body: the request.
        replayable: whether the pieces of its answer come in the same order every time.
    """

    def __init__(self, handle, scope, body, replayable):
        self._handle, self._scope, self._body, self._replayable = handle, scope, body, replayable
        self.ending = asyncio.Event()
        self._names = None  # id and time that the first events had
        self._sent, self._started = 0, False

    async def unless(self, coming, gone=None):
        """What ``coming`` gives; None when the client has gone before.

        Raises:
            RequestError: the server is ending.
        """
        coming, ending = asyncio.ensure_future(coming), asyncio.create_task(self.ending.wait())
        try:
            await asyncio.wait({coming, ending, *([gone] if gone else ())}, return_when=asyncio.FIRST_COMPLETED)
            if coming.done():
                return coming.result()
            if ending.done():
                raise RequestError("the server is ending", status=503)
            return None
        finally:
            ending.cancel()
            if not coming.done():
                coming.cancel()
                await asyncio.wait({coming})

    async def messages(self):
        """ASGI messages of the answer, each once, whichever replica they come from.

        Raises:
            RequestError: replicas died again and again.
        """
        from ray.exceptions import RayActorError, RayTaskError, WorkerCrashedError
        from ray.serve.exceptions import ReplicaUnavailableError

        for attempt in range(_ATTEMPTS):
            answers = self._handle.options(stream=True).respond.remote(self._scope, self._body)
            over = False
            try:
                skip = self._sent
                async for message in answers:
                    if message["type"] == "http.response.start":
                        if self._started and message["status"] != 200 and skip:
                            raise RequestError("the server lost this answer: ask again", status=500)
                        if not self._started:
                            self._started = True
                            yield message
                        continue
                    if message["body"].startswith(b": "):  # a ping, of which there may be another number
                        yield message
                    elif skip:
                        skip -= 1
                    else:
                        self._sent += 1
                        yield {**message, "body": self._renamed(message["body"])}
                over = True
                return
            except (RayActorError, WorkerCrashedError, ReplicaUnavailableError) as error:
                over = True
                if isinstance(error, RayTaskError) or (self._sent and not self._replayable):
                    break
                await asyncio.sleep(0.2 * attempt)
            finally:
                if not over:
                    answers.cancel()
        raise RequestError("the server lost this answer: ask again", status=500)

    def _renamed(self, body):
        """An event under the id and time of the stream that it goes on with."""
        found = _NAMES.search(body)
        if found is None:
            return body
        if self._names is None:
            self._names = found.groups()
        (name, made), (first, then) = found.groups(), self._names
        if name == first:
            return body
        return body.replace(b'"id":"%s","created":%s' % (name, made), b'"id":"%s","created":%s' % (first, then), 1)
