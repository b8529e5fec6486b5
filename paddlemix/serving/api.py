"""HTTP: a thin translation between requests and the engine."""

import asyncio
import contextlib
import hmac
import json
import logging
import re
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

import anyio
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from .answers import Answer, prepare
from .embeddings import EmbeddingRequest, written
from .engine import Engine
from .metrics import Metrics
from .protocol import ChatRequest, RequestError, parse_as

_log = logging.getLogger("paddlemix.serving")
_OPEN = ("/health", "/metrics")
_PING_SECONDS = 10
_BODY_SECONDS = 60
_STUCK_SECONDS = 120  # one turn of the engine's loop on the slowest machine takes less
_DRAINED = 16 << 20


def _refuse_constant(name):
    raise ValueError(name)


def _dump(value):
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


class Server:
    """Everything that one process serves.

    Args:
        args: parsed flags.
        key: the API key, or None.
    """

    def __init__(self, args, key=None):
        self.args, self._key = args, key
        self.metrics = Metrics(args.served_model_name)
        self.engine = Engine(args, self.metrics, self._deliver)
        self.created = int(time.time())
        self.draining = False
        self.active = set()  # answers that are being made
        self._waiting = 0  # requests that are accepted and have not begun to run
        self._accepted = []  # how many answers each request that is not over asks for
        self._answers = {}  # of each job
        self._pool = ThreadPoolExecutor(4, thread_name_prefix="media")
        self._loop = None
        self.app = self._make_app()

    # ------------------------------------------------------------------ the engine's side

    def begin(self, loop):
        """Start loading the model."""
        self._loop = loop
        self.engine.thread.start()

    def get_ready(self):
        """Prepare what needs the loaded model."""
        self.engine.get_ready()

    @property
    def models(self):
        """Names that a request can ask for."""
        return [self.args.served_model_name, *self.engine.adapters]

    @property
    def longest(self):
        """The largest context, in tokens."""
        return self.engine.loop.longest if self.engine.loop is not None else None

    async def metrics_text(self):
        """What ``/metrics`` tells."""
        return self.metrics.text()

    def check_health(self):
        """See that the engine's loop turns.

        Raises:
            RequestError: it does not.
        """
        if not self.engine.thread.is_alive():
            raise RequestError("the engine has ended", status=503)
        if time.monotonic() - self.engine.beat > _STUCK_SECONDS:
            raise RequestError("the engine is stuck", status=503)

    def _deliver(self, events):
        with contextlib.suppress(RuntimeError):  # the event loop is gone: nobody listens any more
            self._loop.call_soon_threadsafe(self._hand_out, events)

    def _hand_out(self, events):
        for job, event in events:
            answer = self._answers.get(job)
            if answer is None:
                continue
            if event is None and not answer.begun:
                answer.begun = True
                self._wait(-1)
            answer.queue.put_nowait((job, event))

    def _wait(self, change):
        self._waiting += change
        self.metrics.waiting.set(self._waiting)

    # ------------------------------------------------------------------ one request

    async def _body(self, request):
        limit = int(self.args.max_body_mb * 2**20)
        kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
        if kind != "application/json" and not kind.endswith("+json"):
            raise RequestError("the body must be JSON: send Content-Type: application/json", status=415)
        large = RequestError(f"the body is larger than {self.args.max_body_mb:g} MB", status=413)
        announced = request.headers.get("content-length", "0")
        data, count = bytearray(), 0
        too_large = announced.isdigit() and int(announced) > limit
        most = 2 * limit + _DRAINED  # a client that sends on meets a closed connection, but one that ends soon hears why
        if too_large and int(announced) > most:
            raise large
        try:
            with anyio.fail_after(_BODY_SECONDS):
                async for piece in request.stream():
                    count += len(piece)
                    too_large = too_large or count > limit
                    if count > most:
                        raise large
                    data = bytearray() if too_large else data + piece
        except TimeoutError:
            raise large if too_large else RequestError("the body did not arrive in time", status=408) from None
        if too_large:
            raise large
        try:
            return json.loads(data, parse_constant=_refuse_constant)
        except (ValueError, RecursionError):
            raise RequestError("the body is not valid JSON (NaN and Infinity are none)") from None

    async def chat(self, http):
        """``POST /v1/chat/completions``."""
        arrived = time.monotonic()
        request, name = await self._request(http, ChatRequest)
        if self.engine.embeds:
            raise RequestError("this model answers no questions, it makes embeddings: use /v1/embeddings")
        choices = request.n or 1
        if self._is_full(choices):
            raise RequestError("the server is full: try again later", status=429, headers={"Retry-After": "1"})
        self._wait(1)
        self._accepted.append(choices)
        answer = None
        try:
            adapter = name if name in self.engine.adapters else None
            jobs = await asyncio.get_running_loop().run_in_executor(self._pool, prepare, request, self.engine, adapter)
            answer = Answer(request, jobs, name, self.engine.tokens, self.metrics, arrived)
            answer.begun = False
            self.active.add(answer)
            self._answers.update(dict.fromkeys(jobs, answer))
            self.engine.submit(jobs)
        finally:
            if answer is None:
                self._wait(-1)
                self._accepted.remove(choices)
        if request.stream:
            headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
            return StreamingResponse(self._stream(answer), media_type="text/event-stream", headers=headers)
        return await self._whole(answer, http)

    async def _request(self, http, kind):
        """(a request of the pydantic model ``kind``, the name of its model) of what came in."""
        self._check_ready()
        request = parse_as(kind, await self._body(http))
        name = request.model or self.args.served_model_name
        if name not in self.models:
            raise RequestError(
                f"the model '{name[:100]}' does not exist here", status=404, param="model", code="model_not_found"
            )
        self._check_ready()
        return request, name

    def _is_full(self, choices):
        """Whether a request of so many answers would have to wait, and as many wait as may."""
        room, running = self.args.max_num_seqs, 0
        for taken in [*self._accepted, choices]:
            if taken > room and running:  # a request of more answers than there are places runs in turns
                break
            room, running = room - taken, running + 1
        return len(self._accepted) + 1 - running > self.args.max_queue

    async def embeddings(self, http):
        """``POST /v1/embeddings``."""
        arrived = time.monotonic()
        request, name = await self._request(http, EmbeddingRequest)
        if not self.engine.embeds:
            raise RequestError("this model makes no embeddings, it answers questions: use /v1/chat/completions")
        family = self.engine.family
        if request.dimensions not in (None, family.width):
            raise RequestError(f"dimensions can only be {family.width}, what the model has", param="dimensions")
        items = request.items()
        if self._waiting >= self.args.max_queue + self.args.max_num_seqs:
            raise RequestError("the server is full: try again later", status=429, headers={"Retry-After": "1"})

        def read():
            texts = [value for kind, value in items if kind == "text"]
            inputs = [self.engine.media.picture(value)[1] if kind == "image_url" else value for kind, value in items]
            return inputs, sum(map(family.count, texts))

        self._wait(1)
        try:
            with anyio.fail_after(self.args.request_timeout):
                inputs, tokens = await asyncio.get_running_loop().run_in_executor(self._pool, read)
                vectors = await asyncio.gather(*map(asyncio.wrap_future, family.submit(inputs)))
        except TimeoutError:
            raise RequestError("the answer took too long", status=504, code="timeout") from None
        finally:
            self._wait(-1)
        self.metrics.prompt_tokens.inc(tokens)
        self.metrics.finished("stop")
        self.metrics.latency.observe(time.monotonic() - arrived)
        return Response(_dump(written(request, vectors, name, tokens)), media_type="application/json")

    def _check_ready(self):
        if self.draining or not self.engine.ready.is_set():
            text = "the server is ending" if self.draining else "the server is not ready yet"
            raise RequestError(text, status=503, headers={"Retry-After": "1"})

    def _forget(self, answer):
        """The answer is over, one way or another."""
        if not answer.is_over:
            answer.count("abort")
            self.engine.cancel(answer.jobs)
        for job in answer.jobs:
            self._answers.pop(job, None)
        if not answer.begun:
            answer.begun = True
            self._wait(-1)
        if answer in self.active:
            self.active.discard(answer)
            self._accepted.remove(len(answer.jobs))

    def _left(self, answer):
        timeout = self.args.request_timeout
        return None if timeout is None else max(0.001, answer.arrived + timeout - time.monotonic())

    def cut(self):
        """End all answers that are still being made."""
        for answer in list(self.active):
            answer.queue.put_nowait((None, None))

    async def _next(self, answer, wait):
        with anyio.fail_after(wait):  # not asyncio's, whose TimeoutError is another before Python 3.11
            job, event = await answer.queue.get()
        if job is None:
            raise RequestError("the server is ending", status=503)
        return answer.take(job, event)

    async def _whole(self, answer, http):
        gone = asyncio.create_task(_disconnected(http))
        try:
            while not answer.is_over:
                getting = asyncio.create_task(self._next(answer, self._left(answer)))
                try:
                    await asyncio.wait({getting, gone}, return_when=asyncio.FIRST_COMPLETED)
                    if gone.done() and not getting.done():
                        return Response(status_code=499)
                    await getting
                finally:
                    getting.cancel()
            answer.count()
            return Response(_dump(answer.whole()), media_type="application/json")
        except TimeoutError:
            raise RequestError("the answer took too long", status=504, code="timeout") from None
        finally:
            gone.cancel()
            self._forget(answer)

    async def _stream(self, answer):
        def event(value):
            return f"data: {_dump(value)}\n\n".encode()

        try:
            for index in range(len(answer.jobs)):
                yield event(answer.chunk(index, {"role": "assistant", "content": ""}))
            pinging = True
            while not answer.is_over:
                left = self._left(answer)
                wait = min(_PING_SECONDS, left or _PING_SECONDS) if pinging else left
                try:
                    found = await self._next(answer, wait)
                except TimeoutError:
                    if left is not None and answer.arrived + self.args.request_timeout <= time.monotonic():
                        raise RequestError("the answer took too long", status=504, code="timeout") from None
                    yield b": ping\n\n"
                    continue
                if found is None:
                    continue
                pinging = False
                index, delta, logprobs, reason = found
                if delta:
                    yield event(answer.chunk(index, delta, logprobs))
                if reason:
                    yield event(answer.chunk(index, {}, reason=reason))
            answer.count()
            options = answer.request.stream_options
            if options is not None and options.include_usage:
                yield event(answer.last_chunk())
            yield b"data: [DONE]\n\n"
        except RequestError as error:
            yield event(error.body)
        finally:
            self._forget(answer)

    # ------------------------------------------------------------------ the application

    def _make_app(self):
        app = FastAPI(title="PaddleMIX InternVL", openapi_url="/openapi.json", redirect_slashes=False)
        schema = {"requestBody": {"content": {"application/json": {"schema": _inlined(ChatRequest.model_json_schema())}}}}

        @app.post("/v1/chat/completions", openapi_extra=schema)
        async def chat(request: Request):
            return await self.chat(request)

        schema = {"requestBody": {"content": {"application/json": {"schema": _inlined(EmbeddingRequest.model_json_schema())}}}}

        @app.post("/v1/embeddings", openapi_extra=schema)
        async def embeddings(request: Request):
            return await self.embeddings(request)

        @app.get("/v1/models")
        async def models():
            return {"object": "list", "data": [self._model(name) for name in self.models]}

        @app.get("/v1/models/{name:path}")
        async def model(name: str):
            if name not in self.models:
                raise RequestError(f"the model '{name[:100]}' does not exist here", status=404, code="model_not_found")
            return self._model(name)

        @app.get("/health")
        async def health():
            self._check_ready()
            self.check_health()
            return {"status": "ok"}

        @app.get("/metrics")
        async def metrics():
            return Response(await self.metrics_text(), media_type="text/plain; version=0.0.4; charset=utf-8")

        @app.exception_handler(RequestError)
        async def refused(request, error):
            _log.info("%s %s: %d", request.method, request.url.path[:100], error.status)
            return JSONResponse(error.body, error.status, headers=error.headers)

        @app.exception_handler(HTTPException)
        async def http_error(request, error):
            texts = {404: "there is nothing at this path", 405: "this path does not take that method"}
            headers = dict(error.headers or {})
            refusal = RequestError(texts.get(error.status_code, "the request is not valid"), status=error.status_code)
            return JSONResponse(refusal.body, error.status_code, headers=headers)

        app.add_middleware(_Outside, server=self)
        return app

    def _model(self, name):
        root = self.args.served_model_name
        return {"id": name, "object": "model", "created": self.created, "owned_by": "paddlemix", "root": root,
                "max_model_len": self.longest if self.engine.ready.is_set() else None}  # fmt: skip

    def permits(self, header):
        """Whether an Authorization header has the key."""
        if self._key is None:
            return True
        given = header.removeprefix(b"Bearer ") if header.startswith(b"Bearer ") else b""
        return hmac.compare_digest(given, self._key.encode())


