"""How fast, and in how much memory, an index is searched: `python benchmarks/search.py [--rows 1000000] [--queries 1000]`."""

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))


def write_features(path, rows, width):
    """Random rows of length 1 in float16, a part at a time."""
    generator = np.random.default_rng(0)
    array = np.lib.format.open_memmap(path, "w+", np.float16, (rows, width))
    for start in range(0, rows, 10_000):
        part = generator.standard_normal([min(10_000, rows - start), width], dtype=np.float32)
        array[start : start + len(part)] = part / np.linalg.norm(part, axis=1, keepdims=True)
    array.flush()


def search(path, queries):
    """In a process of its own, whose peak memory is this search's: (seconds, peak bytes, right rows)."""
    from paddlemix.evaluation.features import open_features
    from paddlemix.search import best

    vectors = open_features(path)
    chosen = np.random.default_rng(1).choice(len(vectors), queries, replace=False)
    wanted = np.stack([np.asarray(vectors[row], "float32") for row in chosen])
    began = time.perf_counter()
    _, rows = best(vectors, wanted, 10)
    seconds = time.perf_counter() - began
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, int((rows[:, 0] == chosen).sum())


def main():
    """Measure and print a row of a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000, help="pictures in the index (default: %(default)s)")
    parser.add_argument("--width", type=int, default=768, help="numbers of a feature (default: %(default)s)")
    parser.add_argument("--queries", type=int, default=1000, help="queries at once (default: %(default)s)")
    parser.add_argument("--repeat", type=int, default=3, help="repetitions, of which the median is told (default: %(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "features.npy")
        write_features(path, args.rows, args.width)
        found = []
        for _ in range(args.repeat):
            reader, writer = os.pipe()
            child = os.fork()
            if not child:
                os.write(writer, json.dumps(search(path, args.queries)).encode())
                os._exit(0)
            os.close(writer)
            found.append(json.loads(os.read(reader, 1000)))
            os.waitpid(child, 0)
        seconds, memory, right = sorted(found)[len(found) // 2]
    print("| pictures | width | queries | seconds | peak MB | found themselves |\n|---|---|---|---|---|---|")
    print(f"| {args.rows:,} | {args.width} | {args.queries} | {seconds:.1f} | {memory / 1e6:.0f} | {right} of {args.queries} |")


if __name__ == "__main__":
    main()
