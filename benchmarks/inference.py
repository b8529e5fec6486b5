"""Speed and memory of inference, beside transformers + torch where these are installed. See README.md in this folder.

    python benchmarks/inference.py --model demo,1b --dtype float32,bfloat16 --save

Each repetition starts a process for each side, one after the other and in turns, so that nothing else runs beside what is
measured and peak memory is each side's own.
"""

import argparse
import datetime
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import machine
import numpy as np

from paddlemix.errors import UserError, user_errors_exit
from paddlemix.models.internvl2 import InternVLChatConfig
from paddlemix.models.internvl2.checkpoint import weight_table
from paddlemix.models.internvl2.flops import decode_bytes, decoder_flops, parameter_counts, vision_flops
from paddlemix.models.internvl2.weight_files import (
    OutgoingTensor,
    blocks,
    convert_dtype,
    rows_per_block,
    write_safetensors,
)

HERE = Path(__file__).resolve().parent
MODELS = {"demo": HERE.parent / "paddlemix" / "demo_model", "1b": HERE / "internvl2-1b"}
DTYPES = ("float32", "bfloat16")
INSTALL = "pip install torch==2.13.0 'transformers>=4.57,<5'"
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


def checkpoint_directory(name):
    """Directory of a model to measure; one that has a ``config.json`` alone gets random bfloat16 weights in the cache."""
    directory = Path(MODELS.get(name, name))
    config = InternVLChatConfig.from_pretrained(directory)
    if len(list(directory.iterdir())) > 1:
        return directory
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "paddlemix"
    target = cache / f"random-{hashlib.sha256(json.dumps(config.to_dict()).encode()).hexdigest()[:12]}"
    if (target / "config.json").exists():  # written last
        return target

    def rows(part, seed):
        random = np.random.default_rng(seed)
        for start, stop in blocks(part.shape[0], rows_per_block(part.shape, 4)):
            values = random.standard_normal([stop - start, *part.shape[1:]], np.float32) * np.float32(0.02)
            if len(part.shape) == 1 and not part.name.endswith("bias"):  # norms and layer scale
                values += 1
            yield convert_dtype(values, "float32", "bfloat16")

    print(f"writing random weights into {target}", file=sys.stderr)
    parts = [part for weight in weight_table(config) for part in weight.parts]
    tensors = [OutgoingTensor(p.name, "bfloat16", p.shape, lambda p=p, i=i: rows(p, i)) for i, p in enumerate(parts)]
    write_safetensors(target, tensors, {"format": "pt"})
    config.save(target)
    return target


# ---------------------------------------------------------------------- one side, in its own process


def seconds(job):
    """Seconds of ``job()``."""
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


def middle(measure):
    """Median of what ``measure()`` returns, a number or several; repeated where it is short."""
    results, start = [], time.perf_counter()
    while not results or time.perf_counter() - start < LEAST_SECONDS:
        results.append(measure())
    return np.median(results, axis=0).tolist()


def run_side(side, spec):
    """Measure one side; print one line of JSON."""
    arguments = spec["directory"], spec["dtype"], spec["threads"]
    if side == "ours":
        from paddle_internvl import PaddleInternVL

        model = PaddleInternVL(*arguments, spec["engine"])
    else:
        from torch_internvl import TorchInternVL

        model = TorchInternVL(*arguments)
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
    multiply = model.matmul(spec["matmul"])
    result["peak"] = 2 * spec["matmul"] ** 3 / min(seconds(multiply) for _ in range(10))
    print(json.dumps({**result, "engine": model.engine, "versions": machine.versions(*model.packages)}))


# ---------------------------------------------------------------------- all sides, in turns


def has_torch(python):
    """Whether a Python has torch and transformers."""
    probe = "import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, ('torch', 'transformers'))))"
    try:
        return subprocess.run([python, "-c", probe], capture_output=True).returncode == 0
    except OSError as error:
        raise UserError(f"--torch-python {python} does not run ({error.strerror}): give the path of a Python") from None


