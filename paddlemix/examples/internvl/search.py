"""Find pictures by words or by a picture.

  paddlemix search --index photos --out photos.index
      builds an index of all pictures below a folder, or brings one up to date
  paddlemix search photos.index --query "two dogs on grass" --query "a red star"
  paddlemix search photos.index --image like_this.jpg --top 20 --sheet found.png

The best matches are printed, and shown side by side in a contact sheet.
"""

import sys
from pathlib import Path

from paddlemix.errors import ConfigError, command_main
from paddlemix.examples.internvl import cli


@command_main
def main(argv=None):
    """Parse the command line, and build or search."""
    parser = cli.make_parser(__doc__, "retrieval")
    parser.add_argument("where", nargs="?", metavar="INDEX", help="the index to search in")
    parser.add_argument("--index", metavar="FOLDER", help="build an index of the pictures in this folder")
    parser.add_argument("--out", metavar="INDEX", help="with --index: folder of the index (default: FOLDER.index)")
    parser.add_argument("--query", action="append", default=[], metavar="TEXT", help="what to look for; may be repeated")
    parser.add_argument(
        "--image", action="append", default=[], metavar="FILE", help="a picture to find the like of; repeatable"
    )
    parser.add_argument("--top", type=int, default=10, help="matches of each query (default: %(default)s)")
    parser.add_argument(
        "--sheet", metavar="FILE", help="contact sheet to write (default: matches.png in the index; - for none)"
    )
    parser.add_argument("--exact", action="store_true", help="look at every picture even where FAISS could spare it")
    parser.set_defaults(model_name_or_path=None)
    args = parser.parse_args(argv)

    if args.index is None and args.where is None:
        raise ConfigError("name an index to search in, or build one with --index FOLDER")
    if args.where is not None and args.index is not None:
        raise ConfigError("--index FOLDER builds an index: name what to search in without it")
    if args.top < 1:
        raise ConfigError(f"--top is {args.top}: it must be at least 1")
    if args.index is not None:
        _build(args)
    if args.where is not None or args.query or args.image:
        _search(args)


def _target(args):
    return args.where or args.out or args.index.rstrip("/") + ".index"


def _build(args):
    from tqdm import tqdm

    from paddlemix.search import build_index
    from paddlemix.training.processes import Processes

    args.model_name_or_path = args.model_name_or_path or cli.demo_model()
    embedder, processes = cli.load_embedder(args), Processes()
    with tqdm(unit="picture", disable=not processes.is_first) as bar:
        index = build_index(embedder, args.index, _target(args), processes, bar.update)
    if processes.is_first:
        print(f"{len(index):,} pictures of {args.index} are in {_target(args)}")


def _search(args):
    from paddlemix.evaluation.gallery import contact_sheet
    from paddlemix.search import Index

    if not args.query and not args.image:
        raise ConfigError('nothing to look for: add --query "…" or --image FILE')
    index = Index(_target(args))
    args.model_name_or_path = args.model_name_or_path or index.meta["model"]
    args.mode, args.transform, args.image_size = (index.meta[name] for name in ("mode", "transform", "image_size"))
    embedder = cli.load_embedder(args)
    index.check(embedder)

    import numpy as np

    scores, rows = index.search(np.concatenate([embedder.texts(args.query), embedder.images(args.image)]), args.top, args.exact)
    shown = []
    for number, asked in enumerate([*args.query, *args.image]):
        print(asked)
        for score, row in zip(scores[number], rows[number]):
            if row >= 0:
                print(f"  {score:.3f}  {index.path(row)}")
                shown.append((index.path(row), f"{score:.3f} {Path(index.path(row)).name}"))
    if args.sheet != "-":
        target = Path(args.sheet or Path(_target(args)) / "matches.png")
        cli.save_picture(contact_sheet(shown, min(args.top, 5), heading=" | ".join([*args.query, *args.image])), target)
        print(f"matches side by side: {target}", file=sys.stderr)


if __name__ == "__main__":
    main()
