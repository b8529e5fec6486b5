"""Retrieval without training: texts find their pictures, and pictures one of their texts.

  python paddlemix/examples/internvl/retrieval.py --images flickr30k/Images --annotations flickr30k_test_karpathy.txt \\
      --mode InternVL-G --out work_dirs/flickr30k
  python paddlemix/examples/internvl/retrieval.py --images coco --annotations test_1kcaptions_ko.txt \\
      --names test_image_names.txt --out work_dirs/xtd_ko

Annotations: lines ``name,caption`` behind the header ``image,caption``; lines ``name#n<tab>caption``; JSON or JSON lines of
image and caption; COCO's own; or a caption a line with --names. Scores are computed in blocks, so a million pictures need no
more memory than a thousand.
"""

from paddlemix.errors import DataError, command_main
from paddlemix.examples.internvl import cli


@command_main
def main(argv=None):
    """Parse the command line and retrieve."""
    parser = cli.make_parser(__doc__, "retrieval")
    parser.add_argument("--images", required=True, metavar="FOLDER", help="folder that the names of pictures are relative to")
    parser.add_argument("--annotations", required=True, metavar="FILE", help="pictures and their captions")
    parser.add_argument("--names", metavar="FILE", help="a picture's name a line, where annotations are captions alone (XTD)")
    cli.add_outputs(parser)
    args = parser.parse_args(argv)

    from paddlemix.datasets.annotations import read_captions

    paths, captions, owner = read_captions(args.annotations, args.images, args.names)
    session = cli.Session(args)
    features, good = session.features(paths, args.out)
    texts = _text_features(session, args, captions)

    import numpy as np

    from paddlemix.evaluation.retrieval import feature_recalls

    owner = np.asarray(owner)
    if not good.any():
        raise DataError(f"no picture of {args.annotations} can be read in {args.images}")
    if not good.all():  # a picture that cannot be read takes its texts with it
        kept, number = np.flatnonzero(good), np.cumsum(good) - 1
        mine = good[owner]
        features, texts, owner = features[kept], texts[mine], number[owner[mine]]
        paths, captions = [paths[i] for i in kept], [caption for caption, keep in zip(captions, mine) if keep]
    if session.processes.is_first:
        values = feature_recalls(features, texts, owner)
        values |= {"pictures": len(paths), "texts": len(captions), "left out": int((~good).sum())}
        cli.results(args, session, values, _report(features, texts, owner, paths, captions), annotations=args.annotations)


def _text_features(session, args, captions):
    """Features of captions, kept on disk as those of pictures are."""
    import os

    from paddlemix.evaluation.features import compute_features, digest

    name = os.path.join(args.out, "features", digest(session.digest, args.dtype, captions))
    return compute_features(name, len(captions), lambda a, b: session.texts(captions[a:b]), session.processes)


def _report(features, texts, owner, paths, captions):
    import numpy as np

    from paddlemix.evaluation.gallery import Report

    report = Report("Retrieval")
    report.heading("Nearest pictures of some texts")
    chosen = np.random.default_rng(0).permutation(len(captions))[:10]
    for text in sorted(chosen):
        scores = np.concatenate(
            [np.asarray(features[at : at + 65536], "float32") @ texts[text] for at in range(0, len(paths), 65536)]
        )
        best = np.argsort(-scores, kind="stable")[:5]
        report.table((captions[text],), [])
        report.pictures([(paths[i], f"{scores[i]:.3f}", bool(i == owner[text])) for i in best])
    return report


if __name__ == "__main__":
    main()
