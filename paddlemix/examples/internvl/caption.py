"""Captions of pictures by InternVL-G.

  python paddlemix/examples/internvl/caption.py --images photos --out work_dirs/captions
  python paddlemix/examples/internvl/caption.py --images coco --annotations coco_karpathy_test.json --out work_dirs/coco

Captions are written to captions.jsonl as they come: an interrupted run goes on behind the last. With --annotations the
references of each picture are written beside them, and CIDEr is computed where the evaluation scorers are installed.
"""

import json
import os
import sys

from paddlemix.errors import ConfigError, ImageError, command_main
from paddlemix.examples.internvl import cli
from paddlemix.files import drop_cut_line


@command_main
def main(argv=None):
    """Parse the command line and describe pictures."""
    parser = cli.make_parser(__doc__, "retrieval")
    parser.add_argument("--images", required=True, metavar="FOLDER", help="pictures, or what their names are relative to")
    parser.add_argument("--annotations", metavar="FILE", help="pictures and reference captions, as for retrieval.py")
    parser.add_argument("--prompt", default="English caption:", help="what a caption goes on from (default: %(default)s)")
    parser.add_argument("--num_beams", type=int, default=5, help="beams of the search (default: %(default)s)")
    parser.add_argument("--min_new_tokens", type=int, default=8, help="shortest caption in tokens (default: %(default)s)")
    parser.add_argument("--max_new_tokens", type=int, default=30, help="longest caption in tokens (default: %(default)s)")
    parser.add_argument(
        "--length_penalty", type=float, default=1.0, help="above 0 favours longer captions (default: %(default)s)"
    )
    cli.add_outputs(parser, "captions and scores")
    args = parser.parse_args(argv)

    from paddlemix.datasets.annotations import find_files, read_captions

    references = {}
    if args.annotations:
        paths, captions, owner = read_captions(args.annotations, args.images)
        for caption, number in zip(captions, owner):
            references.setdefault(paths[number], []).append(caption)
    else:
        paths = find_files(args.images)
    session = cli.Session(args)
    own = f"captions-{session.processes.rank}.jsonl" if session.processes.world > 1 else "captions.jsonl"
    os.makedirs(args.out, exist_ok=True)
    _check_settings(args, session)
    done = _done(args.out)
    todo = [path for path in paths if path not in done][session.processes.rank :: session.processes.world]
    _caption(args, session, todo, os.path.join(args.out, own), references)
    session.processes.wait()
    if session.processes.is_first:
        _finish(args, session, paths, references)


def _settings(args, session):
    names = ("prompt", "num_beams", "min_new_tokens", "max_new_tokens", "length_penalty", "transform")
    return {"digest": session.digest, "image_size": session.size, **{name: getattr(args, name) for name in names}}


def _check_settings(args, session):
    """Captions of other settings must not be mixed with those of these."""
    path, settings = os.path.join(args.out, "run.json"), _settings(args, session)
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            if json.load(file) != settings:
                raise ConfigError(f"{args.out} holds captions of another model or other settings: give another --out")
    session.processes.wait()
    if session.processes.is_first:
        cli.write_json(path, settings)


def _lines(folder):
    for name in sorted(os.listdir(folder)):
        if name.startswith("captions") and name.endswith(".jsonl"):
            with open(os.path.join(folder, name), encoding="utf-8") as file:
                for line in file:
                    if line.endswith("\n"):  # a line that was cut off is done again
                        yield json.loads(line)


def _done(folder):
    return {line["image"] for line in _lines(folder)}


def _caption(args, session, paths, target, references):
    import numpy as np
    from tqdm import tqdm

    prompt = np.array([session.tokenizer.encode_prompt(args.prompt)])
    options = {name: getattr(args, name) for name in ("num_beams", "min_new_tokens", "max_new_tokens", "length_penalty")}
    drop_cut_line(target)
    with open(target, "ab") as file, tqdm(total=len(paths), disable=not session.processes.is_first) as bar:
        for at in range(0, len(paths), args.batch_size):
            pixels, good = [], []
            for path in paths[at : at + args.batch_size]:
                try:
                    pixels.append(session.read(path))
                    good.append(path)
                except ImageError as error:
                    print(f"left out: {error}", file=sys.stderr)
            if good:
                ids = session.model.generate(np.stack(pixels), prompt.repeat(len(good), 0), **options).numpy()
                for path, row in zip(good, ids):
                    line = {"image": path, "caption": session.tokenizer.decode(row)}
                    if path in references:
                        line["references"] = references[path]
                    file.write((json.dumps(line, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass"))
                file.flush()
                os.fsync(file.fileno())
            bar.update(len(paths[at : at + args.batch_size]))


def _finish(args, session, paths, references):
    from paddlemix.evaluation.gallery import Report

    captions = {line["image"]: line["caption"] for line in _lines(args.out)}
    told = [path for path in paths if path in captions]
    report = Report("Captions")
    report.pictures([(path, captions[path], None) for path in told[:100]])
    scores = {"pictures": len(told), "left out": len(paths) - len(told)}
    scores |= _cider(captions, references) if references else {}
    settings = {name: value for name, value in _settings(args, session).items() if name not in ("digest", "image_size")}
    cli.results(args, session, scores, report, **settings)


def _cider(captions, references):
    try:
        from paddlemix.evaluation.scorers import cider
    except ImportError:
        return {}
    names = [name for name in captions if name in references]
    return {"CIDEr": float(cider([captions[n] for n in names], [references[n] for n in names]))}


if __name__ == "__main__":
    main()
