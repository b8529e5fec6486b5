"""Load on a server: time to the first token, time between tokens and throughput, by how many clients there are.

    python benchmarks/serving.py --model demo --clients 1,4,16,64
    python benchmarks/serving.py --llama-python .venv/llama/bin/python   # beside llama.cpp, same decoder shapes (make llama)

Requests arrive as a Poisson process; their texts, answers and pictures have lengths and sizes from distributions, the same for
every server. Beside llama-cpp-python's server texts alone are asked, since random weights have no vision tower there.
"""

import argparse
import base64
import contextlib
import http.client
import io
import json
import os
import random
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import machine
import numpy as np
import sides

from paddlemix.errors import ConfigError, command_main

HERE = Path(__file__).parent
PERCENTILES = (50, 90, 99)
ALPHABET = "the of and a to in is was he for it with as his on be at by had not are but from or have an they which".split()


class Load:
    """Requests that are drawn from distributions, the same ones each time.

    Args:
        count: how many.
        seed: of all draws.
        pictures: share of requests with a picture.
        prompt, answer: medians of their tokens; both are log-normal.
    """

    def __init__(self, count, seed, pictures, prompt, answer):
        draw = random.Random(seed)
        self.requests = []
        for number in range(count):
            tokens = int(min(max(draw.lognormvariate(np.log(prompt), 0.8), 4), 1000))
            wanted = int(min(max(draw.lognormvariate(np.log(answer), 0.6), 4), 4 * answer))
            size = (draw.choice((448, 640, 1024)), draw.choice((448, 768))) if draw.random() < pictures else None
            self.requests.append((number, tokens, wanted, size))

    def arrivals(self, rate, seed):
        """Seconds at which each request arrives, a Poisson process of ``rate`` a second."""
        draw, now, found = random.Random(seed), 0.0, []
        for _ in self.requests:
            now += draw.expovariate(rate)
            found.append(now)
        return found


def picture(number, size):
    """A data URL of a picture that no other request has."""
    from PIL import Image

    pixels = np.random.default_rng(number).integers(0, 256, (size[1] // 16, size[0] // 16, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize(size).save(buffer, "JPEG")
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


class Target:
    """A server that is measured.

    Args:
        url: its address, up to ``/v1``.
        fields: that every request gets.
    """

    def __init__(self, url, fields):
        parts = urllib.parse.urlsplit(url)
        self.host, self.port, self.path = parts.hostname, parts.port, parts.path
        self.fields, self.share = fields, 1.0
        short, long = (self.ask(text, 1)[3] for text in ("the " * 8, "the " * 72))
        self.share = max(0.1, (long - short) / 64)  # tokens a word

    def ask(self, text, tokens, url=None):
        """(seconds to the first token, seconds between the later ones, tokens, tokens of the prompt)."""
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}] if url else text
        body = {"messages": [{"role": "user", "content": content}], "max_tokens": tokens, "temperature": 0, **self.fields}
        stream = {"stream": True, "stream_options": {"include_usage": True}}
        times, usage = [], None
        connection = http.client.HTTPConnection(self.host, self.port, timeout=600)
        with contextlib.closing(connection):
            began = time.perf_counter()
            data = json.dumps({**body, **stream}).encode()
            connection.request("POST", f"{self.path}/chat/completions", data, {"Content-Type": "application/json"})
            response = connection.getresponse()
            if response.status != 200:
                raise ConfigError(f"the server refused a request: {response.read()[:300].decode()}")
            for line in response:
                if line.startswith(b"data: {"):
                    event = json.loads(line[6:])
                    usage = event.get("usage") or usage
                    if event["choices"] and event["choices"][0]["delta"].get("content"):
                        times.append(time.perf_counter())
        first = (times[0] if times else time.perf_counter()) - began
        made = usage["completion_tokens"] if usage else len(times)
        return first, np.diff(times).tolist(), made, usage["prompt_tokens"] if usage else 0

    def text(self, number, tokens):
        """A text of about so many of this server's tokens."""
        draw = random.Random(number)
        return " ".join(draw.choice(ALPHABET) for _ in range(max(1, round(tokens / self.share))))


