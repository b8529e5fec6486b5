"""What answering together gains over one by one, on the same server, and what a long picture costs who asks beside it.

    python benchmarks/together.py                                          # the demo model, 16 clients
    python benchmarks/together.py --model 1b --clients 8 --scenes text,shared,different,beside
    python benchmarks/together.py --rows 2000                              # `paddlemix batch` instead of the server

Scenes: ``text``; ``shared``, all about one picture; ``different``, each about a picture of seven tiles of its own; ``beside``,
the first token of a short text question alone and while others' pictures of seven tiles are computed. All answers are as long.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import machine
import numpy as np
import serving
import sides

from paddlemix.errors import ConfigError, command_main

SCENES = ("text", "shared", "different", "beside")
SEVEN_TILES = (1344, 896)


class Scene:
    """Questions of one kind to a server; each has a number, so that none is asked twice."""

    def __init__(self, target, kind, tokens):
        self.target, self.kind, self.tokens, self._next = target, kind, tokens, 0
        self._shared = serving.picture(1, SEVEN_TILES) if kind == "shared" else None

    def questions(self, count):
        """Numbers and pictures of the next questions."""
        first, self._next = self._next, self._next + count
        own = self.kind == "different"
        return [(i, serving.picture(1000 + i, SEVEN_TILES) if own else self._shared) for i in range(first, first + count)]

    def ask(self, question):
        """Tokens of the answer."""
        number, url = question
        return self.target.ask(f"{number}: please tell me about this.", self.tokens, url)[2]

    def rate(self, count, clients):
        """Tokens a second of ``count`` answers that so many clients share."""
        questions = self.questions(count)
        begun = time.perf_counter()
        with ThreadPoolExecutor(clients) as pool:
            made = sum(pool.map(self.ask, questions))
        return made / (time.perf_counter() - begun)


def together(target, kind, options):
    """(tokens a second one by one, with all clients at once)."""
    scene = Scene(target, kind, options.tokens)
    scene.rate(1, 1)  # what is computed once
    alone, at_once = [], []
    for _ in range(options.repeats):  # in turn: what else the machine does changes
        alone.append(scene.rate(max(1, options.clients // 4), 1))
        at_once.append(scene.rate(options.clients, options.clients))
    return float(np.median(alone)), float(np.median(at_once))


def beside(target, options):
    """Seconds to the first token of short text questions: (alone, beside pictures), the median and the worst of each."""

    def first(number):
        return target.ask(f"{number}: who are you?", 4)[0]

    first(0)
    alone = [first(100 + i) for i in range(2 * options.repeats)]
    over = threading.Event()

    def others(number):
        while not over.is_set():
            number += 1000
            target.ask("What is this?", 16, serving.picture(number, SEVEN_TILES))

    with ThreadPoolExecutor(3) as pool:
        running = [pool.submit(others, 10_000 * (i + 1)) for i in range(3)]
        time.sleep(3)
        found = []
        for i in range(4 * options.repeats):
            found.append(first(200 + i))
            time.sleep(0.5)
        over.set()
        for one in running:
            one.result()
    return [(float(np.median(times)), max(times)) for times in (alone, found)]


def in_a_file(directory, options):
    """Rows a second of ``paddlemix batch`` on the demo's scenes: (one by one, together)."""
    scenes = Path(__file__).parents[1] / "paddlemix" / "demo_images"
    texts = ("What color is the star?", "How many shapes are there?", "Please describe this picture.")
    rates = []
    for alone, count in ((True, max(1, options.rows // 8)), (False, options.rows)):
        with tempfile.TemporaryDirectory() as folder:
            requests, answers = Path(folder) / "requests.jsonl", Path(folder) / "answers.jsonl"
            rows = [
                {"id": i, "image": str(scenes / f"scene_{i % 4 + 1}.png"), "text": f"{texts[i % 3]} {i}"} for i in range(count)
            ]
            requests.write_text("".join(json.dumps(row) + "\n" for row in rows))
            command = [sys.executable, "-m", "paddlemix", "batch", str(requests), str(answers)]
            command += ["--max_num_seqs", "1"] if alone else []
            command += ["--model_name_or_path", str(directory), "--dtype", options.dtype]
            process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
            while process.poll() is None and not (answers.exists() and answers.stat().st_size):
                time.sleep(0.01)
            begun = time.perf_counter()  # the first is there: starting is no part of the rate
            if process.wait():
                raise ConfigError("`paddlemix batch` failed: run it by itself")
            rates.append((count - 1) / (time.perf_counter() - begun))
    return rates


def make_parser():
    """The command's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="demo", help="demo, 1b, or a checkpoint (default: demo)")
    add("--clients", type=int, default=16, help="answers at once (default: 16)")
    add("--tokens", type=int, default=128, help="of each answer (default: 128)")
    add("--scenes", default="text,shared,different", help=f"of {', '.join(SCENES)} (default: text,shared,different)")
    add("--rows", type=int, default=0, help="measure `paddlemix batch` with so many rows instead")
    add("--repeats", type=int, default=3, help="of each measurement; the median counts (default: 3)")
    add("--dtype", default="float32", choices=["float32", "bfloat16"], help="(default: float32)")
    add("--threads", type=int, default=0, help="of our server (default: its own choice)")
    return parser


@command_main
def main():
    """Measure and print."""
    options = make_parser().parse_args()
    scenes = options.scenes.split(",")
    if not set(scenes) <= set(SCENES):
        raise ConfigError(f"--scenes {options.scenes} must be of {', '.join(SCENES)}")
    options.max_num_seqs = max(options.clients, 4)
    directory, others = sides.checkpoint_directory(options.model), machine.OtherWork()
    print(f"{options.model}, {options.dtype}; {machine.cpu_name()}; commit {machine.commit()}\n")
    if options.rows:
        one, many = in_a_file(directory, options)
        print(f"| paddlemix batch, {options.rows} rows | rows/s |\n| --- | --- |\n| one by one | {one:.1f} |")
        print(f"| together | {many:.1f} ({many / one:.2f} times) |")
    else:
        with serving.ours(directory, options) as url:
            target = serving.Target(url, {"ignore_eos": True})
            print(f"| scene | one by one, tokens/s | {options.clients} at once | times |\n| --- | --- | --- | --- |")
            for kind in scenes:
                if kind != "beside":
                    one, many = together(target, kind, options)
                    print(f"| {kind} | {one:.1f} | {many:.1f} | {many / one:.2f} |", flush=True)
            if "beside" in scenes:
                print("\n| first token of a short question | median, s | worst, s |\n| --- | --- | --- |")
                for what, times in zip(("alone", "beside pictures of seven tiles"), beside(target, options)):
                    print(f"| {what} | {times[0]:.2f} | {times[1]:.2f} |")
    print(f"\nOther programs kept {others.cores():.1f} cores busy.")


if __name__ == "__main__":
    main()
