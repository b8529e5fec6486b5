"""Prefill and decoding in float32 or bfloat16 and in 8 and 4 bits, beside llama.cpp with F32 or BF16, Q8_0 and Q4_0.

    make llama                                  a Python with llama-cpp-python and gguf, built with g++ (some 15 minutes)
    python benchmarks/fewbits.py --llama-python .venv/llama/bin/python --save

Each repetition starts a process for each side, one after the other and in turns. Figures mean something on a quiet machine
only; the heading says what other programs used. Where ours is slower the ratio is bold.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import machine
import sides

from paddlemix.errors import command_main
from paddlemix.models.internvl2 import InternVLChatConfig

HERE = Path(__file__).resolve().parent
KINDS = {"plain": None, "int8": "Q8_0", "int4": "Q4_0"}  # ours, and llama.cpp's; plain: the engine's own dtype


def run_ours(spec):
    """Measure our side; print one line of JSON."""
    import numpy as np
    import paddle

    from paddlemix import device
    from paddlemix.kernels import cpu
    from paddlemix.models.blocks.generation import GenerationConfig, generate_tokens
    from paddlemix.models.internvl2 import InternVLChatModel

    device.set_device("cpu")
    cpu.set_num_threads(spec["threads"])
    dtype = "bfloat16" if cpu.has_bfloat16() else "float32"
    cpu.available(dtype)  # it may be compiled
    weights = None if spec["kind"] == "plain" else spec["kind"]
    start = time.perf_counter()
    model = InternVLChatModel.from_pretrained(spec["directory"], dtype=dtype, engine="inference", weight_dtype=weights)
    result, llm = {"load": time.perf_counter() - start}, model.language_model

    own = llm.cache_dtype

    @paddle.no_grad()
    def measure(length, rows=1, cache=own):
        llm.cache_dtype = cache
        ids = np.arange(rows * length).reshape([rows, length]) * 7919 % llm.config.vocab_size
        config = GenerationConfig(max_new_tokens=spec["decode"] + 1)
        tokens = generate_tokens(llm, llm.embed(paddle.to_tensor(ids)), config)
        start, times = time.perf_counter(), []
        for _ in tokens:
            times.append(time.perf_counter() - start)
            start = time.perf_counter()
        return length / times[0], rows / statistics.median(times[1:])

    measure(3)
    for depth in spec["depths"]:
        prefill, result[f"decode {depth}"] = measure(max(depth, 1))
        if depth:
            result[f"prefill {depth}"] = prefill
    result[f"decode {depth}, keys and values in 8 bits"] = measure(max(depth, 1), 1, "int8")[1]
    for rows in (1, *spec["batches"]):
        result[f"decode of {rows} rows of 64"] = measure(64, rows)[1]
    result["memory"] = machine.peak_memory()
    result["dtype"] = dtype
    print(json.dumps(result))


def start(command, threads):
    """The last line that a side prints, as JSON; or why there is none."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(HERE.parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def shapes_of(config):
    """What llama.cpp's side needs to know of the decoder."""
    llm = config.llm_config
    return {
        "layers": llm.num_hidden_layers,
        "width": llm.hidden_size,
        "hidden": llm.intermediate_size,
        "heads": llm.num_attention_heads,
        "kv_heads": llm.num_key_value_heads,
        "vocabulary": llm.vocab_size,
    }


def table(results):
    """Rows of Markdown: ``{kind: {side: result}}``; a ratio below 1 is bold."""
    yield "| weights | | ours | llama.cpp | ratio |"
    yield "|---|---|---:|---:|---:|"
    for kind, found in results.items():
        ours, other = found.get("ours", {}), found.get("llama.cpp", {})
        for row in [row for row in ours if row not in ("error", "dtype")]:
            left, right = ours[row], other.get(row)
            unit = {"load": "load, s", "memory": "peak memory, GB"}.get(row, f"{row}, tokens/s")
            scale = 1e9 if row == "memory" else 1
            ratio = None if not right else left / right if row not in ("load", "memory") else right / left
            shown = "" if ratio is None else f"**{ratio:.2f}**" if ratio < 1 else f"{ratio:.2f}"
            figures = [sides.show(left / scale), sides.show(None if right is None else right / scale)]
            yield f"| {ours.get('dtype', '') if kind == 'plain' else kind} | {unit} | {' | '.join(figures)} | {shown} |"


