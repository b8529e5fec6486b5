"""Serve an InternVL model over OpenAI's HTTP interface.

python -m paddlemix.serving
    serves the bundled demo model at http://127.0.0.1:23333/v1
python -m paddlemix.serving --model_name_or_path OpenGVLab/InternVL2-1B --host 0.0.0.0 --api_key_file key.txt
"""

import argparse
import asyncio
import contextlib
import logging.handlers
import os
import queue
import signal
import socket
import sys
import time
from pathlib import Path

from paddlemix.commands import Parser
from paddlemix.errors import command_main

from .flags import add_media_flags, add_model_flags


def make_parser():
    """The server's flags."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add_model_flags(parser)
    add("--served_model_name", default=None, help="what requests call it (default: the folder's name)")
    add("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine alone)")
    add("--port", type=int, default=23333, help="0 picks a free one (default: 23333)")
    add("--max_queue", type=int, default=256, help="requests that may wait (default: 256)")
    add("--max_body_mb", type=float, default=64, help="largest request (default: 64)")
    add("--request_timeout", type=float, default=None, help="seconds a request may take (default: no limit)")
    add("--shutdown_timeout", type=float, default=30, help="seconds that running answers have after TERM (default: 30)")
    add("--api_key_file", default=None, help="file with the key that clients must send (or PADDLEMIX_API_KEY)")
    add("--allowed_origins", nargs="+", default=[], help="web pages that may ask, such as https://example.org (default: none)")
    add_media_flags(parser)
    return parser


def _fail(message):
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(1)


def settle(args):
    """Check the flags and read the key; returns it, or None. Ends the program where something is wrong."""
    args.served_model_name = args.served_model_name or Path(args.model_name_or_path).resolve().name
    names = [args.served_model_name, *(name for name, _ in args.lora_modules)]
    if len(set(names)) < len(names):
        _fail("--lora_modules: every model needs a name of its own")
    key = os.environ.pop("PADDLEMIX_API_KEY", None) or None
    if args.api_key_file:
        try:
            key = Path(args.api_key_file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            _fail(f"--api_key_file {args.api_key_file} cannot be read ({getattr(error, 'strerror', None) or 'no text'})")
        if not key:
            _fail(f"--api_key_file {args.api_key_file} is empty")
    if args.allowed_local_media_path and not os.path.isdir(args.allowed_local_media_path):
        _fail(f"--allowed_local_media_path {args.allowed_local_media_path} is not a folder")
    if key is None and args.host not in ("127.0.0.1", "localhost", "::1"):
        print(f"warning: anybody who reaches {args.host} can use this server: set --api_key_file", file=sys.stderr)
    return key


def _listen(host, port):
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        _fail(f"cannot listen on {host}:{port} ({getattr(error, 'strerror', None) or error}): use another --port or --host")
    listener.listen(2048)
    listener.setblocking(False)
    return listener


async def _serve(args, server, listener):
    """Serve until told to end; the exit code."""
    import uvicorn

    from .connections import Connection, allow_many_files

    allow_many_files()
    config = uvicorn.Config(
        server.app, log_config=None, access_log=False, lifespan="off", timeout_keep_alive=30, timeout_graceful_shutdown=5,
        server_header=False, http=Connection, ws="none",
    )  # fmt: skip
    http = uvicorn.Server(config)
    http.capture_signals = contextlib.nullcontext  # they are taken below
    loop = asyncio.get_running_loop()
    code, asked = 0, asyncio.Event()

    def told():
        if asked.is_set():
            os._exit(130)  # a second time: at once
        asked.set()
        server.draining = True

    def listen_to_signals():
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
            loop.add_signal_handler(number, told)

    listen_to_signals()
    server.begin(loop)
    serving = asyncio.create_task(http.serve(sockets=[listener]))
    while not server.engine.loaded.is_set() and not asked.is_set():
        await asyncio.sleep(0.02)
    listen_to_signals()  # Paddle has put handlers of its own in their place
    if server.engine.failure is not None:
        _report(server.engine.failure)
        http.should_exit = True
        await serving
        return 1
    if not asked.is_set():
        server.get_ready()
        print(server.engine.summary, file=sys.stderr)
        host, port = listener.getsockname()[:2]
        print(f"ready: http://{f'[{host}]' if ':' in host else host}:{port}/v1", flush=True)
        await asked.wait()
    deadline = loop.time() + args.shutdown_timeout
    while server.active and loop.time() < deadline:
        await asyncio.sleep(0.05)
    if server.active:
        code = 1
        server.cut()
        await asyncio.sleep(0.3)
    http.should_exit = True
    await serving
    server.engine.stop()
    return code


class _Log(logging.handlers.QueueHandler):
    """Lines to stderr, written by a thread of their own: whoever started the server need not read them, and it must go on."""

    def __init__(self):
        super().__init__(queue.Queue(1000))
        stream = logging.StreamHandler(sys.stderr)
        self._listener = logging.handlers.QueueListener(self.queue, stream)
        self._listener.start()

    def enqueue(self, record):
        with contextlib.suppress(queue.Full):  # the oldest line tells as much as the newest
            self.queue.put_nowait(record)

    def finish(self):
        """Wait a moment for what has not been written."""
        deadline = time.monotonic() + 0.5
        while not self.queue.empty() and time.monotonic() < deadline:
            time.sleep(0.01)


def start_log():
    """Log to stderr without ever waiting for it; gives what ends the log."""
    log = _Log()
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[log])
    for noisy in ("httpx", "asyncio", "uvicorn.error", "uvicorn", "ray", "ray.serve"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
    return log.finish


def _report(message):
    print(f"error: {message}", file=sys.stderr)


@command_main
def main(argv=None):
    """Parse the command line and serve."""
    args = make_parser().parse_args(argv)
    finish_log = start_log()
    key = settle(args)
    listener = _listen(args.host, args.port)
    if not os.path.isdir(args.model_name_or_path) and os.sep in args.model_name_or_path.rstrip(os.sep)[:1]:
        _fail(f"{args.model_name_or_path} does not exist: give the folder of a checkpoint, or a name")
    from .api import Server

    code = asyncio.run(_serve(args, Server(args, key), listener))
    sys.stdout.flush()
    finish_log()
    os._exit(code)  # threads of the engine and of media have nothing left to say


if __name__ == "__main__":
    main()
