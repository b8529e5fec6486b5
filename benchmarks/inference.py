"""Speed and memory of inference beside transformers + torch, OpenVINO and llama.cpp, where these are. See README.md here.

    make llama openvino bench-torch           the other sides, each in an environment of its own
    python benchmarks/inference.py --model 1b --save

Each repetition starts a process for each side, one after the other and in turns, so that nothing else runs beside what is
measured and peak memory is each side's own. Where ours is slower than any other side the ratio is bold.
"""

import argparse
import functools
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import machine
import numpy as np
import sides
from sides import seconds

from paddlemix.errors import command_main
from paddlemix.kernels import cpu
from paddlemix.models.blocks.flops import BYTES, decode_bytes, decoder_flops, parameter_counts, vision_flops
from paddlemix.models.internvl2 import InternVLChatConfig
from paddlemix.quantised import BITS, bytes_per_value

DTYPES = ("float32", "bfloat16", *BITS)  # of weights; in few bits the rest is in what the machine computes best in
TEXT_TOKENS = 40  # of the prompt, beside the tiles
LEAST_SECONDS = 0.5  # short jobs are repeated within a process for this long
ROUNDED = "ours, activations in 8 bits"
GGUF = {"float32": "F32", "bfloat16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}
TILES, BATCH_DEPTH = 2, 64

# What is measured; whether more is better; which limit of the machine it is compared with.
ROWS = {
    "vit": ("ViT and projector, tiles/s", True, "matmul peak"),
    "prefill": ("prefill, tokens/s", True, "matmul peak"),
    "decode": ("decode at depth {}, tokens/s", True, "memory reads"),
    "batch": ("decode of {} sequences, tokens/s", True, ""),
    "first": ("pixels to first token, s", False, ""),
    "load": ("load, s", False, ""),
    "memory": ("peak memory, GB", False, ""),
}

# ---------------------------------------------------------------------- one side, in its own process


def middle(measure):
    """Median of what ``measure()`` returns; repeated where it is short."""
    results, start = [], time.perf_counter()
    while not results or time.perf_counter() - start < LEAST_SECONDS:
        results.append(measure())
    return float(np.median(results))


def run_side(side, spec):
    """Measure our side or torch's; print one line of JSON: tiles, tokens and so on a second, seconds, and bytes."""
    model = sides.open_side(side, spec)
    config = InternVLChatConfig.from_pretrained(spec["directory"])
    rows, random, tiles = spec["rows"], np.random.default_rng(0), spec["tiles"]
    pixels = random.standard_normal([tiles, 3, config.image_size, config.image_size], np.float32)
    context = config.llm_config.vocab_size - 1

    def ids(length, batch=1):
        return np.random.default_rng(1).integers(0, context, [batch, max(length, 1)])

    model.warm_up(pixels[:1], ids(40))
    result = {"load": model.load_seconds}
    if "vit" in rows:
        result["vit"] = tiles / middle(lambda: seconds(lambda: model.features(pixels)))
    generated = {}
    if "decode" in rows:
        generated = {depth: model.generate(ids(depth), spec["decode"]) for depth in spec["depths"]}
        result |= {f"decode {depth}": 1 / step for depth, (_, step) in generated.items()}
    if "prefill" in rows:
        done = generated.get(spec["prompt"]) or model.generate(ids(spec["prompt"]), 1)
        result["prefill"] = spec["prompt"] / done[0]
    if "batch" in rows:
        result |= {
            f"batch {count}": count / model.generate(ids(BATCH_DEPTH, count), spec["decode"])[1] for count in spec["batches"]
        }
    if {"first", "memory"} & set(rows):  # memory is that of a whole answer
        marked = ids(tiles * config.num_image_token + TEXT_TOKENS)
        marked[:, TEXT_TOKENS // 2 : -TEXT_TOKENS // 2] = context
        result["first"] = seconds(lambda: model.first_token(pixels, marked, context))
    result["memory"] = machine.peak_memory()
    if spec["weights"] is None:
        np.save(Path(spec["features"], side), model.to_numpy(model.features(pixels[:1])))
    sides.report(model, result, spec["matmul"])


# ---------------------------------------------------------------------- all sides, in turns


class Sides:
    """The sides that can run here, and what each is started with."""

    def __init__(self, options):
        self.pythons = {**sides.pythons(options)}
        for name in ("openvino", "llama"):
            if python := getattr(options, f"{name}_python"):
                self.pythons["llama.cpp" if name == "llama" else "OpenVINO"] = python
        self.cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "paddlemix"

    def of(self, dtype):
        """Names of those that have weights in ``dtype``, ours first."""
        few = dtype in BITS
        return [
            "ours",
            *([ROUNDED] if few else []),
            *(name for name in self.pythons if name != "ours" and (name != "torch" or not few)),
        ]

    def run(self, name, spec, config):
        """Measure a side in a process of its own; its result, or ``{"error": why there is none}``."""
        if name in ("ours", ROUNDED, "torch"):
            spec = {**spec, "activations": "int8" if name == ROUNDED else None}
            return sides.start_side(
                __file__, "torch" if name == "torch" else "ours", self.pythons.get(name, sys.executable), spec
            )
        llm, vision = config.llm_config, config.vision_config
        shapes = {
            "layers": llm.num_hidden_layers, "width": llm.hidden_size, "hidden": llm.intermediate_size,
            "heads": llm.num_attention_heads, "kv_heads": llm.num_key_value_heads, "vocabulary": llm.vocab_size,
        }  # fmt: skip
        tower = {
            "layers": vision.num_hidden_layers, "width": vision.hidden_size, "hidden": vision.intermediate_size,
            "heads": vision.num_attention_heads, "patch": vision.patch_size, "size": config.image_size, "out": llm.hidden_size,
        }  # fmt: skip
        folder = self.cache / f"gguf-{Path(spec['directory']).name}"
        folder.mkdir(parents=True, exist_ok=True)
        spec = {
            **spec,
            "shapes": shapes,
            "vision": tower,
            "folder": str(folder),
            "kind": GGUF[spec["weights"] or spec["dtype"]],
        }
        script = sides.HERE / ("llama_cpp_side.py" if name == "llama.cpp" else "openvino_side.py")
        return sides.start_command([self.pythons[name], str(script), json.dumps(spec)], spec["threads"])


class Kept:
    """Results of processes, in a file if there is one: a run that was ended goes on where it was."""

    def __init__(self, path):
        self.path, self.found = path, {}
        if path and Path(path).exists():
            for line in Path(path).read_text().splitlines():
                key, result = json.loads(line)
                self.found[tuple(key)] = result

    def get(self, key, run):
        """What is kept under ``key``, or what ``run()`` returns now."""
        if key not in self.found:
            self.found[key] = run()
            if self.path and "error" not in self.found[key]:
                with open(self.path, "a") as file:
                    file.write(json.dumps([key, self.found[key]]) + "\n")
        return self.found[key]


def merged(runs):
    """Medians of the figures of some runs of a side; or the first that failed."""
    if failed := next((run for run in runs if "error" in run), None):
        return failed
    numbers = {row for row, value in runs[0].items() if isinstance(value, (int, float)) and row != "peak"}
    middle = {row: statistics.median(run[row] for run in runs) for row in runs[0] if row in numbers}
    return {**runs[0], **middle, "peak": max(run.get("peak", 0) for run in runs)}


# ---------------------------------------------------------------------- the table


def named(spec):
    """Names, directions and limits of the rows that ``spec`` asks for, by the keys of results."""
    found = {}
    for row in spec["rows"]:
        name, more, limit = ROWS[row]
        each = {"decode": spec["depths"], "batch": spec["batches"]}.get(row)
        if each is None:
            found[row] = name, more, limit
        else:
            found |= {f"{row} {number}": (name.format(f"{number:,}"), more, limit) for number in each}
    return found


def work(config, spec):
    """FLOPs of a tile and of a token of the prompt, and bytes of a step at each depth, by the keys of results."""
    few, products = spec["weights"], spec["products"]
    found = {"vit": vision_flops(config, 1), "prefill": decoder_flops(config, spec["prompt"]) / spec["prompt"]}
    for depth in spec["depths"]:
        read = decode_bytes(config, max(depth, 1), products)
        if few:
            counts, tied = parameter_counts(config), config.llm_config.tie_word_embeddings
            head = counts["embedding" if tied else "head"]
            read -= BYTES[products] * (counts["decoder"] + head)
            read += counts["decoder"] * bytes_per_value(few) + head * bytes_per_value("int8")
        found[f"decode {depth}"] = read
    return found


def table(config, spec, results, limits):
    """The rows of one model with weights in one dtype, in Markdown.

    Args:
        results: :func:`merged` of each side by name; ours are those whose names begin so.
        limits: FLOPs or bytes a second of each limit.
    """
    good = {name: result for name, result in results.items() if "error" not in result}
    ours, others = ([name for name in good if name.startswith("ours") == mine] for mine in (True, False))
    yield f"| | {' | '.join([*ours, *others])} | {' | '.join('ratio' for _ in ours)} | limit | ours reaches |"
    yield f"|---|{'---:|' * (len(good) + len(ours))}---|---:|"
    amounts = work(config, spec)
    for row, (name, more, limit) in named(spec).items():
        figures = {side: result.get(row) for side, result in good.items()}
        there = [figures[side] for side in others if figures[side]]
        ratios = []
        for side in ours:
            best = (max if more else min)(there) if there else None
            ratio = None if best is None or not figures[side] else figures[side] / best if more else best / figures[side]
            ratios.append("" if ratio is None else f"**{ratio:.2f}**" if ratio < 1 else f"{ratio:.2f}")
        scale = 1e9 if row == "memory" else 1
        shown = [sides.show(figures[side] and figures[side] / scale) for side in (*ours, *others)]
        reached = max((figures[side] or 0) for side in ours) * amounts[row] / limits[limit] if limit and ours else None
        yield f"| {' | '.join([name, *shown, *ratios, limit, sides.show(reached, '.0%')])} |"


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="demo,1b", help="comma-separated: demo (bundled), 1b (the shapes of InternVL2-1B with random "
        "weights, which take 1.9 GB of the cache folder), or checkpoint directories")  # fmt: skip
    add("--rows", default=",".join(ROWS), help="comma-separated; default and choice: %(default)s")
    add("--dtype", default=",".join(DTYPES), help="of weights, comma-separated; default and choice: %(default)s")
    add("--engine", default="auto", choices=["auto", "eager", "inference"], help="of our side")
    add("--depths", default="0,1832,8000", help="tokens before those that are decoded (default: %(default)s)")
    add("--batches", default="1,8,16", help="sequences that are decoded together (default: %(default)s)")
    add("--prompt", type=int, default=1832, help="tokens of the prompt whose prefill is timed (default: %(default)s)")
    add("--sides", default=None, help="only these, comma-separated, such as 'ours,llama.cpp' (default: all that can run)")
    add("--keep", default=None, metavar="FILE", help="note each process's result here, and take what is there already")
    add("--quick", action="store_true", help="1 tile, 4 steps, a prompt of 40 tokens, depths 0 and 40, 1 and 2 sequences")
    for name in ("openvino", "llama"):
        found = sides.HERE.parent / ".venv" / name / "bin" / "python"
        add(f"--{name}-python", default=str(found) if found.exists() else None, metavar="PYTHON",
            help=f"the Python of `make {name}` (default: that of this folder's .venv, if it is there)")  # fmt: skip
    sides.add_arguments(add, "inference")
    options = parser.parse_args()
    for name, allowed in (("rows", ROWS), ("dtype", DTYPES)):
        values = getattr(options, name).split(",")
        if unknown := [value for value in values if value not in allowed]:
            parser.error(f"--{name} '{unknown[0]}' is not known: use {', '.join(allowed)}")
        setattr(options, name, values)
    for name in ("depths", "batches"):
        values = getattr(options, name).split(",")
        if not all(value.isdecimal() and int(value) < 1 << 20 for value in values):
            parser.error(f"--{name} must be whole numbers with commas between")
        setattr(options, name, [int(value) for value in values])
    if options.repeat < 1 or options.threads < 1 or options.prompt < 2:
        parser.error("--repeat and --threads must be at least 1, --prompt at least 2")
    if options.quick:
        options.depths, options.batches, options.prompt = [0, 40], [1, 2], 40
    return options


@command_main
def main():
    options = parse_arguments()
    if options.side:
        return run_side(options.side[0], json.loads(options.side[1]))
    there, kept = Sides(options), Kept(options.keep)
    directories = [sides.checkpoint_directory(model) for model in options.model.split(",")]
    others, bandwidth = machine.OtherWork(), machine.read_bandwidth(options.threads)
    fastest = "bfloat16" if cpu.has_bfloat16() else "float32"
    sections, peaks = [], {}
    for model, directory in zip(options.model.split(","), directories):
        config = InternVLChatConfig.from_pretrained(directory)
        for dtype in options.dtype:
            few = dtype if dtype in BITS else None
            spec = {
                "directory": str(directory), "dtype": fastest if few else dtype, "products": fastest if few else dtype,
                "weights": few, "engine": "inference" if few else options.engine, "threads": options.threads,
                "rows": options.rows, "tiles": 1 if options.quick else TILES, "prompt": options.prompt,
                "depths": options.depths, "batches": options.batches, "decode": 4 if options.quick else 32,
                "matmul": 1024 if options.quick else 2048,
            }  # fmt: skip
            names = there.of(dtype)
            if options.sides is not None:
                names = [name for name in names if name.partition(",")[0] in options.sides.split(",")]
            runs, apart = {name: [] for name in names}, None
            with tempfile.TemporaryDirectory() as folder:
                for i in range(options.repeat):
                    for name in names[:: 1 if i % 2 == 0 else -1]:  # neither is always the first
                        print(f"{model} {dtype} {i + 1}/{options.repeat} {name}", file=sys.stderr)
                        key = (model, dtype, name, i, json.dumps({**spec, "directory": ""}))
                        run = functools.partial(there.run, name, {**spec, "features": folder}, config)
                        runs[name].append(kept.get(key, run))
                features = [np.load(path) for path in Path(folder).glob("*.npy")]
            if len(features) == 2:
                apart = np.abs(features[0] - features[1]).max() / np.abs(features[0]).max()
            results = {name: merged(found) for name, found in runs.items()}
            for result in results.values():
                peaks[spec["products"]] = max(peaks.get(spec["products"], 0), result.get("peak", 0))
            sections.append((model, config, spec, results, apart))

    measured = [f"matmul peak {dtype} {peak / 1e12:.2f} TFLOP/s" for dtype, peak in peaks.items()]
    measured.append(f"memory reads {bandwidth / 1e9:.1f} GB/s")
    every = [result for *_, results, _ in sections for result in results.values()]
    lines = [*sides.heading("Inference", options, others, measured, every)]
    for name in [name for name in ("OpenVINO", "llama.cpp") if name not in there.pythons]:
        lines.append(f"- without {name}, which `make {'openvino' if name == 'OpenVINO' else 'llama'}` installs")
    if any("llama.cpp" in results or "OpenVINO" in results for *_, results, _ in sections):
        lines.append("- llama.cpp's file is of the decoder alone; OpenVINO's tower has 8 bits where its decoder has 4")
    for model, config, spec, results, apart in sections:
        size = sum(parameter_counts(config).values()) / 1e6
        lines += ["", f"## {model} ({size:,.1f}M parameters), {spec['weights'] or spec['dtype']}", ""]
        lines += [f"{spec['tiles']} tiles, {spec['prompt']} tokens of prompt, {spec['decode']} decode steps, several sequences "
                  f"behind {BATCH_DEPTH} tokens each."]  # fmt: skip
        engines = {result["engine"] for name, result in results.items() if name.startswith("ours") and "engine" in result}
        lines += [f"Our engine: {', '.join(engines)}; products in {spec['products']}."] if engines else []
        lines += sides.failures(results)
        lines += [f"Features of ours and torch differ by {apart:.1e} of the largest."] if apart is not None else []
        limits = {"matmul peak": peaks[spec["products"]] or float("inf"), "memory reads": bandwidth}
        lines += ["", *table(config, spec, results, limits)]
    sides.publish(lines, "inference", options.save)


if __name__ == "__main__":
    main()
