"""Memory of loading, and of conversations about a picture of twelve tiles and about a video of 32 frames. See README.md here.

    python benchmarks/memory.py --save

A model is loaded by a process of its own for each dtype of its weights, first with an empty cache of packed weights, then from
it, and answers: what the peak is above the memory before loading should be weights, cache of keys and values, and activations.
Each conversation is held in a process of its own, so that its peak is its own. What a round adds must be its keys and values
and nothing else.
"""

import argparse
import datetime
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import machine
import numpy as np
import sides

from paddlemix.errors import UserError, command_main
from paddlemix.examples.internvl2.cli import DEMO_MODEL
from paddlemix.kernels.cpu import has_bfloat16
from paddlemix.quantised import Quantised

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


def load_and_answer(spec):
    """Load a model and let it answer; print one line of JSON with what each took, in bytes."""
    import paddle

    from paddlemix import device
    from paddlemix.kernels import cpu as kernels
    from paddlemix.models.internvl2 import InternVLChatConfig, InternVLChatModel

    device.set_device("cpu")
    kernels.set_num_threads(spec["threads"])
    kernels.available(spec["dtype"])
    config = InternVLChatConfig.from_pretrained(spec["directory"])
    few = {"weight_dtype": spec["weights"], "quantize_parts": spec["parts"]} if spec["weights"] else {}
    # What the first model of a process brings in, modules and libraries, is none of this one's.
    InternVLChatModel.from_pretrained(str(DEMO_MODEL), dtype=spec["dtype"], engine="inference", **few)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # from now on the peak is that of loading
    before = resident_memory()
    model = InternVLChatModel.from_pretrained(spec["directory"], dtype=spec["dtype"], engine="inference", **few)
    for thread in threading.enumerate():  # what writes the cache
        if thread is not threading.current_thread() and thread.name == "cache":
            thread.join()
    loaded, weights = machine.peak_memory() - before, packed_bytes(model)
    size, context = config.image_size, config.llm_config.vocab_size - 1
    ids = np.arange(spec["prompt"])[None] % context
    pixels = None
    if spec["tiles"]:
        ids[:, 4 : 4 + spec["tiles"] * config.num_image_token] = context
        pixels = np.random.default_rng(0).standard_normal([spec["tiles"], 3, size, size], np.float32)
    model.img_context_token_id = context
    statistic = paddle.base.core.host_memory_stat_current_value
    tensors = statistic("Allocated", 0)
    paddle.base.core.host_memory_stat_reset_peak_value("Allocated", 0)
    model.generate(pixels, ids, max_new_tokens=spec["answer"])
    peak = machine.peak_memory() - before
    # Of tensors: keys and values, what is computed of a tile or a prompt at once, pixels, logits.
    working = paddle.base.core.host_memory_stat_peak_value("Allocated", 0) - tensors
    cache = model.language_model.new_cache(1, spec["prompt"] + spec["answer"], spec["dtype"]).nbytes
    result = {"loaded": loaded, "weights": weights, "working": working, "cache": cache, "peak": peak}
    print(json.dumps({**result, "scratch": kernels.scratch_memory()}))


def packed_bytes(model):
    """Bytes of all weights as the kernels have them, of embeddings, and of what is left as parameters."""
    from paddlemix.kernels.cpu import PackedLinear
    from paddlemix.kernels.quantised import QuantisedLinear

    sizes, seen = {}, set()

    def look(value):
        if id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, PackedLinear):
            sizes[value.packed.ctypes.data] = value.packed.nbytes
        elif isinstance(value, QuantisedLinear):
            sizes.update({array.ctypes.data: array.nbytes for array in value.weight.arrays().values()})
        elif isinstance(value, Quantised):
            sizes.update({array.ctypes.data: array.nbytes for array in value.arrays().values()})
        elif isinstance(value, (list, tuple)):
            list(map(look, value))
        elif isinstance(value, dict):
            list(map(look, value.values()))
        elif type(value).__module__.startswith("paddlemix.") and hasattr(value, "__dict__"):
            look(vars(value))

    for layer in model.sublayers(include_self=True):
        look(layer)
        for parameter in layer._parameters.values():
            if parameter is not None and parameter._is_initialized():
                sizes[parameter.data_ptr()] = parameter.size * parameter.element_size()
    return sum(sizes.values())


def loading_table(spec, kinds):
    """The rows of loading, in Markdown; figures in MB."""
    yield "| weights | load | weights | KV cache | activations | peak | of their sum |"
    yield "|---|---|---:|---:|---:|---:|---:|"
    for kind in kinds:
        with tempfile.TemporaryDirectory() as folder:
            for way in ("first", "mapped"):
                each = {**spec, "weights": None if kind == spec["dtype"] else kind}
                row = run_child(["--load", json.dumps(each)], spec["threads"], {"XDG_CACHE_HOME": folder})
                activations = row["working"] - row["cache"] + row["scratch"]
                figures = row["weights"], row["cache"], activations, row["peak"]
                shown = " | ".join(f"{figure / 1e6:,.1f}" for figure in figures)
                yield f"| {kind} | {way} | {shown} | {row['peak'] / sum(figures[:3]):.3f} |"


def run_child(arguments, threads, environment=()):
    """The JSON that this script prints when it is started with ``arguments``.

    Raises:
        UserError: it failed.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(sides.HERE.parent), **dict(environment)}
    done = subprocess.run([sys.executable, __file__, *arguments], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise UserError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1].removeprefix("error: "))
    return json.loads(done.stdout.splitlines()[-1])


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
    add("--only-loading", action="store_true", help="leave the conversations out")
    add("--case", nargs=2, help=argparse.SUPPRESS)
    add("--load", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rounds < 1 or options.answer < 1 or options.threads < 1:
        parser.error("--rounds, --answer and --threads must be at least 1")
    return options


@command_main
def main():
    options = parse_arguments()
    if options.case:
        return hold_conversation(options.case[0], json.loads(options.case[1]))
    if options.load:
        return load_and_answer(json.loads(options.load))
    spec = {name: getattr(options, name) for name in ("dtype", "engine", "rounds", "answer", "threads")}
    spec["directory"] = str(sides.checkpoint_directory(options.model))
    dtype = "bfloat16" if has_bfloat16() else "float32"
    loading = {
        "directory": spec["directory"], "dtype": dtype, "threads": options.threads, "parts": "language,projector,vision",
        "tiles": 1, "prompt": 512, "answer": options.answer,
    }  # fmt: skip
    print(f"{options.model} loading", file=sys.stderr)
    heading = f"Weights of {options.model}, an answer about one tile; peak is above the memory just before loading."
    sections, versions = ["", "## Loading", "", heading, "", *loading_table(loading, [dtype, "int8", "int4"])], {}
    for case in () if options.only_loading else CASES:
        print(f"{options.model} {case}", file=sys.stderr)
        result = run_child(["--case", case, json.dumps(spec)], options.threads)
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
