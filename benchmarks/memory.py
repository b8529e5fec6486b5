"""Memory of conversations about a picture of twelve tiles and about a video of 32 frames. See README.md in this folder.

    python benchmarks/memory.py --save

Each conversation is held in a process of its own, so that its peak is its own. What a round adds must be its keys and values
and nothing else.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
from pathlib import Path

import machine
import numpy as np
import sides

from paddlemix.errors import UserError, command_main

# Tiles of each picture, and the question's marks.
CASES = {
    "a picture of 12 tiles and its thumbnail": ([13], "<image>\n"),
    "a video of 32 frames": ([1] * 32, "".join(f"Frame{i + 1}: <image>\n" for i in range(32))),
}
QUESTION = "What is in the middle, and what is to the left of it? Answer in one sentence."


def resident_memory():
    """Resident memory of this process now, in bytes."""
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith("VmRSS")).split()[1]) * 1024


def hold_conversation(case, spec):
    """Ask about random pixels, then go on for some rounds; print one line of JSON with a row for each round.

    Bytes of tensors are Paddle's own count of what is allocated, beside what the model and its tables held before.
    """
    import paddle

    from paddlemix import device
    from paddlemix.kernels import cpu as kernels
    from paddlemix.models.blocks.engine import choose
    from paddlemix.models.blocks.flops import parameter_counts
    from paddlemix.models.internvl2 import ChatSession, InternVLChatConfig, InternVLChatModel, load_tokenizer

    device.set_device("cpu")
    kernels.set_num_threads(spec["threads"])
    parameters = sum(parameter_counts(InternVLChatConfig.from_pretrained(spec["directory"])).values())
    engine, dtype = choose(spec["engine"], spec["dtype"], parameters)
    model = InternVLChatModel.from_pretrained(spec["directory"], dtype=dtype, engine=engine)
    tokenizer = load_tokenizer(str(sides.MODELS["demo"]))  # any will do: random weights have nothing to say
    model.set_tokenizer(tokenizer)
    counts, marks = CASES[case]
    size = model.config.image_size
    loaded = machine.peak_memory()

    session = ChatSession(model, tokenizer)
    options = {"max_new_tokens": spec["answer"], "min_new_tokens": spec["answer"]}
    before = paddle.base.core.host_memory_stat_current_value("Allocated", 0)
    rows = []
    for number in range(1 + spec["rounds"]):
        if number:
            session.ask(QUESTION, None, options)
        else:
            pixels = np.random.default_rng(0).standard_normal([sum(counts), 3, size, size], np.float32)
            session.ask(marks + QUESTION, pixels, options, counts)
            del pixels
        tensors = paddle.base.core.host_memory_stat_current_value("Allocated", 0) - before
        now = {"tensors": tensors, "resident": resident_memory(), "peak": machine.peak_memory()}
        rows.append({**session.memory(), **now})
    result = {"engine": engine, "dtype": dtype, "loaded": loaded, "rows": rows}
    print(json.dumps({**result, "versions": machine.versions("paddlepaddle")}))


def table(result):
    """The rows of one conversation, in Markdown; figures in MB."""
    yield "| round | positions | KV cache | picture features | all tensors of the session | resident after it | peak |"
    yield "|---:|---:|---:|---:|---:|---:|---:|"
    for number, row in enumerate(result["rows"], 1):
        figures = [row[name] / 1e6 for name in ("kv_cache", "features", "tensors", "resident", "peak")]
        yield f"| {number} | {row['positions']:,} | {' | '.join(f'{figure:,.1f}' for figure in figures)} |"


def growth(result):
    """What the rounds after the first added, in one sentence."""
    first, last = result["rows"][0], result["rows"][-1]
    kv, tensors, resident, peak = ((last[name] - first[name]) / 1e6 for name in ("kv_cache", "tensors", "resident", "peak"))
    return (
        f"{len(result['rows']) - 1} more rounds added {kv:.1f} MB of KV cache, {tensors:.1f} MB of tensors in all, "
        f"{resident:.1f} MB resident, and {peak:.1f} MB to the peak."
    )


def parse_arguments():
    parser = argparse.ArgumentParser(description="Measure the memory of conversations, round by round.")
    add = parser.add_argument
    add("--model", default="1b", help="1b (the shapes of InternVL2-1B with random weights, which take 1.9 GB of the cache "
        "folder), demo (bundled), or a checkpoint directory (default: %(default)s)")  # fmt: skip
    add("--dtype", default="auto", help="as of chat_demo.py (default: %(default)s)")
    add("--engine", default="auto", choices=["auto", "eager", "inference"], help="as of chat_demo.py (default: %(default)s)")
    add("--rounds", type=int, default=4, help="further rounds of each conversation (default: %(default)s)")
    add("--answer", type=int, default=32, help="tokens of each answer (default: %(default)s)")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: all cores")
    add("--save", action="store_true", help="also write benchmarks/results/DATE-memory.md")
    add("--case", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rounds < 1 or options.answer < 1 or options.threads < 1:
        parser.error("--rounds, --answer and --threads must be at least 1")
    return options


@command_main
def main():
    options = parse_arguments()
    if options.case:
        return hold_conversation(options.case[0], json.loads(options.case[1]))
    spec = {name: getattr(options, name) for name in ("dtype", "engine", "rounds", "answer", "threads")}
    spec["directory"] = str(sides.checkpoint_directory(options.model))
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "PYTHONPATH": str(sides.HERE.parent)}
    sections, versions = [], {}
    for case in CASES:
        print(f"{options.model} {case}", file=sys.stderr)
        command = [sys.executable, __file__, "--case", case, json.dumps(spec)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise UserError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1].removeprefix("error: "))
        result = json.loads(done.stdout.splitlines()[-1])
        versions |= result["versions"]
        loading = f"Loading the model peaks at {result['loaded'] / 1e6:,.1f} MB ({result['engine']} engine, {result['dtype']})."
        sections += ["", f"## {options.model}, {case}", "", loading, "", *table(result), "", growth(result)]
    built = ", ".join(f"{name} {version}" for name, version in versions.items())
    heading = [
        "# Memory of a conversation",
        "",
        f"- machine: {machine.cpu_name()}, {options.threads} of {os.cpu_count()} cores",
        f"- versions: {built}; commit {machine.commit()}; {datetime.date.today()}",
        f"- MB; answers of {options.answer} tokens; the peak is that of the process, file pages and libraries included",
    ]
    sides.publish([*heading, *sections], "memory", options.save)


if __name__ == "__main__":
    main()
