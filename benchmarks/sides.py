"""What the benchmarks of this folder that compare two sides share: ours and transformers + torch, each in its own process.

A benchmark is a script that measures one side when it is started with ``--side NAME SPEC``, and all sides in turns otherwise.
"""

import dataclasses
import datetime
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import machine
import numpy as np

from paddlemix.checkpoints import (
    OutgoingTensor,
    blocks,
    convert_dtype,
    rows_per_block,
    write_safetensors,
)
from paddlemix.errors import UserError
from paddlemix.models.internvl2 import InternVLChatConfig
from paddlemix.models.internvl2.checkpoint import weight_table

HERE = Path(__file__).resolve().parent
MODELS = {"demo": HERE.parent / "paddlemix" / "demo_model", "1b": HERE / "internvl2-1b"}
INSTALL = "make bench-torch, or pip install torch==2.13.0 'transformers>=4.57,<5' beside requirements.txt"


def checkpoint_directory(name, layers=None):
    """Directory of a model to measure; one that has a ``config.json`` alone gets random bfloat16 weights in the cache.

    Args:
        name: one of :data:`MODELS`, or a directory.
        layers: blocks of the language model in place of its own number; the weights are then random too.
    """
    directory = Path(MODELS.get(name, name))
    config = InternVLChatConfig.from_pretrained(directory)
    if layers is not None:
        config = dataclasses.replace(config, llm_config=dataclasses.replace(config.llm_config, num_hidden_layers=layers))
    elif len(list(directory.iterdir())) > 1:
        return directory
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "paddlemix"
    target = cache / f"random-{hashlib.sha256(json.dumps(config.to_dict()).encode()).hexdigest()[:12]}"
    if (target / "config.json").exists():  # written last
        _give_tokenizer(target)
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
    _give_tokenizer(target)
    return target


def _give_tokenizer(directory):
    """The bundled model's, all of whose tokens published vocabularies have room for: a server needs one."""
    for path in MODELS["demo"].glob("*.json"):
        if "token" in path.name and not (directory / path.name).exists():
            shutil.copy(path, directory)


# ---------------------------------------------------------------------- one side, in its own process


def seconds(job):
    """Seconds of ``job()``."""
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


def open_side(side, spec):
    """The model of a side; ``spec`` has ``directory``, ``dtype`` and ``threads``, and ``engine`` for ours."""
    arguments = spec["directory"], spec["dtype"], spec["threads"]
    if side == "ours":
        from paddle_internvl import PaddleInternVL

        return PaddleInternVL(*arguments, spec["engine"], spec.get("weights"), spec.get("activations"))
    from torch_internvl import TorchInternVL

    return TorchInternVL(*arguments)


def report(model, result, matmul):
    """Print one line of JSON: ``result``, the peak of square matrix products of size ``matmul``, and versions."""
    multiply = model.matmul(matmul)
    peak = 2 * matmul**3 / min(seconds(multiply) for _ in range(10))
    print(json.dumps({**result, "peak": peak, "engine": model.engine, "versions": machine.versions(*model.packages)}))


# ---------------------------------------------------------------------- all sides, in turns


def add_arguments(add, save):
    """The flags that every benchmark of two sides has; ``save`` is the end of the file name of its results."""
    import argparse

    add("--repeat", type=int, default=3, help="processes for each side; medians are shown (default %(default)s)")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of each side (default: all cores)")
    bench = HERE.parent / ".venv" / "bench" / "bin" / "python"
    add("--torch-python", default=str(bench) if bench.exists() else sys.executable, metavar="PYTHON",
        help="the Python that has torch and transformers (default: that of `make bench-torch`, or else this one)")  # fmt: skip
    add("--save", action="store_true", help=f"also write benchmarks/results/DATE-{save}.md")
    add("--side", nargs=2, help=argparse.SUPPRESS)


def pythons(options):
    """The Python of each side that can run here."""
    found = {"ours": sys.executable}
    if has_torch(options.torch_python):
        found["torch"] = options.torch_python
    return found


def has_torch(python):
    """Whether a Python has torch and transformers."""
    probe = "import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, ('torch', 'transformers'))))"
    try:
        return subprocess.run([python, "-c", probe], capture_output=True).returncode == 0
    except OSError as error:
        raise UserError(f"--torch-python {python} does not run ({error.strerror}): give the path of a Python") from None