def _inlined(schema):
    """A JSON schema without definitions of its own, which OpenAPI keeps elsewhere."""
    parts = schema.pop("$defs", {})

    def walk(value):
        if isinstance(value, dict):
            if "$ref" in value:
                return walk(parts[value["$ref"].rpartition("/")[2]])
            return {key: walk(item) for key, item in value.items()}
        return [walk(item) for item in value] if isinstance(value, list) else value

    return walk(schema)


async def _disconnected(http):
    while (await http.receive())["type"] != "http.disconnect":
        pass


class _Outside:
    """What holds for every request: its id, the key, origins, and that nothing of the inside gets out."""

    def __init__(self, app, server):
        self.app, self.server = app, server

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = dict(scope["headers"])
        wished = headers.get(b"x-request-id", b"")
        name = wished if re.fullmatch(rb"[\x21-\x7e]{1,200}", wished) else uuid.uuid4().hex.encode()
        origin = headers.get(b"origin", b"").decode("latin-1")
        allowed = origin if origin and origin in self.server.args.allowed_origins else None
        started = False

        async def sending(message):
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                more = [(b"x-request-id", name)]
                if allowed:
                    more += [(b"access-control-allow-origin", allowed.encode()), (b"vary", b"Origin")]
                message = {**message, "headers": [*message["headers"], *more]}
            await send(message)

        preflight = scope["method"] == "OPTIONS" and origin and b"access-control-request-method" in headers
        if preflight:
            more = {"Access-Control-Allow-Methods": "GET, POST", "Access-Control-Allow-Headers": "authorization, content-type"}
            response = Response(status_code=200 if allowed else 400, headers=more if allowed else None)
            return await response(scope, receive, sending)
        if scope["path"] not in _OPEN and not self.server.permits(headers.get(b"authorization", b"")):
            error = RequestError("the API key is missing or wrong", status=401, code="invalid_api_key")
            response = JSONResponse(error.body, 401, headers={"WWW-Authenticate": "Bearer"})
            return await response(scope, receive, sending)
        try:
            await self.app(scope, receive, sending)
        except Exception as error:  # a fault here, or a client that went away
            if not started:
                _log.error("%s %s failed (%s)", scope["method"], scope["path"][:100], type(error).__name__)
                failure = RequestError("the server failed on this request", status=500)
                with contextlib.suppress(Exception):
                    await JSONResponse(failure.body, 500)(scope, receive, sending)
