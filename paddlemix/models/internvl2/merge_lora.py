"""Add the LoRA adapters of a checkpoint to its weights, without building the model.

python -m paddlemix.models.internvl2.merge_lora SRC DST
"""

import dataclasses
import os

from paddlemix.checkpoints.checkpoint import Checkpoint
from paddlemix.checkpoints.contents import OpenFiles
from paddlemix.checkpoints.hub import resolve
from paddlemix.checkpoints.safetensors_files import OutgoingTensor, write_safetensors
from paddlemix.checkpoints.tensors import convert_dtype
from paddlemix.commands import Parser, own_flags
from paddlemix.errors import CheckpointError, command_main
from paddlemix.models.blocks.adapters import SCALE, adapter_names, is_stacked

from .checkpoint import weight_table
from .configuration import InternVLChatConfig
from .convert import copy_small_files


def merge(source, target, max_shard_size="5GB"):
    """Write the checkpoint ``source``, its adapters merged, to the directory ``target``.

    The weights keep layout and dtype. Memory is needed for the adapters and a block of one tensor.

    Args:
        source: a directory whose ``config.json`` has ``use_llm_lora`` or ``use_backbone_lora`` above 0.
        target: a new or empty directory.
        max_shard_size: largest weight file, such as ``"5GB"``.

    Raises:
        ConfigError, CheckpointError: the source is not a complete checkpoint with adapters, or the target has files in it.
    """
    source = resolve(source)
    if os.path.exists(target) and (not os.path.isdir(target) or os.listdir(target)):
        raise CheckpointError(f"{target} is not an empty directory: give another one to write to")
    config = InternVLChatConfig.from_pretrained(source)
    if not (config.use_llm_lora or config.use_backbone_lora):
        raise CheckpointError(f"{source} has nothing to merge: use_llm_lora and use_backbone_lora in its config.json are 0")
    plain = dataclasses.replace(config, use_llm_lora=0, use_backbone_lora=0)
    checkpoint = Checkpoint(source, config)

    whole = {entry.part.name: entry for entry in checkpoint.sources}  # experts that are stacked are one tensor
    files, adapters = OpenFiles(), {}
    for name, entry in whole.items():
        if ".lora_" in name:
            location = entry.location
            adapters[name] = convert_dtype(files.get(location).read(0, location.shape[0]), location.dtype, "float32")

    def outgoing(entry, name):
        location, (name_a, name_b) = entry.location, adapter_names(entry.part.name)
        left, right = adapters.get(name_b), adapters.get(name_a)
        stacked = is_stacked(entry.part)
        if checkpoint.layout == "paddle" or stacked:
            left, right = right, left

        def rows():
            for start, stop, block in files.get(location).blocks():
                if left is not None:
                    exact = convert_dtype(block, location.dtype, "float32")
                    exact = exact + SCALE * (left[start:stop] @ (right[start:stop] if stacked else right))
                    block = convert_dtype(exact, "float32", location.dtype)
                yield block

        return OutgoingTensor(name, location.dtype, location.shape, rows)

    published = {}
    for wrapped, weight in zip((w for w in weight_table(config) if ".lora_" not in w.name), weight_table(plain)):
        published.update(zip((part.name for part in wrapped.parts), (part.name for part in weight.parts)))
    tensors = [outgoing(entry, published[name]) for name, entry in whole.items() if name in published]
    with files:
        write_safetensors(target, tensors, {"format": "pt" if checkpoint.layout == "torch" else "np"}, max_shard_size)
    copy_small_files(source, target, None)
    plain.save(target)


@command_main
def main(argv=None):
    """The command line."""
    parser = Parser(
        prog="python -m paddlemix.models.internvl2.merge_lora",
        description="Add the LoRA adapters of a checkpoint to its weights, so that every engine reads it.",
    )
    parser.add_argument("source", metavar="SRC", help="checkpoint directory that training with LoRA wrote")
    parser.add_argument("target", metavar="DST", help="directory to write to; is made if it does not exist")
    parser.add_argument("--max_shard_size", default="5GB", metavar="SIZE", help="largest weight file (default: %(default)s)")
    args = parser.parse_args(argv)
    merge(**own_flags(args))
    print(f"written to {args.target}")


if __name__ == "__main__":
    main()
