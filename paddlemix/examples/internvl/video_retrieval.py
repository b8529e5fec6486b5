"""Video retrieval without training (MSR-VTT's 1k test): texts find their clips, and clips their texts.

  python paddlemix/examples/internvl/video_retrieval.py --videos msrvtt/videos --annotations msrvtt_test_1k.json \\
      --frames 8 --out work_dirs/msrvtt

Annotations as for retrieval.py, the clip's name in place of the picture's (``video`` for ``image``, too). Scores are given
plain and with dual softmax.
"""

from paddlemix.errors import ConfigError, DataError, command_main
from paddlemix.examples.internvl import cli


@command_main
def main(argv=None):
    """Parse the command line and retrieve."""
    parser = cli.make_parser(__doc__, "retrieval")
    parser.add_argument("--videos", required=True, metavar="FOLDER", help="folder that the names of clips are relative to")
    parser.add_argument("--annotations", required=True, metavar="FILE", help="clips and their captions")
    parser.add_argument(
        "--frames", type=int, default=8, help="frames of a clip, whose features are averaged (default: %(default)s)"
    )
    cli.add_outputs(parser)
    args = parser.parse_args(argv)
    if args.frames < 1:
        raise ConfigError(f"--frames is {args.frames}: it must be at least 1")

    from paddlemix.datasets.annotations import read_captions

    paths, captions, owner = read_captions(args.annotations, args.videos)
    session = cli.Session(args)

    import numpy as np

    from paddlemix.evaluation.clips import ClipFeatures
    from paddlemix.evaluation.gallery import Report
    from paddlemix.evaluation.retrieval import dual_softmax, retrieval_recalls

    features, good = session.features(
        paths,
        args.out,
        ClipFeatures(paths, session.read, session.raw, session.embedder.width, args.frames),
        "clips",
        args.frames,
    )
    if not good.any():
        raise DataError(f"no clip in {args.videos} can be read")
    owner, kept = np.asarray(owner), np.flatnonzero(good)
    mine = good[owner]
    texts = session.texts([caption for caption, keep in zip(captions, mine) if keep])
    owner = (np.cumsum(good) - 1)[owner[mine]]
    scores = np.asarray(features, "float32")[kept] @ texts.T  # [clips, texts]
    values = _named(retrieval_recalls(scores, owner))
    to_clip, to_text = dual_softmax(scores.T)
    values |= _named(
        {
            **{k: v for k, v in retrieval_recalls(to_clip.T, owner).items() if k.startswith("image")},
            **{k: v for k, v in retrieval_recalls(to_text, owner).items() if k.startswith("text")},
        },
        " (dual softmax)",
    )
    values |= {"clips": len(kept), "texts": len(owner), "left out": int((~good).sum())}
    cli.results(args, session, values, Report("Video retrieval"), frames=args.frames, annotations=args.annotations)


def _named(recalls, more=""):
    return {name.replace("image", "video") + more: value for name, value in recalls.items()}


if __name__ == "__main__":
    main()
