"""Speed and memory of inference, beside transformers + torch where these are installed. See README.md in this folder.

    python benchmarks/inference.py --model demo,1b --dtype float32,bfloat16 --save

Each repetition starts a process for each side, one after the other and in turns, so that nothing else runs beside what is
measured and peak memory is each side's own.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import machine
import numpy as np
import sides
from sides import seconds

from paddlemix.errors import command_main
from paddlemix.models.blocks.flops import decode_bytes, decoder_flops, parameter_counts, vision_flops
from paddlemix.models.internvl2 import InternVLChatConfig

DTYPES = ("float32", "bfloat16")
TEXT_TOKENS = 40  # of the prompt, beside the tiles
LEAST_SECONDS = 0.5  # short jobs are repeated within a process for this long

# What is measured; whether more is better; which limit of the machine it is compared with.
ROWS = {
    "vit": ("ViT and projector, tiles/s", True, "matmul peak"),
    "prefill": ("prefill, tokens/s", True, "matmul peak"),
    "decode": ("decode, tokens/s", True, "memory reads"),
    "first": ("pixels to first token, s", False, ""),
    "load": ("load, s", False, ""),
    "memory": ("peak memory, GB", False, ""),
}

# ---------------------------------------------------------------------- one side, in its own process


def middle(measure):
    """Median of what ``measure()`` returns, a number or several; repeated where it is short."""
    results, start = [], time.perf_counter()
    while not results or time.perf_counter() - start < LEAST_SECONDS:
        results.append(measure())
    return np.median(results, axis=0).tolist()


def run_side(side, spec):
    """Measure one side; print one line of JSON."""
    model = sides.open_side(side, spec)
    config = InternVLChatConfig.from_pretrained(spec["directory"])
    rows, random = spec["rows"], np.random.default_rng(0)
    pixels = random.standard_normal([spec["tiles"], 3, config.image_size, config.image_size], np.float32)
    context = config.llm_config.vocab_size - 1
    ids = random.integers(0, context, [1, spec["prompt"]])
    marked = ids.copy()
    marked[:, TEXT_TOKENS // 2 : -TEXT_TOKENS // 2] = context

    model.warm_up(pixels[:2], ids)
    result = {"load": model.load_seconds}
    if "vit" in rows:
        result["vit"] = middle(lambda: seconds(lambda: model.features(pixels)))
    if {"prefill", "decode"} & set(rows):
        result["prefill"], result["decode"] = middle(lambda: model.generate(ids, spec["decode"]))
    if {"first", "memory"} & set(rows):  # memory is that of a whole answer
        result["first"] = middle(lambda: seconds(lambda: model.first_token(pixels, marked, context)))
    result["memory"] = machine.peak_memory()

    np.save(Path(spec["folder"], side), model.to_numpy(model.features(pixels[:1])))
    sides.report(model, result, spec["matmul"])


# ---------------------------------------------------------------------- all sides, in turns


def measure(name, pythons, spec, repeat):
    """Results of each side by name, medians over ``repeat`` processes; and how far their features are apart."""
    with tempfile.TemporaryDirectory() as folder:
        merged = sides.measure(__file__, f"{name} {spec['dtype']}", pythons, {**spec, "folder": folder}, repeat, ROWS)
        features = [np.load(path) for path in Path(folder).glob("*.npy")]
    apart = np.abs(features[0] - features[1]).max() / np.abs(features[0]).max() if len(features) == 2 else None
    return merged, apart


# ---------------------------------------------------------------------- the table


def figures(config, spec, result):
    """One side's rows: ``{row: (figure as people read it, FLOPs or bytes a second or None)}``."""
    tiles, prompt, steps = spec["tiles"], spec["prompt"], spec["decode"]
    read = sum(decode_bytes(config, prompt + i, spec["dtype"]) for i in range(1, steps + 1))
    work = {
        "vit": (tiles, vision_flops(config, tiles)),
        "prefill": (prompt, decoder_flops(config, prompt)),
        "decode": (steps, read),
    }
    return {
        row: tuple(amount / result[row] for amount in work[row])
        if row in work
        else (result[row] / (1e9 if row == "memory" else 1), None)
        for row in spec["rows"]
    }


