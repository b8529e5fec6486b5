"""Connections of clients that mean no good: heads that never end, or that come a byte a minute, hold up nobody."""

import contextlib
import json

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from .protocol import RequestError

__all__ = ["Connection", "allow_many_files"]

_HEAD_BYTES = 64 << 10  # of a request's line and headers; parsing longer ones takes time with the square of their length
_HEAD_SECONDS = 20
_WORDS = {400: "Bad Request", 408: "Request Timeout", 431: "Request Header Fields Too Large"}


def allow_many_files():
    """Let this process have as many connections as the system grants; the usual 1,024 are soon taken by idle clients."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
    if soft != resource.RLIM_INFINITY and soft < most:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


class Connection(HttpToolsProtocol):
    """uvicorn's connection, with limits on the size of a request's head and on the time that it takes to come."""

    _timer = None
    _head, _in_head, _ended = 0, True, False

    def connection_made(self, transport):
        super().connection_made(transport)
        self._timer = self.loop.call_later(_HEAD_SECONDS, self._refuse, 408, "the request's head did not arrive in time")

    def connection_lost(self, exc):
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data):
        self._ended = False
        super().data_received(data)
        if self.transport.is_closing() or not self._in_head:
            return
        self._head = 0 if self._ended else self._head + len(data)
        if self._head > _HEAD_BYTES:
            self._refuse(431, f"the request's head is larger than {_HEAD_BYTES >> 10} KB")
        elif self._timer is None and not self._ended:
            self._timer = self.loop.call_later(_HEAD_SECONDS, self._refuse, 408, "the request's head did not arrive in time")

    def on_headers_complete(self):
        self._in_head = False
        self._stop_timer()
        super().on_headers_complete()

    def on_message_complete(self):
        self._in_head, self._ended, self._head = True, True, 0
        super().on_message_complete()

    def send_400_response(self, msg):
        self._refuse(400, "this is no valid HTTP request")

    def _stop_timer(self):
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _refuse(self, status, text):
        self._stop_timer()
        if self.transport.is_closing():
            return
        body = json.dumps(RequestError(text, status=status).body).encode()
        head = f"HTTP/1.1 {status} {_WORDS[status]}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        self.transport.write(f"{head}connection: close\r\n\r\n".encode() + body)
        self.transport.close()
