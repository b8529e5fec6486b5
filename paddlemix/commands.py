"""The console command ``paddlemix``: one table of its subcommands, each of which is the same code as its script.

A new command is an entry of :data:`COMMANDS`. Nothing of a command is imported before it is asked for.
"""

import argparse
import importlib
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
        "video": Command("paddlemix.examples.internvl2.chat_demo_video", "ask about a video"),
        "search": Command("paddlemix.examples.internvl.search", "find pictures by words or by a picture"),
        "embed": Command("paddlemix.examples.internvl.embed", "features of pictures or texts as arrays"),
        "caption": Command("paddlemix.examples.internvl.caption", "describe pictures (InternVL-G)"),
    },
    "Train": {
        "finetune": Command("paddlemix.examples.internvl2.internvl_chat_finetune", "fine-tune on your data; --devices N"),
        "check-data": Command("paddlemix.datasets.internvl2.check", "check training data before hours are spent on it"),
        "plan": Command("paddlemix.training.plan", "how much memory a fine-tuning run takes"),
    },
    "Measure": {
        "zero-shot": Command("paddlemix.examples.internvl.zero_shot_classification", "classify pictures by class names"),
        "retrieval": Command("paddlemix.examples.internvl.retrieval", "how well texts and pictures find each other"),
        "video-retrieval": Command("paddlemix.examples.internvl.video_retrieval", "how well texts and clips find each other"),
    },
    "Weights": {
        "convert": Command("paddlemix.models.internvl2.convert", "write a checkpoint in another layout or dtype"),
        "merge-lora": Command("paddlemix.models.internvl2.merge_lora", "add LoRA adapters to the weights they belong to"),
    },
    "This machine": {
        "doctor": Command("paddlemix.doctor.report", "what runs here, what does not, and what to install"),
    },
}

_running = None  # the program's name in a command's help, when it was started from here


class Parser(argparse.ArgumentParser):
    """A parser that takes ``--max-num`` for ``--max_num`` and the other way, and knows under which name it was started."""

    def __init__(self, *args, **kwargs):
        if _running is not None:
            kwargs["prog"] = _running
        super().__init__(*args, **kwargs)

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else list(args)
        return super().parse_known_args([self._known_spelling(argument) for argument in args], namespace)

    def _known_spelling(self, argument):
        flag, equals, value = argument.partition("=")
        if not flag.startswith("--") or flag in self._option_string_actions:
            return argument
        for spelling in (flag[2:].replace("-", "_"), flag[2:].replace("_", "-")):
            if f"--{spelling}" in self._option_string_actions:
                return f"--{spelling}{equals}{value}"
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


def main(argv=None):
    """Run the subcommand that ``argv``, by default the command line, names."""
    global _running
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(contents())
        return None
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
    try:
        module = importlib.import_module(known[name].module)
    except ModuleNotFoundError as error:
        raise SystemExit(missing(error, known[name].extra)) from None
    return module.main()


def missing(error, extra):
    """What to install, in one sentence, when a module was not found.

    Raises:
        ModuleNotFoundError: it is one of this package's own, which installing mends nothing about.
    """
    package = (error.name or "").split(".")[0]
    if package == __package__:
        raise error
    if package == "paddle":
        return "error: PaddlePaddle is not installed: pip install 'paddlemix[cpu]', or see paddlemix doctor for GPU and NPU"
    wanted = f"paddlemix[{extra}]" if extra else package
    return f"error: {package} is not installed, which this command needs: pip install '{wanted}'"


if __name__ == "__main__":
    main()