def start_side(side, python, spec):
    """Run :func:`run_side` in a process of its own; return its result, or ``{"error": why there is none}``."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(spec["threads"]),
        "PYTHONPATH": str(HERE.parent),
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_OFFLINE": "1",
    }
    command = [python, __file__, "--side", side, json.dumps(spec)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return {"error": reason.removeprefix("error: ")}
    return json.loads(done.stdout.splitlines()[-1])


def measure(name, pythons, spec, repeat):
    """Results of each side by name, medians over ``repeat`` processes; and how far their features are apart."""
    results = {side: [] for side in pythons}
    with tempfile.TemporaryDirectory() as folder:
        for i in range(repeat):
            for side in list(pythons)[:: 1 if i % 2 == 0 else -1]:  # neither is always the first
                print(f"{name} {spec['dtype']} {i + 1}/{repeat} {side}", file=sys.stderr)
                results[side].append(start_side(side, pythons[side], {**spec, "folder": folder}))
        features = [np.load(path) for path in Path(folder).glob("*.npy")]
    merged = {}
    for side, runs in results.items():
        merged[side] = next((run for run in runs if "error" in run), None) or {
            **runs[0],
            **{row: statistics.median(run[row] for run in runs) for row in ROWS if row in runs[0]},
            "peak": max(run["peak"] for run in runs),
        }
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


def show(value, form=None):
    """A figure with three digits, or in a form of its own; nothing for None."""
    return "" if value is None else format(value, form or (",.0f" if value >= 100 else ".3g"))


def table(config, spec, merged, limits):
    """The rows of one model in one dtype, in Markdown."""
    sides = [{} if "error" in (r := merged.get(s, {"error": ""})) else figures(config, spec, r) for s in ("ours", "torch")]
    yield "| | ours | torch | ratio | limit | ours reaches | torch reaches |"
    yield "|---|---:|---:|---:|---|---:|---:|"
    for row in spec["rows"]:
        name, more_is_better, limit = ROWS[row]
        (ours, our_rate), (torch, torch_rate) = (side.get(row, (None, None)) for side in sides)
        ratio = None if None in (ours, torch) else ours / torch if more_is_better else torch / ours
        shares = [show(rate and rate / limits[limit], ".0%") for rate in (our_rate, torch_rate)]
        yield f"| {' | '.join([name, show(ours), show(torch), show(ratio, '.2f'), limit, *shares])} |"


def parse_arguments():
    parser = argparse.ArgumentParser(description="Measure inference, beside transformers + torch where these are installed.")
    add = parser.add_argument
    add("--model", default="demo,1b", help="comma-separated: demo (bundled), 1b (the shapes of InternVL2-1B with random "
        "weights, which take 1.9 GB of the cache folder), or checkpoint directories")  # fmt: skip
    add("--rows", default=",".join(ROWS), help="comma-separated; default and choice: %(default)s")
    add("--dtype", default=",".join(DTYPES), help="comma-separated; default and choice: %(default)s")
    add("--engine", default="auto", choices=["auto", "eager", "inference"], help="of our side")
    add("--repeat", type=int, default=3, help="processes for each side; medians are shown (default %(default)s)")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of each side (default: all cores)")
    add("--quick", action="store_true", help="2 tiles and 4 decode steps instead of 7 and 32")
    add("--torch-python", default=sys.executable, metavar="PYTHON", help="the Python that has torch and transformers")
    add("--save", action="store_true", help="also write benchmarks/results/DATE-inference.md")
    add("--side", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    for name, allowed in (("rows", ROWS), ("dtype", DTYPES)):
        values = getattr(options, name).split(",")
        if unknown := [value for value in values if value not in allowed]:
            parser.error(f"--{name} '{unknown[0]}' is not known: use {', '.join(allowed)}")
        setattr(options, name, values)
    if options.repeat < 1 or options.threads < 1:
        parser.error("--repeat and --threads must be at least 1")
    return options


@user_errors_exit
def main():
    options = parse_arguments()
    if options.side:
        return run_side(options.side[0], json.loads(options.side[1]))
    directories = [checkpoint_directory(model) for model in options.model.split(",")]
    pythons = {"ours": sys.executable}
    if has_torch(options.torch_python):
        pythons["torch"] = options.torch_python
    others, bandwidth = machine.OtherWork(), machine.read_bandwidth(options.threads)
    sections, peaks, versions = [], {}, {"python": sys.version.split()[0]}
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
                versions |= result.get("versions", {})
                peaks[dtype] = max(peaks.get(dtype, 0), result.get("peak", 0))
            sections.append((model, config, spec, merged, apart))

    measured = [f"matmul peak {dtype} {peak / 1e12:.2f} TFLOP/s" for dtype, peak in peaks.items()]
    built = [f"{name} {version}" for name, version in versions.items()]
    lines = [
        "# Inference",
        "",
        f"- machine: {machine.cpu_name()}, {options.threads} of {os.cpu_count()} cores; "
        f"other programs used {others.cores():.1f} of them meanwhile",
        f"- measured: {', '.join(measured)}; memory reads {bandwidth / 1e9:.1f} GB/s",
        f"- versions: {', '.join(built)}; commit {machine.commit()}; {datetime.date.today()}",
        f"- medians of {options.repeat}; a ratio above 1 means that ours is faster or smaller",
    ]
    if "torch" not in pythons:
        lines.append(f"- ours alone; to compare, install torch and transformers, best apart (--torch-python): {INSTALL}")
    for model, config, spec, merged, apart in sections:
        size = sum(parameter_counts(config).values()) / 1e6
        lines += ["", f"## {model} ({size:,.1f}M parameters), {spec['dtype']}", ""]
        lines += [f"{spec['tiles']} tiles, {spec['prompt']} tokens of prompt, {spec['decode']} decode steps."]
        lines += [f"Our engine: {merged['ours']['engine']}."] if "engine" in merged["ours"] else []
        lines += [f"Did not run: {side}, because {result['error']}" for side, result in merged.items() if "error" in result]
        lines += [f"Features of both sides differ by {apart:.1e} of the largest."] if apart is not None else []
        limits = {"matmul peak": peaks[spec["dtype"]], "memory reads": bandwidth, "": None}
        lines += ["", *table(config, spec, merged, limits)]
    text = "\n".join(lines) + "\n"
    print(text)
    if options.save:
        target = HERE / "results" / f"{datetime.date.today()}-inference.md"
        target.parent.mkdir(exist_ok=True)
        target.write_text(text, encoding="utf-8")
        print(f"saved as {target}", file=sys.stderr)


if __name__ == "__main__":
    main()