def start_side(script, side, python, spec):
    """Measure a side in a process of its own; return its result, or ``{"error": why there is none}``."""
    return start_command([python, script, "--side", side, json.dumps(spec)], spec["threads"])


def start_command(command, threads):
    """The last line that a command prints, as JSON, or ``{"error": why there is none}``."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "PYTHONPATH": str(HERE.parent),
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return {"error": reason.removeprefix("error: ")}
    return json.loads(done.stdout.splitlines()[-1])


def measure(script, label, sides, spec, repeat, rows):
    """Results of each side by name: the first's, with the medians of ``rows`` over ``repeat`` processes.

    Args:
        script: the benchmark.
        label: what is measured, to be shown meanwhile.
        sides: Python of each side.
        spec: for :func:`start_side`.
        repeat: processes for each side.
        rows: entries of a result that are figures.
    """
    results = {side: [] for side in sides}
    for i in range(repeat):
        for side in list(sides)[:: 1 if i % 2 == 0 else -1]:  # neither is always the first
            print(f"{label} {i + 1}/{repeat} {side}", file=sys.stderr)
            results[side].append(start_side(script, side, sides[side], spec))
    return {
        side: next((run for run in runs if "error" in run), None)
        or {
            **runs[0],
            **{row: statistics.median(run[row] for run in runs) for row in rows if row in runs[0]},
            "peak": max(run["peak"] for run in runs),
        }
        for side, runs in results.items()
    }


# ---------------------------------------------------------------------- the table


def show(value, form=None):
    """A figure with three digits, or in a form of its own; nothing for None."""
    return "" if value is None else format(value, form or (",.0f" if value >= 100 else ".3g"))


def table(rows, merged, figures, limits):
    """A table in Markdown, line by line.

    Args:
        rows: ``{row: (name, whether more is better, limit of the machine or "")}``.
        merged: results of :func:`measure`.
        figures: called with a result, gives ``{row: (figure, FLOPs or bytes a second or None)}``.
        limits: FLOPs or bytes a second of each limit.
    """
    ours, torch = (figures(merged[side]) if "error" not in merged.get(side, ["error"]) else {} for side in ("ours", "torch"))
    yield "| | ours | torch | ratio | limit | ours reaches | torch reaches |"
    yield "|---|---:|---:|---:|---|---:|---:|"
    for row, (name, more_is_better, limit) in rows.items():
        (left, left_rate), (right, right_rate) = (side.get(row, (None, None)) for side in (ours, torch))
        ratio = None if None in (left, right) else left / right if more_is_better else right / left
        shares = [show(rate and rate / limits[limit], ".0%") for rate in (left_rate, right_rate)]
        yield f"| {' | '.join([name, show(left), show(right), show(ratio, '.2f'), limit, *shares])} |"


def heading(title, options, others, measured, results):
    """The lines in front of the tables.

    Args:
        title: of the page.
        options: the parsed flags.
        others: :class:`machine.OtherWork` from before the measurements.
        measured: texts about limits of the machine.
        results: of all sides of all models.
    """
    versions = {"python": sys.version.split()[0]}
    for result in results:
        versions |= result.get("versions", {})
    built = [f"{name} {version}" for name, version in versions.items()]
    yield from (
        f"# {title}",
        "",
        f"- machine: {machine.cpu_name()}, {options.threads} of {os.cpu_count()} cores; "
        f"other programs used {others.cores():.1f} of them meanwhile",
        f"- measured: {', '.join(measured)}",
        f"- versions: {', '.join(built)}; commit {machine.commit()}; {datetime.date.today()}",
        f"- medians of {options.repeat}; a ratio above 1 means that ours is faster or smaller",
    )
    if "torch" not in pythons(options):
        yield f"- ours alone; to compare, install torch and transformers, best apart (--torch-python): {INSTALL}"


def failures(merged):
    """A line for each side that did not run."""
    return [f"Did not run: {side}, because {result['error']}" for side, result in merged.items() if "error" in result]


def publish(lines, name, save):
    """Print the page, and write it to ``results/DATE-NAME.md`` if ``save`` says so."""
    text = "\n".join(lines) + "\n"
    print(text)
    if save:
        target = HERE / "results" / f"{datetime.date.today()}-{name}.md"
        target.parent.mkdir(exist_ok=True)
        target.write_text(text, encoding="utf-8")
        print(f"saved as {target}", file=sys.stderr)