def measure(target, load, clients, rate):
    """What ``clients`` see who share the arrivals: a dictionary of figures."""
    begun, lock, results = time.perf_counter(), threading.Lock(), []

    def one(item):
        (number, tokens, wanted, size), at = item
        time.sleep(max(0.0, begun + at - time.perf_counter()))
        late = time.perf_counter() - begun - at  # no client was free: that is waiting too
        first, between, made, _ = target.ask(target.text(number, tokens), wanted, picture(number, size) if size else None)
        with lock:
            results.append((late + first, between, made))

    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(one, zip(load.requests, load.arrivals(rate, clients))))
    seconds = time.perf_counter() - begun
    between = [gap for _, gaps, _ in results for gap in gaps] or [0.0]
    return {
        "first": np.percentile([first for first, _, _ in results], PERCENTILES).tolist(),
        "between": np.percentile(between, PERCENTILES).tolist(),
        "tokens": sum(made for _, _, made in results) / seconds,
        "requests": len(results) / seconds,
    }


@contextlib.contextmanager
def started(command, ready, seconds=300):
    """The address that a server tells once it is there."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        yield ready(process, time.monotonic() + seconds)
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        process.kill()


def ours(directory, options):
    """Our server, in a process of its own."""

    def ready(process, _):
        line = process.stdout.readline()
        if not line.startswith("ready: "):
            raise ConfigError("our server did not start: try `paddlemix serve` with the same --model_name_or_path")
        return line.split()[1]

    command = [sys.executable, "-m", "paddlemix.serving", "--model_name_or_path", str(directory), "--port", "0"]
    more = ["--max_num_seqs", str(options.max_num_seqs), "--max_queue", "1000", "--dtype", options.dtype]
    more += ["--threads", str(options.threads)] if options.threads else []
    return started([*command, *more], ready)


def llama(directory, options):
    """llama-cpp-python's server over random weights of the same decoder shapes."""
    kind = "bf16" if options.dtype == "bfloat16" else "f32"
    file = Path("work_dirs", f"{Path(directory).name}-{kind}.gguf").absolute()
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        writer = [options.llama_python, str(HERE / "llama_weights.py"), str(Path(directory) / "config.json"), str(file), kind]
        subprocess.run(writer, check=True, stdout=subprocess.DEVNULL)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def ready(process, deadline):
        while time.monotonic() < deadline and process.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                return f"http://127.0.0.1:{port}/v1"
            time.sleep(0.2)
        raise ConfigError("llama-cpp-python's server did not start: run `python -m llama_cpp.server --help` of --llama-python")

    threads = str(options.threads or len(os.sched_getaffinity(0)))
    flags = ["--model", str(file), "--port", str(port), "--n_ctx", "4096", "--n_threads", threads, "--chat_format", "chatml"]
    flags += ["--interrupt_requests", "false"]  # else a new request ends the one that is answered
    return started([options.llama_python, "-m", "llama_cpp.server", *flags], ready)


