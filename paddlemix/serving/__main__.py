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

DEMO_MODEL = Path(__file__).parents[1] / "demo_model"


def make_parser():
    """The server's flags."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model_name_or_path", default=str(DEMO_MODEL), help="a checkpoint, or a name of one (default: the demo model)")
    add("--served_model_name", default=None, help="what requests call it (default: the folder's name)")
    add("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine alone)")
    add("--port", type=int, default=23333, help="0 picks a free one (default: 23333)")
    add("--device", default="auto", help="auto, or a Paddle device (default: auto)")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"], help="(default: auto)")
    add("--engine", default="auto", choices=["auto", "eager", "inference"], help="as of the chat command (default: auto)")
    quantised = parser.add_mutually_exclusive_group()
    quantised.add_argument("--load_8bit", action="store_true", help="weights in 8 bit")
    quantised.add_argument("--load_4bit", action="store_true", help="weights in 4 bit")
    add("--lora_modules", nargs="+", default=[], type=_module, metavar="NAME=DIR", help="adapters, as further model names")
    add("--max_num_seqs", type=_positive, default=16, help="answers made at once (default: 16)")
    add("--max_model_len", type=_positive, default=None, help="longest prompt and answer (default: the model's context)")
    add("--max_queue", type=int, default=256, help="requests that may wait (default: 256)")
    add("--max_images", type=int, default=16, help="most pictures and clips in a request (default: 16)")
    add("--num_segments", type=_positive, default=8, help="frames of a clip (default: 8)")
    add("--max_num", type=_positive, default=None, help="most tiles of a picture (default: the checkpoint's own)")
    add("--kv_cache_gb", type=float, default=None, help="memory for keys and values (default: up to a quarter of what is free)")
    add("--image_cache_mb", type=int, default=64, help="memory for features of pictures (default: 64)")
    add("--max_body_mb", type=float, default=64, help="largest request (default: 64)")
    add("--request_timeout", type=float, default=None, help="seconds a request may take (default: no limit)")
    add("--shutdown_timeout", type=float, default=30, help="seconds that running answers have after TERM (default: 30)")
    add("--api_key_file", default=None, help="file with the key that clients must send (or PADDLEMIX_API_KEY)")
    add("--allowed_origins", nargs="+", default=[], help="web pages that may ask, such as https://example.org (default: none)")
    add("--allowed_media_domains", nargs="+", default=[], help="hosts that pictures are fetched from (default: none)")
    add("--allow_private_media", action="store_true", help="also where these have private addresses")
    add("--allowed_local_media_path", default=None, help="folder that file: urls may name files of (default: none)")
    add("--media_timeout", type=float, default=10, help="seconds that fetching may take (default: 10)")
    add("--max_media_mb", type=float, default=32, help="largest picture or clip (default: 32)")
    add("--threads", type=int, default=0, help="threads of the CPU kernels (default: one for each core)")
    add("--cpus", default=None, help="cores to run on, such as 0-7 or 0,2 (default: all)")
    return parser


def _module(text):
    name, equals, folder = text.partition("=")
    if not (name and equals and folder):
        raise argparse.ArgumentTypeError(f"'{text}' must be NAME=DIR")
    return name, folder


def _positive(text):
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' must be a number above 0")
    return int(text)


def _cores(text):
    found = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found


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
    if args.cpus:
        try:
            os.sched_setaffinity(0, _cores(args.cpus))
        except (ValueError, OSError):
            _fail(f"--cpus {args.cpus}: no such cores: use numbers such as 0-3 or 0,2")
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
