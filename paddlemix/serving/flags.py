"""Flags that commands share: the model, its memory, where pictures may come from, and forms of answers. Quick to import."""

import argparse
from pathlib import Path

from paddlemix.commands import add_tensor_parallel, add_weight_flags, positive

DEMO_MODEL = Path(__file__).parents[1] / "demo_model"


def add_model_flags(parser, max_num_seqs=16):
    """Which model, how it is computed, and how much memory it has; ``max_num_seqs`` is the default of that flag."""
    add = parser.add_argument
    add("--model_name_or_path", default=str(DEMO_MODEL), help="a checkpoint, or a name of one (default: the demo model)")
    add("--device", default="auto", help="auto, or a Paddle device (default: auto)")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"], help="(default: auto)")
    add("--engine", default="auto", choices=["auto", "eager", "inference"], help="as of the chat command (default: auto)")
    add_tensor_parallel(parser)
    add_weight_flags(parser)
    add("--lora_modules", nargs="+", default=[], type=_module, metavar="NAME=DIR", help="adapters, as further model names")
    help_of_seqs = f"answers made at once (default: {max_num_seqs})"
    add("--max_num_seqs", type=positive, default=max_num_seqs, help=help_of_seqs)
    add("--max_model_len", type=positive, default=None, help="longest prompt and answer (default: the model's context)")
    add("--kv_cache_gb", type=float, default=None, help="memory for keys and values (default: up to a quarter of what is free)")
    add("--image_cache_mb", type=int, default=64, help="memory for features of pictures (default: 64)")
    add("--max_images", type=int, default=16, help="most pictures and clips in a request (default: 16)")
    add("--num_segments", type=positive, default=8, help="frames of a clip (default: 8)")
    add("--thinking", action="store_true", help="let InternVL3.5 think before it answers, where a request does not say")
    add("--minimonkey", action="store_true", help="look at one picture at two scales, as Mini-Monkey (default: if it is one)")
    add("--no_scm", action="store_true", help="of Mini-Monkey: keep all tokens (default: drop half of the finer scale's)")
    add("--tiling", choices=["chat", "training"], default="chat", help="of Mini-Monkey: rule of the tiles (default: chat)")
    add(
        "--embedding_mode",
        choices=["InternVL-C", "InternVL-G"],
        default="InternVL-C",
        help="of models of embeddings (default: InternVL-C)",
    )
    add("--max_num", type=positive, default=None, help="most tiles of a picture (default: the checkpoint's own)")


def add_media_flags(parser, local_path=None):
    """Where pictures and clips may come from."""
    add = parser.add_argument
    add("--allowed_media_domains", nargs="+", default=[], help="hosts that pictures are fetched from (default: none)")
    add("--allow_private_media", action="store_true", help="also where these have private addresses")
    add(
        "--allowed_local_media_path", default=local_path,
        help=f"folder that file: urls may name files of (default: {local_path or 'none'})",
    )  # fmt: skip
    add("--media_timeout", type=float, default=10, help="seconds that fetching may take (default: 10)")
    add("--max_media_mb", type=float, default=32, help="largest picture or clip (default: 32)")


def add_form_flags(group):
    """Flags that give answers a form (needs the extra ``serving``); :func:`form_of` reads them."""
    form = group.add_mutually_exclusive_group()
    form.add_argument("--json_schema", metavar="FILE", help="answer in JSON that follows the schema in this file")
    form.add_argument("--choices", nargs="+", metavar="TEXT", help="answer with one of these")
    form.add_argument("--regex", metavar="PATTERN", help="answer with text that this regular expression matches whole")


def form_of(args):
    """The form that the flags of :func:`add_form_flags` ask for, as generation configurations take it, or None.

    Raises:
        ConfigError: the file of the schema cannot be read.
    """
    if args.json_schema is not None:
        from paddlemix.files import read_json

        return {"json_schema": read_json(args.json_schema, most=1 << 20, absent="give the file of a JSON schema")}
    if args.choices is not None:
        return {"choices": list(args.choices)}
    return None if args.regex is None else {"regex": args.regex}


def _module(text):
    name, equals, folder = text.partition("=")
    if not (name and equals and folder):
        raise argparse.ArgumentTypeError(f"'{text}' must be NAME=DIR")
    return name, folder
