"""Write features of pictures or texts as arrays.

  paddlemix embed --images photos --out photos.npy
  paddlemix embed --texts captions.txt --out captions.npy --model_name_or_path OpenGVLab/InternVL-14B-224px

OUT.npy holds a row of length 1 for each picture or line, OUT.names.txt what each row is of. Products of rows of both are the
model's scores, before its scale.
"""

import os
import sys

from paddlemix.errors import ConfigError, DataError, command_main
from paddlemix.examples.internvl import cli


@command_main
def main(argv=None):
    """Parse the command line and embed."""
    parser = cli.make_parser(__doc__, "retrieval")
    parser.add_argument("--images", nargs="+", metavar="PATH", help="pictures, or folders of them")
    parser.add_argument("--texts", metavar="FILE", help="text file with a text a line; - for standard input")
    parser.add_argument("--out", required=True, metavar="OUT.npy", help="array to write; names go into OUT.names.txt")
    parser.add_argument("--half", action="store_true", help="write float16 instead of float32")
    parser.set_defaults(model_name_or_path=None)
    args = parser.parse_args(argv)
    if (args.images is None) == (args.texts is None):
        raise ConfigError("name either --images or --texts")
    if not args.out.endswith(".npy"):
        raise ConfigError(f"--out is {args.out}: it must end in .npy")

    import numpy as np

    from paddlemix.datasets.annotations import find_files, read_lines
    from paddlemix.evaluation.features import PictureFeatures, readable, written

    if args.texts is not None:
        names = read_lines(args.texts)
    else:
        names = [name for path in args.images for name in (find_files(path) if os.path.isdir(path) else [path])]
    if not names:
        raise DataError(f"{args.texts} holds no text")
    args.model_name_or_path = args.model_name_or_path or cli.demo_model()
    embedder = cli.load_embedder(args)
    if args.texts is not None:
        features = embedder.texts(names)
    else:
        features = PictureFeatures(names, embedder.read, embedder.encode, embedder.width, args.batch_size)(0, len(names))
        good = readable(features)
        features, names = features[good], [name for name, kept in zip(names, good) if kept]
    with written(args.out) as file:
        np.save(file, features.astype("float16" if args.half else "float32"))
    with written(args.out.removesuffix(".npy") + ".names.txt") as file:
        file.write("".join(" ".join(name.splitlines()) + "\n" for name in names).encode("utf-8", "surrogateescape"))
    print(f"{len(features):,} x {features.shape[1]} written to {args.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
