"""Convert a checkpoint between the layouts of PyTorch and Paddle, or to another dtype, without building the model.

python -m paddlemix.models.internvl2.convert SRC DST --layout paddle
python -m paddlemix.models.internvl2.convert SRC DST --layout hf        what transformers reads without the original's code
"""

import json
import os
import shutil

from tqdm import tqdm

from paddlemix.checkpoints.checkpoint import LAYOUTS, Checkpoint, convert_checkpoint
from paddlemix.checkpoints.files import INDEX_FILES
from paddlemix.checkpoints.hub import resolve
from paddlemix.checkpoints.mxfp4 import without_mark
from paddlemix.checkpoints.packed import METHOD, bits_of
from paddlemix.checkpoints.safetensors_files import parse_size
from paddlemix.checkpoints.saving import convert_quantised
from paddlemix.checkpoints.tensors import ARRAY_DTYPES, DTYPES
from paddlemix.commands import Parser, own_flags
from paddlemix.errors import CheckpointError, command_main
from paddlemix.files import read_json
from paddlemix.quantised import BITS
from paddlemix.tokenizers import load_tokenizer

from . import hf
from .configuration import InternVLChatConfig

# Configuration, tokenizer, generation settings, and the original's code, which other engines may want beside config.json.
_COPIED_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".py", ".md")


def convert(
    source, target, layout=None, dtype=None, max_shard_size="5GB", overwrite=False, weight_dtype=None, quantize_parts=None
):
    """Write the checkpoint ``source`` to the directory ``target`` as safetensors, with all the small files beside it.

    Args:
        source: a directory, or a name such as ``OpenGVLab/InternVL2-1B``; its layout and file format are found out.
        target: a new or empty directory, unless ``overwrite``.
        layout: ``torch``, ``paddle``, or ``hf`` for what transformers reads without the original's code.
        dtype: ``float32``, ``bfloat16`` or ``float16``; None keeps each tensor's.
        max_shard_size: largest weight file, such as ``"5GB"``.
        overwrite: write into a directory that has something in it.
        weight_dtype: ``int8`` or ``int4`` to write weights in few bits, as :mod:`paddlemix.checkpoints.packed` says.
        quantize_parts: which, as for ``from_pretrained``.

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
    config = InternVLChatConfig.from_pretrained(source)
    if layout == "hf":
        hf.check_writable(config)
    checkpoint = Checkpoint(source, config)
    if weight_dtype is not None:
        _convert_to_few_bits(checkpoint, target, layout, dtype, max_shard_size, weight_dtype, quantize_parts)
        return
    if checkpoint.packed:
        raise CheckpointError(f"{source} is a quantised checkpoint, which cannot be converted: take the original one")
    count = sum(checkpoint.dtypes.values())
    print(f"{source}: {checkpoint.layout} layout, {', '.join(checkpoint.dtypes)}, {count / 1e6:,.1f} million values")
    total = sum(n * ARRAY_DTYPES[dtype or stored].itemsize for stored, n in checkpoint.dtypes.items())
    with tqdm(total=total, unit="B", unit_scale=True, desc=f"to {layout} layout") as bar:
        convert_checkpoint(checkpoint, target, layout, max_shard_size, dtype, progress=bar.update)
    try:
        copy_small_files(source, target, dtype)
        if layout == "hf" and checkpoint.layout != "hf":
            _to_hf(source, target, config)
        elif layout != "hf" and checkpoint.layout == "hf":
            _from_hf(source, target, config)
    except OSError as error:
        raise CheckpointError(f"{error.filename} cannot be copied: {error.strerror}") from None


def _convert_to_few_bits(checkpoint, target, layout, dtype, max_shard_size, weight_dtype, parts):
    from paddlemix.models.blocks.quantising import check_choice, rounded  # needs Paddle

    bits, parts = check_choice(weight_dtype, parts)
    if layout not in (None, "torch") or checkpoint.layout == "hf":
        raise CheckpointError("--weight_dtype writes --layout torch, and not from transformers' layout: convert to torch first")
    chosen = bits_of(checkpoint.config.weight_table(), bits, parts)
    convert_quantised(checkpoint, target, chosen, rounded, max_shard_size, dtype)
    try:
        copy_small_files(checkpoint.directory, target, dtype)
        path = os.path.join(target, "config.json")
        said = {"quant_method": METHOD, "weight_dtype": weight_dtype, "parts": list(parts), "version": 1}
        _write(path, read_json(path) | {"quantization_config": said})
    except OSError as error:
        raise CheckpointError(f"{error.filename} cannot be copied: {error.strerror}") from None


def _to_hf(source, target, config):
    """Put what transformers wants in place of the original's small files, or beside them."""
    tokenizer = load_tokenizer(source)
    values = hf.hf_config(config, without_mark(read_json(os.path.join(source, "config.json"))), tokenizer)
    written = read_json(os.path.join(target, "config.json"))
    values["dtype"] = written.get("torch_dtype", values["dtype"])
    files = {"config.json": values, **hf.processor_files(config, tokenizer)}
    path = os.path.join(target, "tokenizer_config.json")
    own = read_json(path) if os.path.exists(path) else {}
    names = {**hf.TOKEN_NAMES, "extra_special_tokens": hf.TOKEN_NAMES, "processor_class": "InternVLProcessor"}
    kind = own.get("tokenizer_class")
    if kind in hf.TOKENIZERS:  # transformers has no class of that name
        names["tokenizer_class"], names[hf.TOKENIZER_CLASS] = hf.TOKENIZERS[kind], kind
        names["legacy"] = False  # as the original: no space of its own where text follows a special token
        own.pop("auto_map", None)
    files["tokenizer_config.json"] = own | names
    replaced = {}
    for name in files.keys() - {"config.json"}:
        if os.path.exists(os.path.join(target, name)):
            with open(os.path.join(target, name), encoding="utf-8") as file:
                replaced[name] = file.read()
    values[hf.KEPT_FILES] = replaced
    for name, value in files.items():
        _write(os.path.join(target, name), value)
    for name in os.listdir(target):
        if name.endswith(".py"):
            os.remove(os.path.join(target, name))  # the original's code, of which nothing is left to run


