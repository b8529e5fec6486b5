"""Answer a file of requests, or ask one question about every picture of a folder, without a server.

paddlemix batch requests.jsonl answers.jsonl
    a request a line: OpenAI's {"custom_id", "method", "url", "body"}, or {"id", "image" or "images", "text"}
paddlemix batch answers.jsonl --images photos --text "What is this?" --choices cat dog

Run again after it was ended, it goes on where it was. Exit code 1: a row could not be answered.
"""

import argparse
import hashlib
import os
import sys
import time
from pathlib import Path

from paddlemix.commands import Parser, positive
from paddlemix.errors import PromptError, command_main

from .flags import add_form_flags, add_media_flags, add_model_flags, form_of
from .rows import AnswerFile, line_of, pictures_as_rows, read_rows

_NAMED = 10  # failed rows that the last lines name


def make_parser():
    """The command's flags."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("files", nargs="+", metavar="FILE", help="requests.jsonl answers.jsonl; with --images answers.jsonl alone")
    add("--images", metavar="DIR", help="ask --text about every picture below this folder")
    add("--text", help="the question of --images")
    add("--order", default="input", choices=["input", "finished"], help="of the answers in the end (default: input)")
    add("--temperature", type=float, default=None, help="where a row does not say (default: 0, and 1 in OpenAI's form)")
    add("--max_new_tokens", type=positive, default=None, help="where a row does not say (default: what the context leaves)")
    add("--seed", type=int, default=0, help="of rows without one: with equal seeds answers are equal (default: 0)")
    add_form_flags(parser)
    add("--processes", type=positive, default=None, help="processes, or actors of --ray (default: 1, or one a machine)")
    add("--ray", metavar="ADDRESS", help="answer on a Ray cluster: host:port, auto, or local for one on this machine")
    add_model_flags(parser, max_num_seqs=32)  # nobody waits for a single answer
    add_media_flags(parser, local_path="/")
    return parser


def settle(args):
    """Check the flags; returns (requests or None, answers).

    Raises:
        PromptError: they do not fit together.
    """
    if len(args.files) != (1 if args.images else 2):
        raise PromptError("give requests.jsonl and answers.jsonl, or --images DIR --text QUESTION and answers.jsonl")
    if bool(args.images) != (args.text is not None):
        raise PromptError("--images and --text go together: a folder, and the question about its pictures")
    args.served_model_name = Path(args.model_name_or_path).resolve().name
    *requests, answers = args.files
    if requests and os.path.exists(answers) and os.path.samefile(requests[0], answers):
        raise PromptError(f"{answers} is the file of the requests: name another for the answers")
    return (requests[0] if requests else None), answers


def request_defaults(args):
    """Fields of a request where a row does not say."""
    defaults = {"temperature": args.temperature, "max_completion_tokens": args.max_new_tokens}
    form = form_of(args)
    if form is not None:
        ((kind, value),) = form.items()
        defaults[{"json_schema": "guided_json", "regex": "guided_regex", "choices": "guided_choice"}[kind]] = value
    return {name: value for name, value in defaults.items() if value is not None}


def settings_of(args, digest):
    """What must be alike for answers to belong together."""
    from paddlemix.checkpoints.files import model_digest
    from paddlemix.checkpoints.hub import resolve

    names = "dtype max_num num_segments max_model_len max_images seed load_8bit load_4bit quantize_parts thinking".split()
    names += ["kv_cache_dtype", "activation_dtype"]
    names += ["minimonkey", "no_scm", "tiling"]
    adapters = {name: model_digest(folder) for name, folder in args.lora_modules}
    return {
        "requests": digest,
        "model": model_digest(resolve(args.model_name_or_path)),
        "adapters": adapters,
        "defaults": request_defaults(args),
        **{name: getattr(args, name) for name in names},
    }


def _seeded(row, seed):
    """The row's request; without a seed of its own it gets one that stays the same wherever it is answered."""
    if row.request.get("seed") is not None:
        return row.request
    digest = hashlib.blake2b(f"{seed} {row.key}".encode(), digest_size=7).digest()
    return {**row.request, "seed": int.from_bytes(digest, "big")}


def make_worker(args):
    """What answers requests in a process."""
    from .offline import Offline

    return Offline(args)


def run(args, rows, answers):
    """Answer what is left of ``rows``, a function that gives them, into an :class:`~.rows.AnswerFile`."""
    from tqdm import tqdm

    from paddlemix.crew import answers as answered

    total = sum(1 for _ in rows())
    waiting = {}

    def left():
        for row in rows():
            if row.key in answers.done:
                continue
            if row.error is not None:
                answers.add(row, line_of(row))
                bar.update()
                continue
            waiting[row.number] = row
            yield row.number, _seeded(row, args.seed)

    done = sum(row.key in answers.done for row in rows())
    quiet = not sys.stderr.isatty()
    with tqdm(total=total, initial=done, unit="row", mininterval=10 if quiet else 0.5, file=sys.stderr) as bar:
        room = 2 * args.max_num_seqs
        worker = (make_worker, (args,))
        for number, (status, body) in answered(*worker, left(), room, args.processes, args.ray) if done < total else ():
            row = waiting.pop(number)
            answers.add(row, line_of(row, status, body))
            bar.update()
    return total


@command_main
def main(argv=None):
    """Parse the command line and answer."""
    args = make_parser().parse_args(argv)
    requests, path = settle(args)
    defaults, begun = request_defaults(args), time.monotonic()
    if requests is None:
        digest, rows = pictures_as_rows(args.images, args.text, defaults)
    else:
        digest, rows = read_rows(requests, os.path.dirname(os.path.abspath(requests)), defaults)
    answers = AnswerFile(path, settings_of(args, digest))
    before = len(answers.done)
    try:
        total = run(args, rows, answers)
    except BaseException:
        answers.finish()
        raise
    answers.finish(rows() if args.order == "input" else None)
    seconds, made = time.monotonic() - begun, len(answers.done) - before
    print(f"{total} rows, {len(answers.failed)} failed; {made} now, in {seconds:.1f} s", file=sys.stderr)
    if answers.failed:
        bad = [row for row in rows() if row.key in answers.failed]
        for row in bad[:_NAMED]:
            print(f"row {row.number} ({row.name}) failed: {row.error or 'its line says why'}", file=sys.stderr)
        if len(bad) > _NAMED:
            print(f"and {len(bad) - _NAMED} more", file=sys.stderr)
        sys.stderr.flush()
        _leave(1)
    sys.stderr.flush()
    _leave(0)


def _leave(code):
    sys.stdout.flush()
    os._exit(code)  # threads of the engine have nothing left to say


if __name__ == "__main__":
    main()
