"""How fast, and in how much memory, an index is searched: `python benchmarks/search.py [--rows 1000000] [--queries 1000]`."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))


def write_features(path, rows, width, chosen):
    """Random rows of length 1 in float16, a part at a time; returns those of numbers ``chosen`` as queries."""
    generator = np.random.default_rng(0)
    array = np.lib.format.open_memmap(path, "w+", np.float16, (rows, width))
    for start in range(0, rows, 10_000):
        part = generator.standard_normal([min(10_000, rows - start), width], dtype=np.float32)
        array[start : start + len(part)] = part / np.linalg.norm(part, axis=1, keepdims=True)
    array.flush()
    return np.asarray(array[chosen], "float32")


def search(path, queries):
    """Print (seconds, seconds of processors, peak bytes, numbers of the best rows) of a search in this process."""
    from paddlemix.evaluation.features import open_features
    from paddlemix.search import best

    vectors, wanted = open_features(path), np.load(queries)
    began, worked = time.perf_counter(), time.process_time()
    _, rows = best(vectors, wanted, 10)
    seconds, worked = time.perf_counter() - began, time.process_time() - worked
    # Not ru_maxrss, in which the parent's memory counts.
    lines = Path("/proc/self/status").read_text().splitlines()
    memory = next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))
    print(json.dumps([seconds, worked, memory, rows[:, 0].tolist()]))


def main():
    """Measure and print a row of a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000, help="pictures in the index (default: %(default)s)")
    parser.add_argument("--width", type=int, default=768, help="numbers of a feature (default: %(default)s)")
    parser.add_argument("--queries", type=int, default=1000, help="queries at once (default: %(default)s)")
    parser.add_argument("--repeat", type=int, default=3, help="repetitions, of which the median is told (default: %(default)s)")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)  # what a process of its own does
    args = parser.parse_args()
    if args.child:
        return search(*args.child)
    chosen = np.random.default_rng(1).choice(args.rows, args.queries, replace=False)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "features.npy")
        queries = os.path.join(folder, "queries.npy")
        np.save(queries, write_features(path, args.rows, args.width, chosen))
        found = []
        for _ in range(args.repeat):
            command = [sys.executable, __file__, "--child", path, queries]
            found.append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
        seconds, worked, memory, rows = sorted(found)[len(found) // 2]
        right = int((np.array(rows) == chosen).sum())
    print("| pictures | width | queries | seconds | seconds of processors | peak MB | found themselves |")
    print("|---|---|---|---|---|---|---|")
    print(
        f"| {args.rows:,} | {args.width} | {args.queries} | {seconds:.1f} | {worked:.1f} | {memory / 1e6:.0f} "
        f"| {right} of {args.queries} |"
    )


if __name__ == "__main__":
    main()
