"""Linear and attention-pooling probes of a frozen vision tower, on folders of class folders (ImageNet).

  python paddlemix/examples/internvl/linear_probe.py --model_name_or_path OpenGVLab/InternViT-6B-224px \\
      --data imagenet/train --val imagenet/val --out work_dirs/probe --augment

--val takes several test sets, such as ImageNet-V2, -A, -R and -Sketch: a set with some of the class folders alone is scored
among these. Without --augment the tower's features are computed once and kept in the folder of results; with it, a random part
of each picture goes through the tower in every epoch, as published. The scripts in classification/ hold the published settings.
"""

import os
import sys

from paddlemix.errors import ConfigError, DataError, command_main
from paddlemix.examples.internvl import cli


@command_main
def main(argv=None):
    """Parse the command line, train the probe and test it."""
    parser = cli.make_parser(__doc__)
    parser.add_argument("--data", required=True, metavar="FOLDER", help="training set: a folder of pictures for each class")
    parser.add_argument(
        "--val", required=True, nargs="+", metavar="FOLDER", help="test sets, whose class folders the training set has too"
    )
    cli.add_outputs(parser, "the probe, its score and features")
    parser.add_argument("--probe", choices=["linear", "attention"], default="linear", help="kind of probe (default: linear)")
    parser.add_argument("--epochs", type=int, default=10, help="passes over the data (default: %(default)s)")
    parser.add_argument("--train_batch_size", type=int, default=512, help="pictures of a step (default: %(default)s)")
    parser.add_argument(
        "--learning_rate", type=float, default=0.1, help="for 512 pictures a step; scaled (default: %(default)s)"
    )
    parser.add_argument("--augment", action="store_true", help="random parts of pictures, flipped or not")
    parser.add_argument("--seed", type=int, default=0, help="of the order, the parts and new weights (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.epochs < 1 or args.train_batch_size < 2 or args.batch_size < 1:
        raise ConfigError("--epochs must be at least 1, --batch_size too, and --train_batch_size at least 2")

    from paddlemix.datasets.annotations import read_classes

    sets = [read_classes(folder) for folder in (args.data, *args.val)]
    for folder, (_, _, classes) in zip(args.val, sets[1:]):
        if not set(classes) <= set(sets[0][2]):
            raise DataError(f"{folder} has class folders that {args.data} has not: {', '.join(set(classes) - set(sets[0][2]))}")
    _run(args, sets)


def _run(args, sets):
    import numpy as np
    import paddle

    from paddlemix import device
    from paddlemix.evaluation.features import PictureFeatures, compute_features, digest, files_digest, model_digest, written
    from paddlemix.evaluation.zero_shot import accuracy
    from paddlemix.models.internvl import InternVisionModel, transform
    from paddlemix.models.internvl.heads import AttentionProbe, LinearProbe, probe_features
    from paddlemix.processors.transforms import augmented
    from paddlemix.training.probe import train_probe
    from paddlemix.training.processes import Processes

    device.set_device(args.device)
    from paddlemix.checkpoints import resolve

    directory = resolve(args.model_name_or_path)
    tower = InternVisionModel.from_pretrained(directory, dtype=args.dtype, engine="eager")
    size, width = args.image_size or tower.config.image_size, tower.config.hidden_size
    tokens = 1 + (size // tower.config.patch_size) ** 2
    shape = [-1, 2 * width] if args.probe == "linear" else [-1, tokens, width]

    @paddle.no_grad()
    def encode(pixels):
        output = tower(paddle.to_tensor(pixels))
        found = probe_features(output) if args.probe == "linear" else output.last_hidden_state
        return found.astype("float32").numpy().reshape([len(pixels), -1])

    def features(paths, read, *more):
        name = os.path.join(args.out, "features", digest(model_digest(directory), args.probe, size, files_digest(paths), *more))
        function = PictureFeatures(paths, read, encode, int(np.prod(shape[1:])), args.batch_size)
        return compute_features(name, len(paths), function, Processes())

    def plain(path):
        return transform(path, "classification", size)

    train, train_labels, classes = sets[0]

    def epoch(number):
        if not args.augment:
            return features(train, plain)
        rng = np.random.default_rng([args.seed, number])
        return PictureFeatures(train, lambda p: augmented(p, size, rng), encode, int(np.prod(shape[1:])), args.batch_size, 1)(
            0, len(train)
        )

    paddle.seed(args.seed)
    kind = {"linear": LinearProbe, "attention": AttentionProbe}[args.probe]
    probe = kind(shape[-1], len(classes))
    rate = args.learning_rate * args.train_batch_size / 512
    train_probe(probe, epoch, np.array(train_labels), shape, args.epochs, args.train_batch_size, rate, args.seed)
    found = {}
    for folder, (val, val_labels, own) in zip(args.val, sets[1:]):
        rows = features(val, plain)
        good = np.isfinite(np.asarray(rows[:, 0]))
        scores = probe(paddle.to_tensor(np.asarray(rows[good], "float32").reshape(shape))).numpy()
        columns = [classes.index(name) for name in own]
        found[folder] = accuracy(scores[:, columns], np.array(val_labels)[good]) | {"left out": int((~good).sum())}
    with written(os.path.join(args.out, "probe.npz")) as file:
        np.savez(file, **{name: value.numpy() for name, value in probe.state_dict().items()})
    first = next(iter(found.values()))
    cli.write_json(os.path.join(args.out, "score.json"), {"scores": first, "classes": classes, "sets": found})
    for folder, values in found.items():
        print(folder)
        cli.print_scores(values)
    print(f"written to {args.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
