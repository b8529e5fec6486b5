"""Convert a checkpoint between the layouts of PyTorch and Paddle, or to another dtype, without building the model.

python -m paddlemix.models.internvl2.convert SRC DST --layout paddle
"""

import json
import os
import shutil

from tqdm import tqdm

from paddlemix.checkpoints.checkpoint import LAYOUTS, Checkpoint, convert_checkpoint
from paddlemix.checkpoints.files import INDEX_FILES
from paddlemix.checkpoints.hub import resolve
from paddlemix.checkpoints.safetensors_files import parse_size
from paddlemix.checkpoints.tensors import ARRAY_DTYPES, DTYPES
from paddlemix.commands import Parser
from paddlemix.errors import CheckpointError, command_main

from .configuration import InternVLChatConfig

# Configuration, tokenizer, generation settings, and the original's code, which other engines may want beside config.json.
_COPIED_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".py", ".md")


def convert(source, target, layout, dtype=None, max_shard_size="5GB", overwrite=False):
    """Write the checkpoint ``source`` to the directory ``target`` as safetensors, with all the small files beside it.

    Args:
        source: a directory, or a name such as ``OpenGVLab/InternVL2-1B``; its layout and file format are found out.
        target: a new or empty directory, unless ``overwrite``.
        layout: ``torch`` or ``paddle``.
        dtype: ``float32``, ``bfloat16`` or ``float16``; None keeps each tensor's.
        max_shard_size: largest weight file, such as ``"5GB"``.
        overwrite: write into a directory that has something in it.

    Raises:
        ConfigError, CheckpointError: the source is not a complete checkpoint, or the target cannot be used.
    """
    max_shard_size = parse_size(max_shard_size)
    source = resolve(source)
    if os.path.exists(target) and not os.path.isdir(target):
        raise CheckpointError(f"{target} is a file: give a directory to write to")
    if os.path.isdir(target):
        if os.path.samefile(source, target):
            raise CheckpointError(f"{target} is the source itself: give another directory to write to")
        if os.listdir(target) and not overwrite:
            raise CheckpointError(f"{target} is not empty: give another directory, or add --overwrite")
    checkpoint = Checkpoint(source, InternVLChatConfig.from_pretrained(source))
    count = sum(checkpoint.dtypes.values())
    print(f"{source}: {checkpoint.layout} layout, {', '.join(checkpoint.dtypes)}, {count / 1e6:,.1f} million values")
    total = sum(n * ARRAY_DTYPES[dtype or stored].itemsize for stored, n in checkpoint.dtypes.items())
    with tqdm(total=total, unit="B", unit_scale=True, desc=f"to {layout} layout") as bar:
        convert_checkpoint(checkpoint, target, layout, max_shard_size, dtype, progress=bar.update)
    try:
        copy_small_files(source, target, dtype)
    except OSError as error:
        raise CheckpointError(f"{error.filename} cannot be copied: {error.strerror}") from None


def copy_small_files(source, target, dtype):
    """Copy what a checkpoint has beside its weights, and let ``config.json`` say ``dtype`` unless that is None."""
    for name in sorted(os.listdir(source)):
        path = os.path.join(source, name)
        if name.endswith(_COPIED_SUFFIXES) and name not in INDEX_FILES and os.path.isfile(path):
            shutil.copyfile(path, os.path.join(target, name))
    if dtype is None:
        return
    path = os.path.join(target, "config.json")
    with open(path, encoding="utf-8") as file:
        config = json.load(file)
    # Engines that load in the dtype that the configuration names would undo the conversion.
    for part in (config, config["llm_config"], config["vision_config"]):
        if "torch_dtype" in part or part is config:
            part["torch_dtype"] = dtype
    with open(path, "w", encoding="utf-8") as file:
        json.dump(config, file, ensure_ascii=False, indent=2)
        file.write("\n")


@command_main
def main(argv=None):
    """The command line."""
    parser = Parser(
        prog="python -m paddlemix.models.internvl2.convert",
        description="Convert an InternVL checkpoint to safetensors in the layout of PyTorch or of Paddle. Memory for one "
        "tensor is enough, whatever the model's size; neither Paddle nor PyTorch is needed.",
    )
    parser.add_argument("source", metavar="SRC", help="checkpoint directory, or a name such as OpenGVLab/InternVL2-1B")
    parser.add_argument("target", metavar="DST", help="directory to write to")
    parser.add_argument(
        "--layout",
        choices=LAYOUTS,
        required=True,
        help="torch: what the original and other engines read; paddle: linear weights transposed, as in the Paddle port",
    )
    parser.add_argument("--dtype", choices=DTYPES, default=None, help="convert the values too (default: keep them as they are)")
    parser.add_argument(
        "--max_shard_size", default="5GB", metavar="SIZE", help="largest weight file, e.g. 500MB or 5GB (default: %(default)s)"
    )
    parser.add_argument("--overwrite", action="store_true", help="write into DST even if it is not empty")
    args = parser.parse_args(argv)
    convert(**vars(args))
    print(f"written to {args.target}")


if __name__ == "__main__":
    main()