def table(rows):
    """The figures as Markdown."""
    names = "/".join(f"p{p}" for p in PERCENTILES)
    lines = [f"| server | clients | first token, s ({names}) | between tokens, ms ({names}) | tokens/s | requests/s |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for name, clients, found in rows:
        first = " / ".join(f"{value:.2f}" for value in found["first"])
        between = " / ".join(f"{1000 * value:.0f}" for value in found["between"])
        lines.append(f"| {name} | {clients} | {first} | {between} | {found['tokens']:.1f} | {found['requests']:.2f} |")
    return lines


def draw(rows, path):
    """The figures as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 4))
    for name in dict.fromkeys(name for name, _, _ in rows):
        own = [(clients, found) for label, clients, found in rows if label == name]
        counts = [clients for clients, _ in own]
        axes[0].plot(counts, [found["first"][0] for _, found in own], "o-", label=f"{name}, p50")
        axes[0].plot(counts, [found["first"][1] for _, found in own], "o--", label=f"{name}, p90")
        axes[1].plot(counts, [1000 * found["between"][0] for _, found in own], "o-", label=f"{name}, p50")
        axes[2].plot(counts, [found["tokens"] for _, found in own], "o-", label=name)
    for axis, title in zip(axes, ("first token, s", "between tokens, ms", "tokens/s")):
        axis.set_title(title)
        axis.set_xlabel("clients")
        axis.set_xscale("log", base=2)
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def make_parser():
    """The command's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="demo", help="demo, 1b, or a checkpoint (default: demo)")
    add("--url", default=None, help="measure a server that runs already, instead of starting ours")
    add("--clients", default="1,4,16,64", help="how many at once, in turn (default: 1,4,16,64)")
    add("--requests", type=int, default=64, help="for each number of clients (default: 64)")
    add("--rate", type=float, default=4.0, help="arrivals a second, for each client (default: 4)")
    add("--pictures", type=float, default=0.3, help="share of requests with a picture (default: 0.3)")
    add("--prompt", type=int, default=40, help="median tokens of a text (default: 40)")
    add("--answer", type=int, default=64, help="median tokens of an answer (default: 64)")
    add("--dtype", default="float32", choices=["float32", "bfloat16"], help="(default: float32)")
    add("--max_num_seqs", type=int, default=16, help="of our server (default: 16)")
    add("--threads", type=int, default=0, help="of each server (default: each server's own choice)")
    add("--llama-python", default=None, help="a Python with llama-cpp-python[server] and gguf, to compare (make llama)")
    add("--out", default="work_dirs/serving", help="OUT.md and OUT.png are written (default: work_dirs/serving)")
    return parser


@command_main
def main():
    """Measure and report."""
    options = make_parser().parse_args()
    counts = [int(text) for text in options.clients.split(",") if re.fullmatch(r"[1-9]\d*", text)]
    if not counts:
        raise ConfigError(f"--clients {options.clients} must be numbers such as 1,4,16")
    directory = sides.checkpoint_directory(options.model)
    text = Load(options.requests, 0, 0.0, options.prompt, options.answer)
    mixed = Load(options.requests, 0, options.pictures, options.prompt, options.answer)
    rows, others = [], machine.OtherWork()

    def run(name, url, load, fields):
        target = Target(url, fields)
        for clients in counts:
            rows.append((name, clients, measure(target, load, clients, options.rate * clients)))
            print(table(rows[-1:])[-1], flush=True)

    own = contextlib.nullcontext(options.url) if options.url else ours(directory, options)
    with own as url:
        if options.llama_python or not options.pictures:
            run("paddlemix, texts", url, text, {"ignore_eos": True})
        if options.pictures:
            run(f"paddlemix, {options.pictures:.0%} with pictures", url, mixed, {"ignore_eos": True})
    if options.llama_python:
        with llama(directory, options) as url:
            end = json.loads((Path(directory) / "config.json").read_text(encoding="utf-8"))["llm_config"]["vocab_size"] - 1
            run("llama.cpp, texts", url, text, {"logit_bias": {str(end): -100}})  # as long answers as ours
    out = Path(options.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"# Serving: {options.model}, {options.dtype}", "", f"{machine.cpu_name()}; commit {machine.commit()}."]
    drawn = f"{options.requests} requests for each row, Poisson arrivals, {options.rate:g} a second and client"
    lines += [f"{drawn}; other programs kept {others.cores():.1f} cores busy.", ""]
    out.with_suffix(".md").write_text("\n".join([*lines, *table(rows), ""]), encoding="utf-8")
    draw(rows, out.with_suffix(".png"))
    print(f"written: {out.with_suffix('.md')}, {out.with_suffix('.png')}")


if __name__ == "__main__":
    main()
