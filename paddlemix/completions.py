"""Asking a server with OpenAI's interface for a completion: a judge, or a model that runs elsewhere."""

import json
import os
import time
import urllib.error
import urllib.request

from paddlemix.errors import ConfigError, DataError

__all__ = ["complete"]

_TRIES = 5


def complete(url, model, messages, max_tokens=1024, pause=1.0):
    """The text that an OpenAI-compatible server answers; the key is ``OPENAI_API_KEY`` of the environment, if set.

    Raises:
        DataError: the server refuses, or does not answer after several tries with growing pauses.
    """
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"'{url}' is no address: it must begin with http:// or https://")
    address = url.rstrip("/")
    address = address if address.endswith("/chat/completions") else f"{address.removesuffix('/v1')}/v1/chat/completions"
    body = json.dumps({"model": model, "messages": messages, "max_tokens": max_tokens, "temperature": 0}).encode()
    headers = {"Content-Type": "application/json"}
    if os.environ.get("OPENAI_API_KEY"):
        headers["Authorization"] = f"Bearer {os.environ['OPENAI_API_KEY']}"
    problem = None
    for attempt in range(_TRIES):
        if attempt:
            time.sleep(pause * 2 ** (attempt - 1))
        try:
            request = urllib.request.Request(address, body, headers)
            with urllib.request.urlopen(request, timeout=600) as answer:
                return str(json.loads(answer.read(64 << 20))["choices"][0]["message"]["content"] or "")
        except urllib.error.HTTPError as error:
            problem = f"it says {error.code} {error.reason}"
            if error.code < 500 and error.code not in (408, 429):
                break
        except (OSError, ValueError, LookupError, TypeError) as error:
            problem = str(error)
    raise DataError(f"{address} gave no answer ({problem}): check the address, the model's name and OPENAI_API_KEY")
