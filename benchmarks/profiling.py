"""Where the time of an answer goes: the operators and kernels of the vision tower, prefill and decode. See README.md in this
folder.

    python benchmarks/profiling.py --model 1b --dtype bfloat16

On the CPU engine times are those of its kernels; otherwise, and beside them, those of Paddle's operators. What is left is
Python, the start of operators, and float32 products that are called without an operator (``paddlemix/kernels/gemm.py``).
"""

import argparse
import collections
import datetime
import json
import os
import tempfile
from pathlib import Path

import machine
import numpy as np
import sides

from paddlemix.errors import command_main

REST = "everything else"


def profile(step):
    """Seconds of ``step()`` in all, and ``{operator or kernel: (calls, seconds)}``."""
    import paddle
    from paddle import profiler

    from paddlemix.kernels import cpu as kernels

    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        recorder = profiler.Profiler(
            targets=[profiler.ProfilerTarget.CPU], on_trace_ready=lambda done: done.export(str(trace), format="json")
        )
        with paddle.no_grad(), kernels.timed() as times, recorder:
            total = sides.seconds(step)
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    found = collections.defaultdict(list)
    for event in events:
        if event.get("cat") == "Operator":
            found[event["name"].split("[")[0].removesuffix(" dygraph")].append(event["dur"] / 1e6)
    found.update({f"{name} kernel": durations for name, durations in times.items()})
    return total, {name: (len(durations), sum(durations)) for name, durations in found.items()}


def table(total, found, top):
    """The ``top`` entries with the most time, and the rest, in Markdown."""
    yield "| operator or kernel | calls | ms | share |"
    yield "|---|---:|---:|---:|"
    listed = sorted(found.items(), key=lambda item: -item[1][1])[:top]
    left = total - sum(seconds for _, (_, seconds) in listed)
    for name, (calls, seconds) in [*listed, (REST, ("", left))]:
        yield f"| {name} | {calls} | {seconds * 1e3:,.2f} | {seconds / total:.0%} |"


def parse_arguments():
    parser = argparse.ArgumentParser(description="Print where the time of an answer goes.")
    add = parser.add_argument
    add("--model", default="demo", help="demo (bundled), 1b (the shapes of InternVL2-1B with random weights, which take 1.9 GB "
        "of the cache folder), or a checkpoint directory (default: %(default)s)")  # fmt: skip
    add("--dtype", default="auto", help="as of chat_demo.py (default: %(default)s)")
    add("--engine", default="auto", choices=["auto", "eager", "inference"], help="as of chat_demo.py (default: %(default)s)")
    add("--tiles", type=int, default=4, help="of the picture (default: %(default)s)")
    add("--steps", type=int, default=16, help="of decode (default: %(default)s)")
    add("--top", type=int, default=8, help="lines of a table (default: %(default)s)")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: all cores")
    options = parser.parse_args()
    if min(options.tiles, options.steps, options.top, options.threads) < 1:
        parser.error("--tiles, --steps, --top and --threads must be at least 1")
    return options


@command_main
def main():
    options = parse_arguments()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    os.environ.setdefault("GLOG_minloglevel", "2")
    import paddle
    from paddle_internvl import PaddleInternVL

    from paddlemix.models.blocks.generation import generate_tokens
    from paddlemix.models.internvl2 import GenerationConfig

    directory = str(sides.checkpoint_directory(options.model))
    side = PaddleInternVL(directory, options.dtype, options.threads, options.engine)
    config, language = side.model.config, side.model.language_model
    random = np.random.default_rng(0)
    pixels = random.standard_normal([options.tiles, 3, config.image_size, config.image_size], np.float32)
    ids = random.integers(0, config.llm_config.vocab_size, [1, options.tiles * config.num_image_token + 40])
    side.warm_up(pixels[:1], ids)
    generation = GenerationConfig(max_new_tokens=options.steps + 1)
    tokens = generate_tokens(language, language.embed(paddle.to_tensor(ids)), generation)
    steps = {
        f"Vision tower and projector, {options.tiles} tiles": lambda: side.features(pixels),
        f"Prefill, {ids.shape[1]} tokens": lambda: next(tokens),
        f"Decode, {options.steps} steps": lambda: collections.deque(tokens, maxlen=0),
    }
    print(f"# Profile of {options.model}: {side.engine} engine, {side.dtype}\n")
    print(
        f"{machine.cpu_name()}, {options.threads} of {os.cpu_count()} cores; commit {machine.commit()}; {datetime.date.today()}"
    )
    for name, step in steps.items():
        total, found = profile(step)
        print(f"\n## {name}: {total * 1e3:,.1f} ms\n")
        print("\n".join(table(total, found, options.top)))


if __name__ == "__main__":
    main()