def _from_hf(source, target, config):
    """The way back: the original's configuration, and none of what belongs to transformers' processor."""
    values = read_json(os.path.join(source, "config.json"))
    kept, files = values.get(hf.KEPT), values.get(hf.KEPT_FILES)
    kept = {**kept} if isinstance(kept, dict) else config.to_dict()
    kept["torch_dtype"] = read_json(os.path.join(target, "config.json")).get("torch_dtype", kept.get("torch_dtype", "bfloat16"))
    _write(os.path.join(target, "config.json"), kept)
    for name in hf.processor_files(config, load_tokenizer(source)):
        if os.path.exists(os.path.join(target, name)):
            os.remove(os.path.join(target, name))
    if isinstance(files, dict):
        names = {*hf.processor_files(config, load_tokenizer(source)), "tokenizer_config.json"}
        for name, text in files.items():
            if name in names and isinstance(text, str):
                _write(os.path.join(target, name), text)
        return
    path = os.path.join(target, "tokenizer_config.json")
    if os.path.exists(path):
        own = read_json(path)
        kind = own.pop(hf.TOKENIZER_CLASS, None)
        added = {*hf.TOKEN_NAMES, "extra_special_tokens", "processor_class", *(["legacy"] if kind else [])}
        own = {k: v for k, v in own.items() if k not in added}
        _write(path, own | ({"tokenizer_class": kind} if kind else {}))


def _write(path, value):
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, indent=2) + "\n"
    with open(path + ".tmp", "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(path + ".tmp", path)


def copy_small_files(source, target, dtype):
    """Copy what a checkpoint has beside its weights, and let ``config.json`` say ``dtype`` unless that is None."""
    for name in sorted(os.listdir(source)):
        path = os.path.join(source, name)
        if name.endswith(_COPIED_SUFFIXES) and name not in INDEX_FILES and os.path.isfile(path):
            shutil.copyfile(path, os.path.join(target, name))
    path = os.path.join(target, "config.json")
    given = read_json(path)
    config = without_mark(given)  # what was MXFP4 is written unpacked
    if dtype is not None:
        # Engines that load in the dtype that the configuration names would undo the conversion.
        parts = (config.get(name) for name in ("llm_config", "text_config", "vision_config"))
        for part in (config, *filter(None, parts)):
            if "torch_dtype" in part or part is config:
                part["torch_dtype"] = dtype
    if dtype is not None or config != given:
        _write(path, config)


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
        default=None,
        help="torch: what the original and other engines read; hf: transformers' own; paddle: linear weights transposed, "
        "as in the Paddle port",
    )
    parser.add_argument("--dtype", choices=DTYPES, default=None, help="convert the values too (default: keep them as they are)")
    parser.add_argument(
        "--max_shard_size", default="5GB", metavar="SIZE", help="largest weight file, e.g. 500MB or 5GB (default: %(default)s)"
    )
    parser.add_argument("--weight_dtype", choices=BITS, default=None, help="write weights in few bits, which our engine maps")
    parser.add_argument(
        "--quantize_parts", metavar="PARTS", help="with it: of language, projector, vision (default: language,projector)"
    )
    parser.add_argument("--overwrite", action="store_true", help="write into DST even if it is not empty")
    args = parser.parse_args(argv)
    if args.layout is None and args.weight_dtype is None:
        parser.error("the following arguments are required: --layout, or --weight_dtype")
    convert(**own_flags(args))
    print(f"written to {args.target}")


if __name__ == "__main__":
    main()
