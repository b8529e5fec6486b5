"""Vectors of texts and pictures (``/v1/embeddings``), for models of InternVL-C and InternVL-G that make them."""

import base64
import threading
from collections import deque
from concurrent.futures import Future
from typing import Any, Literal

import numpy as np
from pydantic import Field

from .protocol import Message, Part, RequestError, Strict

__all__ = ["EmbeddingRequest", "Embeddings", "makes_embeddings", "written"]

_MOST = 2048  # inputs of a request, as OpenAI's


class EmbeddingRequest(Strict):
    """A request: ``input`` as OpenAI's, where a picture's data URL stands for the picture, or ``messages`` as vLLM's."""

    model: str | None = None
    input: Any = None
    messages: list[Message] | None = Field(None, min_length=1)
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(None, ge=1)

    def items(self):
        """``[(kind, text or url), ...]``, the kind being ``text`` or ``image_url``.

        Raises:
            RequestError: it has none, or what nobody can embed.
        """
        if (self.input is None) == (self.messages is None):
            raise RequestError("give 'input', or 'messages' with one text or picture each", param="input")
        given = self.input if self.messages is None else [message.content for message in self.messages]
        given = given if isinstance(given, list) else [given]
        if not 0 < len(given) <= _MOST:
            raise RequestError(f"a request has 1 to {_MOST} inputs, not {len(given)}", param="input")
        return [self._item(value[0] if isinstance(value, list) and len(value) == 1 else value) for value in given]

    @staticmethod
    def _item(value):
        if isinstance(value, Part):
            value = value.model_dump(exclude_none=True)
        if isinstance(value, str):
            return ("image_url" if value[:11].lower() == "data:image/" else "text"), value
        if isinstance(value, dict):
            url = value.get("image_url", value.get("image"))
            url = url.get("url") if isinstance(url, dict) else url
            if isinstance(url, str) and "text" not in value:
                return "image_url", url
            if isinstance(value.get("text"), str) and url is None:
                return "text", value["text"]
        raise RequestError("an input must be a text, or a picture as image_url", param="input")


def makes_embeddings(values):
    """Whether a ``config.json`` is of a model that makes vectors."""
    # transformers calls chat models the same, and these have a text_config
    return values.get("model_type") == "internvl" and not isinstance(values.get("text_config"), dict)


class Embeddings:
    """The queue of one model's inputs; also how its pictures are read, as a family of chat models tells it.

    Args:
        directory: of the checkpoint.
        args: the server's flags.
    """

    most_tiles = 1

    def __init__(self, directory, args):
        from paddlemix.models.internvl.embedder import Embedder

        self.embedder = Embedder(directory, args.dtype, args.engine, args.embedding_mode)
        self._waiting, self._wake = deque(), threading.Condition()

    @property
    def width(self):
        """Numbers of a vector."""
        return self.embedder.width

    def read(self, data, most, low):
        """Pixels of a picture."""
        return self.embedder.read(data), None

    def read_clip(self, path):
        """This model has no clips."""
        raise RequestError("this model takes no clips", param="input")

    def count(self, text):
        """Tokens of a text that are used."""
        return int((self.embedder.tokenizer([text]) > 0).sum())

    def submit(self, items):
        """A :class:`~concurrent.futures.Future` for the vector of each item, a text or pixels."""
        futures = [Future() for _ in items]
        with self._wake:
            self._waiting.extend(zip(items, futures))
            self._wake.notify()
        return futures

    def serve(self, beat, is_over):
        """Compute what waits, some at a time, until ``is_over()``; ``beat()`` is called at each turn."""
        while not is_over():
            beat()
            with self._wake:
                if not self._waiting:
                    self._wake.wait(1)
                batch = self._next_batch()
            if not batch:
                continue
            items, futures = zip(*batch)
            try:
                embedder = self.embedder
                vectors = embedder.texts(items) if isinstance(items[0], str) else embedder.encode(np.stack(items))
                for future, vector in zip(futures, vectors):
                    future.set_result(vector)
            except Exception as error:  # one turn's fault must not end the server
                for future in futures:
                    future.set_exception(error)

    def _next_batch(self):
        batch = []
        while self._waiting and len(batch) < self.embedder.batch_size:
            if batch and isinstance(self._waiting[0][0], str) != isinstance(batch[0][0], str):
                break
            item, future = self._waiting.popleft()
            if future.set_running_or_notify_cancel():
                batch.append((item, future))
        return batch


def written(request, vectors, name, tokens):
    """OpenAI's object for the vectors of a request."""

    def numbers(vector):
        if request.encoding_format != "base64":
            return vector.tolist()
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()

    data = [{"object": "embedding", "index": i, "embedding": numbers(vector)} for i, vector in enumerate(vectors)]
    return {"object": "list", "data": data, "model": name, "usage": {"prompt_tokens": tokens, "total_tokens": tokens}}