def table(config, spec, merged, limits):
    """The rows of one model in one dtype, in Markdown."""
    return sides.table({row: ROWS[row] for row in spec["rows"]}, merged, lambda result: figures(config, spec, result), limits)


def parse_arguments():
    parser = argparse.ArgumentParser(description="Measure inference, beside transformers + torch where these are installed.")
    add = parser.add_argument
    add("--model", default="demo,1b", help="comma-separated: demo (bundled), 1b (the shapes of InternVL2-1B with random "
        "weights, which take 1.9 GB of the cache folder), or checkpoint directories")  # fmt: skip
    add("--rows", default=",".join(ROWS), help="comma-separated; default and choice: %(default)s")
    add("--dtype", default=",".join(DTYPES), help="comma-separated; default and choice: %(default)s")
    add("--engine", default="auto", choices=["auto", "eager", "inference"], help="of our side")
    add("--quick", action="store_true", help="2 tiles and 4 decode steps instead of 7 and 32")
    sides.add_arguments(add, "inference")
    options = parser.parse_args()
    for name, allowed in (("rows", ROWS), ("dtype", DTYPES)):
        values = getattr(options, name).split(",")
        if unknown := [value for value in values if value not in allowed]:
            parser.error(f"--{name} '{unknown[0]}' is not known: use {', '.join(allowed)}")
        setattr(options, name, values)
    if options.repeat < 1 or options.threads < 1:
        parser.error("--repeat and --threads must be at least 1")
    return options


@command_main
def main():
    options = parse_arguments()
    if options.side:
        return run_side(options.side[0], json.loads(options.side[1]))
    directories = [sides.checkpoint_directory(model) for model in options.model.split(",")]
    pythons = sides.pythons(options)
    others, bandwidth = machine.OtherWork(), machine.read_bandwidth(options.threads)
    sections, peaks = [], {}
    for model, directory in zip(options.model.split(","), directories):
        config = InternVLChatConfig.from_pretrained(directory)
        tiles = 2 if options.quick else 7
        for dtype in options.dtype:
            spec = {
                "directory": str(directory),
                "dtype": dtype,
                "engine": options.engine,
                "threads": options.threads,
                "rows": options.rows,
                "tiles": tiles,
                "prompt": tiles * config.num_image_token + TEXT_TOKENS,
                "decode": 4 if options.quick else 32,
                "matmul": 1024 if options.quick else 2048,
            }
            merged, apart = measure(model, pythons, spec, options.repeat)
            for result in merged.values():
                peaks[dtype] = max(peaks.get(dtype, 0), result.get("peak", 0))
            sections.append((model, config, spec, merged, apart))

    measured = [f"matmul peak {dtype} {peak / 1e12:.2f} TFLOP/s" for dtype, peak in peaks.items()]
    measured.append(f"memory reads {bandwidth / 1e9:.1f} GB/s")
    results = [result for *_, merged, _ in sections for result in merged.values()]
    lines = [*sides.heading("Inference", options, others, measured, results)]
    for model, config, spec, merged, apart in sections:
        size = sum(parameter_counts(config).values()) / 1e6
        lines += ["", f"## {model} ({size:,.1f}M parameters), {spec['dtype']}", ""]
        lines += [f"{spec['tiles']} tiles, {spec['prompt']} tokens of prompt, {spec['decode']} decode steps."]
        lines += [f"Our engine: {merged['ours']['engine']}."] if "engine" in merged["ours"] else []
        lines += sides.failures(merged)
        lines += [f"Features of both sides differ by {apart:.1e} of the largest."] if apart is not None else []
        limits = {"matmul peak": peaks[spec["dtype"]], "memory reads": bandwidth, "": None}
        lines += ["", *table(config, spec, merged, limits)]
    sides.publish(lines, "inference", options.save)


if __name__ == "__main__":
    main()
