"""How fast an annotation file of pretraining is indexed, opened and read: `python benchmarks/lines.py [--rows 10000000]`."""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

ROW = (
    '{"image": "coyo/%08d.jpg", "conversations": '
    '[{"from": "human", "value": "<image>\\nDescribe."}, {"from": "gpt", "value": "%s"}]}\n'
)
READS = 20_000


def write_rows(path, rows):
    """An annotation file of ``rows`` captions of several lengths."""
    texts = ["a cat on a sofa " * count for count in range(1, 9)]
    with open(path, "w", encoding="utf-8") as file:
        for start in range(0, rows, 100_000):
            file.writelines(ROW % (i, texts[i % 8]) for i in range(start, min(rows, start + 100_000)))


def resident():
    """Memory of this process in MB: all of it, and what no file backs."""
    with open("/proc/self/status", encoding="ascii") as file:
        values = dict(line.split()[:2] for line in file if line.startswith(("VmRSS", "RssAnon")))
    return int(values["VmRSS:"]) / 1e3, int(values["RssAnon:"]) / 1e3


def child(path):
    """In a process of its own: open (or build) the index, then read rows at random."""
    import random

    from paddlemix.datasets.lines import LineIndex

    began = time.perf_counter()
    index = LineIndex(path)
    opened = time.perf_counter() - began
    began = time.perf_counter()
    for _ in range(READS):
        place = random.randrange(len(index))
        if b"coyo/%08d.jpg" % place not in index.read(place):
            raise SystemExit(f"row {place} is another")
    each = (time.perf_counter() - began) / READS
    print(opened, each * 1e6, *resident())


def main():
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000_000, help="rows of the file (default: %(default)s)")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args.child)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "rows.jsonl")
        write_rows(path, args.rows)
        size = os.path.getsize(path) / 1e6
        print("| | seconds | MB/s | µs a row read at random | MB of the process | of these not mapped |")
        print("| --- | --: | --: | --: | --: | --: |")
        for name in ("built", "opened"):
            done = subprocess.run([sys.executable, __file__, "--child", path], check=True, capture_output=True, text=True)
            seconds, each, memory, own = map(float, done.stdout.split())
            print(f"| {name} | {seconds:.3f} | {size / seconds:,.0f} | {each:.0f} | {memory:.0f} | {own:.0f} |")
        print(f"\n{args.rows:,} rows, {size:,.0f} MB; the index has {os.path.getsize(path + '.index') / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
