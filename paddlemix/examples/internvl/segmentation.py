"""Segmentation on top of a vision tower, in ADE20K's layout: linear head, UperNet head, or all of it.

  python paddlemix/examples/internvl/segmentation.py --model_name_or_path OpenGVLab/InternViT-6B-224px \\
      --data ADEChallengeData2016 --head linear --classes 150 --out work_dirs/ade20k

--data holds images/training, annotations/training, images/validation and annotations/validation; label 0 does not count.
--head full is UperNet with the tower learning too, --tune_tower makes it learn behind a linear head, as in the published
few-shot runs; --share 16 takes a sixteenth of the training set. The scripts in segmentation/ hold the published settings.
"""

import os
import sys

from paddlemix.errors import ConfigError, command_main
from paddlemix.examples.internvl import cli


@command_main
def main(argv=None):
    """Parse the command line, train the head and test it."""
    parser = cli.make_parser(__doc__)
    parser.add_argument("--data", required=True, metavar="FOLDER", help="pictures and maps of labels in ADE20K's layout")
    cli.add_outputs(parser, "the head and its score")
    parser.add_argument("--head", choices=["linear", "upernet", "full"], default="linear", help="what learns (default: linear)")
    parser.add_argument("--tune_tower", action="store_true", help="the tower learns too, whatever the head")
    parser.add_argument(
        "--blocks", type=int, nargs="+", help="blocks of the tower, from 0, that the head sees (default: the published ones)"
    )
    parser.add_argument("--weight_decay", type=float, help="(default: 0 for a linear head on a frozen tower, else 0.05)")
    parser.add_argument(
        "--layer_decay", type=float, default=1.0, help="learning rate of a block divided by that of the next (default: 1)"
    )
    parser.add_argument("--drop_path_rate", type=float, default=0.0, help="stochastic depth of the last block (default: 0)")
    parser.add_argument("--classes", type=int, default=150, help="kinds of things, without label 0 (default: %(default)s)")
    parser.add_argument("--channels", type=int, default=1536, help="of UperNet (default: %(default)s)")
    parser.add_argument("--crop", type=int, default=None, help="side of a window (default: 504, or the tower's if less)")
    parser.add_argument("--stride", type=int, default=None, help="between windows of a test (default: 322 of 504)")
    parser.add_argument(
        "--scale", type=float, nargs=2, default=(0.5, 2.0), help="least and largest size in training (default: 0.5 2)"
    )
    parser.add_argument("--steps", type=int, default=80_000, help="updates (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=1500, help="updates of warm-up (default: %(default)s)")
    parser.add_argument("--train_batch_size", type=int, default=16, help="windows of an update (default: %(default)s)")
    parser.add_argument("--learning_rate", type=float, default=4e-5, help="peak (default: %(default)s)")
    parser.add_argument("--share", type=int, default=1, help="take every SHARE-th picture for training (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the order, windows and new weights (default: %(default)s)")
    args = parser.parse_args(argv)
    for name in ("classes", "channels", "steps", "train_batch_size", "share"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name} is {getattr(args, name)}: it must be at least 1")

    from paddlemix.training.segmentation import read_pairs

    _run(args, read_pairs(args.data, "training")[:: args.share], read_pairs(args.data, "validation"))


def _run(args, training, validation):
    import numpy as np
    import paddle

    from paddlemix import device
    from paddlemix.evaluation.features import written
    from paddlemix.models.internvl import InternVisionModel
    from paddlemix.models.internvl.heads import SegmentationModel
    from paddlemix.training.arguments import PreTrainingArguments
    from paddlemix.training.objective import BatchObjective
    from paddlemix.training.processes import Processes
    from paddlemix.training.segmentation import evaluate, layer_rates, read_labels, segmentation_loss, training_crop
    from paddlemix.training.trainer import Trainer

    device.set_device(args.device)
    processes = Processes()
    paddle.seed(args.seed)
    tower = InternVisionModel.from_pretrained(args.model_name_or_path, dtype="float32", engine="eager")
    patch = tower.config.patch_size
    size = args.crop or min(504, tower.config.image_size)
    if size % patch:
        raise ConfigError(f"--crop is {size}: it must be a multiple of the tower's patches of {patch} pixels")
    full, depth = args.tune_tower or args.head == "full", tower.config.num_hidden_layers
    if any(not 0 <= block < depth for block in args.blocks or ()):
        raise ConfigError(f"--blocks must be from 0 to {depth - 1}: the tower has {depth} blocks")
    head = "linear" if args.head == "linear" else "upernet"
    if args.blocks and len(args.blocks) != (1 if head == "linear" else 4):
        raise ConfigError("--blocks must be one number for a linear head, and four for UperNet")
    model = SegmentationModel(tower, head, args.classes, args.blocks, full, args.channels)
    for i, layer in enumerate(tower.encoder.layers):
        layer.drop_path = args.drop_path_rate * i / max(depth - 1, 1) if full else 0.0
    if processes.world > 1 and not device.is_cpu():  # Paddle has no kernel for it on CPU
        model = paddle.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    trained = {name: p for name, p in model.named_parameters() if not p.stop_gradient}
    decay = args.weight_decay
    if decay is None:
        decay = 0.0 if head == "linear" and not full else 0.05
    settings = PreTrainingArguments(
        args.out, learning_rate=args.learning_rate, weight_decay=decay, lr_scheduler_type="polynomial", lr_end=0.0,
        warmup_steps=args.warmup, max_grad_norm=0.0, seed=args.seed,
    )  # fmt: skip
    rates = layer_rates(depth, args.layer_decay) if args.layer_decay != 1 else None
    trainer = Trainer(model, trained, settings, processes, args.steps, rates=rates, objective=BatchObjective(segmentation_loss))
    model.train()
    if not full:
        tower.eval()
    mine = max(1, args.train_batch_size // processes.world)
    for step in range(args.steps):
        rng = np.random.default_rng([args.seed, step, processes.rank])
        chosen = [training[i] for i in rng.integers(0, len(training), mine)]
        windows = [training_crop(picture, read_labels(label, args.classes), size, rng, args.scale) for picture, label in chosen]
        batch = {"pixel_values": np.stack([w[0] for w in windows]), "labels": np.stack([w[1] for w in windows])}
        loss, _, _ = trainer.step(step, [{**batch, "names": [picture for picture, _ in chosen]}])
        if processes.is_first and (step + 1) % max(1, args.steps // 20) == 0:
            print(f"step {step + 1} of {args.steps}: loss {loss:.4f}", file=sys.stderr)
    if processes.is_first:
        values = evaluate(model, validation, size, args.stride or max(1, round(size * 322 / 504)), args.classes)
        with written(os.path.join(args.out, "head.npz")) as file:
            np.savez(file, **{name: value.numpy() for name, value in model.head.state_dict().items()})
        if full:
            tower.save_pretrained(os.path.join(args.out, "tower"))
        cli.write_json(os.path.join(args.out, "score.json"), {"scores": values, "head": args.head, "steps": args.steps})
        cli.print_scores(values)
    processes.wait()


if __name__ == "__main__":
    main()
