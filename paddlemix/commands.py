"""The console command ``paddlemix``: one table of its subcommands, each of which is the same code as its script.

A new command is an entry of :data:`COMMANDS`. Nothing of a command is imported before it is asked for. Where argcomplete is
installed, ``eval "$(register-python-argcomplete paddlemix)"`` completes commands and their flags.
"""

import argparse
import importlib
import os
import sys
from typing import NamedTuple


class Command(NamedTuple):
    """Where a subcommand is: its module, which has ``main()`` and reads ``sys.argv``; what it does; the extra it needs."""

    module: str
    help: str
    extra: str | None = None


COMMANDS = {
    "Use a model": {
        "chat": Command("paddlemix.examples.internvl2.chat_demo", "ask about pictures"),
        "minimonkey": Command("paddlemix.examples.minimonkey.chat_demo_minimonkey", "ask Mini-Monkey about a document"),
        "video": Command("paddlemix.examples.internvl2.chat_demo_video", "ask about a video"),
        "serve": Command("paddlemix.serving.__main__", "an OpenAI-compatible server", "serving"),
        "cluster": Command("paddlemix.serving.cluster.__main__", "the server on several accelerators or machines", "cluster"),
        "batch": Command("paddlemix.serving.batch", "answer a file of requests, or ask about a folder of pictures", "serving"),
        "client": Command("paddlemix.serving.cli", "ask a server from the terminal", "serving"),
        "web": Command("paddlemix.serving.web.__main__", "a web page that asks a server", "web"),
        "search": Command("paddlemix.examples.internvl.search", "find pictures by words or by a picture"),
        "embed": Command("paddlemix.examples.internvl.embed", "features of pictures or texts as arrays"),
        "caption": Command("paddlemix.examples.internvl.caption", "describe pictures (InternVL-G)"),
    },
    "Train": {
        "finetune": Command("paddlemix.examples.internvl2.internvl_chat_finetune", "fine-tune on your data; --devices N"),
        "finetune-retrieval": Command("paddlemix.examples.internvl.finetune_retrieval", "fine-tune InternVL for retrieval"),
        "pretrain": Command("paddlemix.examples.internvl2.internvl_chat_pretrain", "pretrain on data sets of any size"),
        "mpo": Command("paddlemix.examples.internvl2.internvl_chat_mpo", "train on pairs of a chosen and a rejected answer"),
        "probe": Command("paddlemix.examples.internvl.linear_probe", "what a frozen vision tower tells of classes"),
        "segment": Command("paddlemix.examples.internvl.segmentation", "segmentation on top of a vision tower"),
        "check-data": Command("paddlemix.datasets.internvl2.check", "check training data before hours are spent on it"),
        "build-pairs": Command("paddlemix.datasets.preference.build", "make pairs for mpo of a model's own answers"),
        "plan": Command("paddlemix.training.plan", "how much memory a fine-tuning run takes"),
    },
    "Measure": {
        "evaluate": Command("paddlemix.examples.internvl2.evaluate", "score a model on the benchmarks of the original", "eval"),
        "score": Command("paddlemix.examples.internvl2.score", "score answers again without a model", "eval"),
        "compare": Command("paddlemix.examples.internvl2.compare", "where two runs of a benchmark differ", "eval"),
        "zero-shot": Command("paddlemix.examples.internvl.zero_shot_classification", "classify pictures by class names"),
        "retrieval": Command("paddlemix.examples.internvl.retrieval", "how well texts and pictures find each other"),
        "video-retrieval": Command("paddlemix.examples.internvl.video_retrieval", "how well texts and clips find each other"),
    },
    "Weights": {
        "convert": Command("paddlemix.models.internvl2.convert", "write a checkpoint in another layout or dtype"),
        "cache": Command("paddlemix.checkpoints.cache", "see and clear the cache of weights that were rounded to few bits"),
        "merge-lora": Command("paddlemix.models.internvl2.merge_lora", "add LoRA adapters to the weights they belong to"),
    },
    "This machine": {
        "doctor": Command("paddlemix.doctor.report", "what runs here, what does not, and what to install"),
    },
}

