"""Search in a folder of drawn scenes, offline, with the bundled retrieval model.

  python paddlemix/examples/internvl/demo/run.py
  python paddlemix/examples/internvl/demo/run.py --query "a blue circle in the middle" --query "a green star"

draws a folder of scenes, builds an index of it, and looks for scenes by words and by a picture: the same as
``paddlemix search`` on your own pictures, for which the bundled model is of no use (it knows twenty shapes in nine places).
"""

import argparse
import sys
from pathlib import Path

from paddlemix.commands import Parser
from paddlemix.errors import command_main
from paddlemix.examples.internvl.demo.train import write_scenes


@command_main
def main(argv=None):
    """Parse the command line, draw, and search."""
    from paddlemix.examples.internvl import search

    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="work_dirs/demo_search", help="default: %(default)s")
    parser.add_argument("--device", default="cpu", help="cpu, gpu, npu or another Paddle device (default: %(default)s)")
    parser.add_argument("--count", type=int, default=200, help="scenes to draw (default: %(default)s)")
    parser.add_argument("--query", action="append", metavar="TEXT", help="what to look for (default: two of the captions)")
    args = parser.parse_args(argv)
    output = Path(args.output_dir)
    _, captions = write_scenes(output / "pictures", args.count, "search")
    queries = args.query or sorted(set(captions), key=len)[:2]
    index, device = str(output / "index"), ["--device", args.device]
    search.main(["--index", str(output / "pictures"), "--out", index, *device])
    like = str(output / "pictures" / "00000.png")
    search.main([index, *device, *(word for query in queries for word in ("--query", query)), "--image", like, "--top", "5"])
    print(f"the same on your pictures: paddlemix search --index FOLDER --out INDEX (as here: {index})", file=sys.stderr)


if __name__ == "__main__":
    main()
