"""Zero-shot classification: pictures in folders of classes, class names and templates as texts.

  python paddlemix/examples/internvl/zero_shot_classification.py --data imagenet/val --out work_dirs/imagenet \\
      --classnames imagenet_classnames.json#en --templates imagenet_templates.json#en
  python paddlemix/examples/internvl/zero_shot_classification.py --data kinetics400/val --video --frames 8 --out work_dirs/k400

Class names are a JSON list in the order of the sorted class folders; without one, the folders' own names are used. With
``python -m paddle.distributed.launch`` before it, several processes share the work.
"""

from paddlemix.errors import ConfigError, DataError, command_main
from paddlemix.examples.internvl import cli


@command_main
def main(argv=None):
    """Parse the command line and classify."""
    parser = cli.make_parser(__doc__)
    parser.add_argument("--data", required=True, metavar="FOLDER", help="folder with a folder of pictures for each class")
    cli.add_outputs(parser)
    parser.add_argument("--classnames", metavar="FILE[#NAME]", help="JSON list of class names, or a list of that name in it")
    parser.add_argument(
        "--templates", metavar="FILE[#NAME]", help="JSON list of templates with {c} (default: four English ones)"
    )
    parser.add_argument("--video", action="store_true", help="the folders hold clips")
    parser.add_argument("--frames", type=int, default=8, help="with --video: frames of a clip, whose features are averaged")
    args = parser.parse_args(argv)

    from paddlemix.datasets.annotations import CLIPS, PICTURES, read_classes
    from paddlemix.evaluation.zero_shot import TEMPLATES, accuracy, read_names, zero_shot_weights

    if args.frames < 1:
        raise ConfigError(f"--frames is {args.frames}: it must be at least 1")
    paths, labels, folders = read_classes(args.data, CLIPS if args.video else PICTURES)
    classes = read_names(args.classnames, "class names") if args.classnames else [name.replace("_", " ") for name in folders]
    if len(classes) != len(folders):
        raise DataError(f"{args.classnames} has {len(classes)} class names, but {args.data} {len(folders)} folders")
    templates = read_names(args.templates, "templates") if args.templates else TEMPLATES
    session = cli.Session(args)
    weights = zero_shot_weights(session.model, session.tokenizer, classes, templates)
    if args.video:
        from paddlemix.evaluation.clips import ClipFeatures

        clips = ClipFeatures(paths, session.read, session.raw, session.embedder.width, args.frames)
        features, good = session.features(paths, args.out, clips, "clips", args.frames)
    else:
        features, good = session.features(paths, args.out)
    _report(args, session, features, good, labels, paths, classes, weights, accuracy, len(templates))


def _report(args, session, features, good, labels, paths, classes, weights, accuracy, templates):
    import numpy as np

    from paddlemix.evaluation.gallery import Report

    kept = np.flatnonzero(good)
    if not len(kept):
        raise DataError(f"nothing in {args.data} can be read")
    labels = np.asarray(labels)[kept]
    scores = 100 * np.asarray(features, "float32")[kept] @ weights
    values = accuracy(scores, labels)
    report = Report("Zero-shot classification")
    found = scores.argmax(1)
    pairs, counts = np.unique(np.stack([labels, found], 1)[labels != found], axis=0, return_counts=True)
    report.heading("What is taken for what")
    order = np.argsort(-counts, kind="stable")[:30]
    report.table(
        ("class", "taken for", "pictures"), [(classes[pairs[i][0]], classes[pairs[i][1]], int(counts[i])) for i in order]
    )
    shown = np.random.default_rng(0).permutation(len(kept))
    if not args.video:
        for title, right in (("Some that are wrong", False), ("Some that are right", True)):
            report.heading(title)
            some = [i for i in shown if (found[i] == labels[i]) == right][:20]
            report.pictures([(paths[kept[i]], f"{classes[labels[i]]}: {classes[found[i]]}", right) for i in some])
    values |= {"pictures": len(kept), "left out": int((~good).sum())}
    cli.results(args, session, values, report, classes=len(classes), templates=templates, data=args.data)


if __name__ == "__main__":
    main()
