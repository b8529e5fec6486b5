"""Runs in a child process: all cases of one kind of attack, under limits on memory, with the time that each takes.

Prints a JSON line before each case (so that the parent knows which one hung or crashed) and one after it.
"""

import contextlib
import importlib
import io
import json
import os
import resource
import sys
import time
from pathlib import Path

ROOM = 1 << 30  # address space beyond what importing takes


def outcome(case, folder):
    """What a case ended in: ``("error", class, sentence)`` or ``("answer", text)``."""
    from paddlemix.errors import UserError

    try:
        return ["answer", str(case(folder))]
    except UserError as error:
        return ["error", type(error).__name__, str(error)]
    except SystemExit as error:
        return ["exit", error.code]


def main():
    """Arguments: the module and the name of a function that gives the cases by name, and a folder to work in."""
    module, kind, folder = sys.argv[1:]
    import paddle  # noqa: F401  what importing takes is not the attack's

    cases = getattr(importlib.import_module(module), kind)()
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    size = pages * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + ROOM, size + ROOM))
    for number, (name, case) in enumerate(cases.items()):
        print(json.dumps({"begins": name}), flush=True)
        place = os.path.join(folder, str(number))
        os.makedirs(place)
        before = time.process_time()
        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            result = outcome(case, place)
        seconds = time.process_time() - before
        print(json.dumps({"name": name, "seconds": seconds, "result": result, "said": said.getvalue()}), flush=True)


if __name__ == "__main__":
    main()
