"""What the commands of InternVL-C and -G share: flags, loading, features of pictures and texts. Quick to import."""

import argparse
import json
import os
import sys
from pathlib import Path

from paddlemix.commands import Parser


def make_parser(description, default_task="classification"):
    """A parser with the flags that choose the model and how pictures become features."""
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model_name_or_path",
        default="OpenGVLab/InternVL-14B-224px",
        help="a checkpoint directory, or a name (default: %(default)s)",
    )
    model.add_argument("--device", default="auto", help="auto, cpu, gpu, npu or another Paddle device (default: auto)")
    model.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16", "float16"],
        help="dtype of weights and arithmetic (default: auto, the best that the device has)",
    )
    model.add_argument(
        "--engine",
        default="auto",
        choices=["auto", "eager", "inference"],
        help="eager: plain Paddle; inference: fused CPU kernels (default: auto)",
    )
    model.add_argument(
        "--mode",
        default="InternVL-C",
        choices=["InternVL-C", "InternVL-G"],
        help="how pictures become features (default: %(default)s)",
    )
    model.add_argument("--image_size", type=int, default=None, help="side of a picture in pixels (default: the model's)")
    model.add_argument(
        "--transform",
        default=default_task,
        choices=["classification", "retrieval"],
        help="classification: resize the shorter side, cut out the centre; retrieval: squeeze (default: %(default)s)",
    )
    model.add_argument("--batch_size", type=int, default=16, help="pictures at once (default: %(default)s)")
    return parser


def add_outputs(parser, what="scores, report and features"):
    """The flag that names the folder of results."""
    parser.add_argument(
        "--out", required=True, metavar="FOLDER", help=f"folder for {what}; an interrupted run goes on from there"
    )


def load_embedder(args):
    """The model that the flags name, on the device that they name."""
    from paddlemix import device
    from paddlemix.models.internvl.embedder import Embedder

    device.set_device(args.device)
    return Embedder(
        args.model_name_or_path, args.dtype, args.engine, args.mode, args.transform, args.image_size, args.batch_size
    )


def demo_model():
    """Directory of the bundled model, for searching in drawn scenes."""
    import paddlemix

    return str(Path(paddlemix.__file__).parent / "demo_retrieval")


def save_picture(picture, path):
    """Write a picture, whole or not at all; the name's end says the format.

    Raises:
        ConfigError: the end is no picture format.
    """
    from PIL import Image

    from paddlemix.errors import ConfigError
    from paddlemix.evaluation.features import written

    kind = Image.registered_extensions().get(Path(path).suffix.lower())
    if kind not in Image.SAVE:
        raise ConfigError(f"{path}: '{Path(path).suffix}' is no picture format: use a name that ends in .png")
    with written(str(path)) as file:
        picture.save(file, kind)


class Session:
    """A loaded model, and the processes that share the work."""

    def __init__(self, args):
        self.embedder = load_embedder(args)

        from paddlemix.evaluation.features import model_digest
        from paddlemix.training.processes import Processes

        self.args, self.processes = args, Processes()
        self.model, self.tokenizer = self.embedder.model, self.embedder.tokenizer
        self.read, self.raw, self.texts = self.embedder.read, self.embedder.raw, self.embedder.texts
        self.size, self.digest = self.embedder.image_size, model_digest(self.embedder.directory)

    def how(self):
        """What decides the features of a picture."""
        return [self.digest, self.args.mode, self.args.transform, self.size, self.args.dtype]

    def features(self, paths, folder, function=None, *more):
        """Features of pictures, kept below ``folder``: (mapped array, whether each could be read)."""
        from tqdm import tqdm

        from paddlemix.evaluation.features import PictureFeatures, compute_features, digest, files_digest, readable

        name = os.path.join(folder, "features", digest(self.how(), files_digest(paths), *more))
        function = function or PictureFeatures(
            paths, self.read, self.embedder.encode, self.embedder.width, self.args.batch_size
        )
        with tqdm(total=-(-len(paths) // self.processes.world), unit="picture", disable=not self.processes.is_first) as bar:
            array = compute_features(name, len(paths), function, self.processes, progress=bar.update)
        good = readable(array)
        if self.processes.is_first and not good.all():
            print(f"{(~good).sum()} of {len(good)} pictures could not be read and do not count", file=sys.stderr)
        return array, good


def write_json(path, values):
    """Write ``values`` as JSON, whole or not at all."""
    from paddlemix.evaluation.features import written

    with written(str(path)) as file:
        file.write((json.dumps(values, ensure_ascii=False, indent=2) + "\n").encode("utf-8"))


def print_scores(scores):
    """A table of scores, in percent where they are shares."""
    width = max(len(name) for name in scores)
    for name, value in scores.items():
        print(f"{name:{width}}  {100 * value:6.2f}" if isinstance(value, float) else f"{name:{width}}  {value}")


def results(args, session, scores, report, **settings):
    """Print the scores, and write ``score.json`` and ``report.html`` into the folder of results."""
    if not session.processes.is_first:
        return
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    how = {
        "model": args.model_name_or_path,
        "digest": session.digest,
        "mode": args.mode,
        "image_size": session.size,
        **settings,
    }
    write_json(folder / "score.json", {"scores": scores, **how})
    report.write(folder / "report.html", scores, how)
    print_scores(scores)
    print(f"written to {folder / 'score.json'} and {folder / 'report.html'}")