_running = None  # the program's name in a command's help, when it was started from here


def _count(text):
    if not text.isdigit() or not 0 < int(text) <= 4096:
        raise argparse.ArgumentTypeError(f"'{text}' must be a number from 1 to 4096")
    return int(text)


def positive(text):
    """A whole number above 0, as a flag's type."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' must be a number above 0")
    return int(text)


def _cores(text):
    found = set()
    for part in text.split(","):
        first, dash, last = part.partition("-")
        ends = [first, last] if dash else [first, first]
        if not all(end.isascii() and end.isdigit() and len(end) < 6 for end in ends) or int(ends[0]) > int(ends[1]):
            raise argparse.ArgumentTypeError(f"'{text}' must be cores such as 0-7 or 0,2")
        found |= set(range(int(ends[0]), int(ends[1]) + 1))
    return found


class Parser(argparse.ArgumentParser):
    """A parser that takes ``--max-num`` for ``--max_num`` and the other way, and knows under which name it was started."""

    def __init__(self, *args, **kwargs):
        if _running is not None:
            kwargs["prog"] = _running
        super().__init__(*args, **kwargs)
        machine = self.add_argument_group("this machine")
        machine.add_argument("--threads", type=_count, default=0, help="threads of CPU kernels (default: one for each core)")
        machine.add_argument("--cpus", type=_cores, default=None, help="cores to run on, such as 0-7 or 0,2 (default: all)")

    def parse_args(self, args=None, namespace=None):
        _complete(self)
        found = super().parse_args(args, namespace)
        if found.cpus:
            try:
                os.sched_setaffinity(0, found.cpus)
            except (OSError, AttributeError):  # AttributeError: not on this system
                self.error("--cpus: this process cannot run on such cores: name others, such as 0-3 or 0,2")
        if found.threads:  # read by the kernels, here and in processes that are started from here
            os.environ["PADDLEMIX_THREADS"] = os.environ["OMP_NUM_THREADS"] = str(found.threads)
        return found

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else list(args)
        args = [_as_utf8(argument) for argument in args]
        return super().parse_known_args([self._known_spelling(argument) for argument in args], namespace)

    def _known_spelling(self, argument):
        flag, equals, value = argument.partition("=")
        if not flag.startswith("--") or flag in self._option_string_actions:
            return argument
        for spelling in (flag[2:].replace("-", "_"), flag[2:].replace("_", "-")):
            if f"--{spelling}" in self._option_string_actions:
                return f"--{spelling}{equals}{value}"
        return argument


def add_weight_flags(parser):
    """Flags that ask for weights in fewer bits; :func:`weight_options` reads them."""
    bits = parser.add_mutually_exclusive_group()
    bits.add_argument("--load_8bit", "--load_in_8bit", action="store_true", help="hold weights in 8 bits, a quarter of float32")
    bits.add_argument("--load_4bit", "--load_in_4bit", action="store_true", help="hold weights in 4 bits, embeddings in 8")
    parser.add_argument(
        "--quantize_parts", default=None, metavar="PARTS",
        help="which weights: language, projector and vision, with commas between (default: language,projector)",
    )  # fmt: skip
    parser.add_argument(
        "--kv_cache_dtype", default="auto", choices=["auto", "int8"],
        help="keys and values of earlier tokens: int8 takes a third of their memory in float32, on CPU (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--activation_dtype", default="auto", choices=["auto", "int8"],
        help="what meets weights in 8 or 4 bits: int8 rounds activations too, which is faster, on CPU (default: %(default)s)",
    )  # fmt: skip


def weight_options(args):
    """The arguments of ``from_pretrained`` that the flags of :func:`add_weight_flags` stand for."""
    weight_dtype = "int8" if args.load_8bit else "int4" if args.load_4bit else None
    more = {name: getattr(args, name) for name in ("kv_cache_dtype", "activation_dtype") if getattr(args, name) != "auto"}
    return {"weight_dtype": weight_dtype, "quantize_parts": args.quantize_parts, **more}


def _ranks(text):
    if text == "auto":
        return text
    if not text.isdecimal() or not 1 <= int(text[:5]) <= 4096:
        raise argparse.ArgumentTypeError(f"'{text}' must be a number of devices, or auto")
    return int(text)


def add_tensor_parallel(group):
    """The flag that divides a model over devices."""
    group.add_argument(
        "--tensor_parallel",
        type=_ranks,
        default=1,
        metavar="N|auto",
        help="divide every layer over N devices, or as many as the weights need; the command starts its processes itself "
        "(default: 1)",
    )


def own_flags(args):
    """The values of a command's own flags, without those that every command has."""
    return {name: value for name, value in vars(args).items() if name not in ("threads", "cpus")}