@command_main
def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--model",
        default="1b",
        help="demo, 1b (random weights of InternVL2-1B's shapes), or a directory (default: %(default)s)",
    )
    add(
        "--llama-python", default=None, metavar="PYTHON", help="the Python that has llama-cpp-python and gguf; none: ours alone"
    )
    add("--kinds", default=",".join(KINDS), help="comma-separated (default and choice: %(default)s)")
    add("--depths", default="0,1832,8000", help="positions before decoding (default: %(default)s)")
    add("--batches", default="8,16", help="rows that are decoded together, of ours (default: %(default)s)")
    add("--decode", type=int, default=32, help="steps (default: %(default)s)")
    add("--repeat", type=int, default=3, help="processes for each side; medians are shown (default: %(default)s)")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of each side (default: all cores)")
    add("--save", action="store_true", help="also write benchmarks/results/DATE-fewbits.md")
    add("--ours", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.ours:
        return run_ours(json.loads(options.ours))
    kinds = options.kinds.split(",")
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        parser.error(f"--kinds '{unknown[0]}' is not known: use {', '.join(KINDS)}")
    directory = sides.checkpoint_directory(options.model)
    config = InternVLChatConfig.from_pretrained(str(directory))
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "paddlemix" / f"gguf-{Path(directory).name}"
    numbers = {"depths": [int(n) for n in options.depths.split(",")], "decode": options.decode, "threads": options.threads}
    from paddlemix.kernels import cpu

    kinds_there = {**KINDS, "plain": "BF16" if cpu.has_bfloat16() else "F32"}
    others, bandwidth = machine.OtherWork(), machine.read_bandwidth(options.threads)
    runs = {kind: {"ours": [], "llama.cpp": []} for kind in kinds}
    for i in range(options.repeat):
        for kind in kinds:
            ours = {
                **numbers,
                "directory": str(directory),
                "kind": kind,
                "batches": [int(n) for n in options.batches.split(",")],
            }
            commands = {"ours": [sys.executable, __file__, "--ours", json.dumps(ours)]}
            if options.llama_python:
                folder.mkdir(parents=True, exist_ok=True)
                spec = {**numbers, "folder": str(folder), "kind": kinds_there[kind], "shapes": shapes_of(config)}
                commands["llama.cpp"] = [options.llama_python, str(HERE / "llama_cpp_side.py"), json.dumps(spec)]
            for side in list(commands)[:: 1 if i % 2 == 0 else -1]:
                print(f"{kind} {i + 1}/{options.repeat} {side}", file=sys.stderr)
                runs[kind][side].append(start(commands[side], options.threads))
    results, failed = {}, []
    for kind, of in runs.items():
        results[kind] = {}
        for side, found in of.items():
            good = [run for run in found if "error" not in run]
            failed += [f"- did not run: {side} {kind}: {run['error']}" for run in found if "error" in run][:1]
            if good:
                middle = {row: statistics.median(run[row] for run in good) for row in good[0] if row != "dtype"}
                results[kind][side] = {**middle, **({"dtype": good[0]["dtype"]} if "dtype" in good[0] else {})}
    lines = [
        "# Weights in 8 and 4 bits",
        "",
        f"- machine: {machine.cpu_name()}, {options.threads} of {os.cpu_count()} cores; other programs used "
        f"{others.cores():.1f} of them meanwhile",
        f"- measured: memory reads {bandwidth / 1e9:.1f} GB/s; {options.model}, decoder alone, medians of {options.repeat}",
        f"- commit {machine.commit()}; a ratio above 1 means that ours is faster or smaller; llama.cpp's file is of the "
        "decoder alone, ours has the vision tower too, in load and memory",
        *failed,
        "",
        *table(results),
    ]
    sides.publish(lines, "fewbits", options.save)


if __name__ == "__main__":
    main()