def _as_utf8(argument):
    """An argument that a locale without UTF-8 (``LC_ALL=C``) took byte by byte, as the UTF-8 that was typed.

    A file's name stays as it is: only so does such a locale find it.
    """
    try:
        if os.path.lexists(argument):
            return argument
        return argument.encode(errors="surrogateescape").decode()
    except (ValueError, TypeError, AttributeError):  # other encodings, null characters, what is no text
        return argument


def contents():
    """The help of the top level, as a table of contents."""
    width = max(len(name) for group in COMMANDS.values() for name in group)
    lines = ["usage: paddlemix COMMAND [FLAG ...]", "", "Run, fine-tune and convert InternVL models in PaddlePaddle."]
    for title, group in COMMANDS.items():
        lines += ["", f"{title}:"]
        for name, command in group.items():
            extra = f" (needs pip install 'paddlemix[{command.extra}]')" if command.extra else ""
            lines.append(f"  {name.ljust(width)}  {command.help}{extra}")
    return "\n".join([*lines, "", "paddlemix COMMAND --help tells the flags of a command; paddlemix --version the version."])


def _complete(parser):
    """Where a shell asks what a word could go on with, answer from ``parser`` and end the process."""
    if "_ARGCOMPLETE" in os.environ:
        import argcomplete  # is here, since its own script asks

        argcomplete.autocomplete(parser)


def _complete_contents():
    """Answer a shell that asks about the first word; for later ones, put the command in the place of the program."""
    line = os.environ["COMP_LINE"][: int(os.environ.get("COMP_POINT") or len(os.environ["COMP_LINE"]))]
    words = f"{line}|".split()  # the cursor, so that a blank before it ends a word
    if len(words) > 2:
        os.environ["_ARGCOMPLETE"] = str(int(os.environ["_ARGCOMPLETE"]) + 1)
        return words[1:2]
    parser = argparse.ArgumentParser(prog="paddlemix")
    parser.add_argument("command", choices=[name for group in COMMANDS.values() for name in group])
    return _complete(parser)


def main(argv=None):
    """Run the subcommand that ``argv``, by default the command line, names."""
    global _running
    argv = sys.argv[1:] if argv is None else list(argv)
    if "_ARGCOMPLETE" in os.environ:
        argv = _complete_contents()
    if not argv or argv[0] in ("-h", "--help", "help"):
        from paddlemix.errors import command_main

        return command_main(print)(contents())
    if argv[0] == "--version":
        from paddlemix import __version__

        print(__version__)
        return None
    known = {name: command for group in COMMANDS.values() for name, command in group.items()}
    name = argv[0].replace("_", "-")
    if name not in known:
        print(f"error: '{argv[0]}' is no command: use one of {', '.join(known)}", file=sys.stderr)
        raise SystemExit(2)
    _running = f"paddlemix {name}"
    sys.argv = [_running, *argv[1:]]
    return _run(known[name])


def _run(command):
    try:
        return importlib.import_module(command.module).main()
    except ModuleNotFoundError as error:
        from paddlemix.extras import missing

        raise SystemExit(f"error: {missing(error, command.extra)}") from None


if __name__ == "__main__":
    main()
