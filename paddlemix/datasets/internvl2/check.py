"""Read everything that a meta file names before hours are spent on training with it.

  python -m paddlemix.datasets.internvl2.check META.json --model_name_or_path OpenGVLab/InternVL2-1B --max_seq_length 4096

decodes every picture and video and encodes every conversation as training would. Each record that cannot be used is one line,
``file:line: reason``; then the exit code is 1. What is likely a mistake, such as boxes that are not in thousandths, records
that repeat or answers that are all equal, is a warning with its count and three examples a data set. The report folder gets all
problems (problems.jsonl), the counts and the warnings (report.json) and a picture of how long the samples are (lengths.png).
With ``--pairs`` the records are pairs for preference training; answers.png shows how long the chosen and the rejected ones are.
Use the values that you will train with.
"""

import argparse
import dataclasses
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

import paddlemix
from paddlemix.checkpoints.hub import resolve
from paddlemix.commands import Parser
from paddlemix.datasets import doubts as doubtful
from paddlemix.datasets.doubts import Doubts, look_at
from paddlemix.datasets.encoding import DataOptions, SampleEncoder
from paddlemix.datasets.preference import PreferenceEncoder, answered, parse_preference
from paddlemix.datasets.records import read_meta
from paddlemix.errors import ConfigError, UserError, command_main
from paddlemix.models.blocks.conversation import IGNORE_INDEX
from paddlemix.models.internvl2 import InternVLChatConfig, load_tokenizer

DEMO_MODEL = Path(paddlemix.__file__).parent / "demo_model"


@dataclass
class Finding:
    """What checking one record found: ``kind`` is picture, pictures, video, text or, where that is unknown, broken."""

    kind: str = "broken"
    tokens: int = 0
    tiles: int = 0
    cut: bool = False
    reason: str | None = None
    doubts: Doubts | None = None
    answers: tuple = ()  # tokens of the chosen and of the rejected answer of a pair


def check_record(source, index, encoder):
    """Read a record and all it refers to; returns a :class:`Finding`. Tokens are counted before anything is cut off."""
    found = Finding()
    try:
        record = source.read(index)
        found.kind = "video" if record.video else ("text", "picture", "pictures")[min(2, len(record.images))]
        found.doubts = look_at(record)  # what is known if a picture cannot be opened
        bound = encoder.tile_bound(record, source.max_dynamic_patch)
        sizes = [picture.size for picture in encoder.open_pictures(record, 0)]
        if record.images:
            found.doubts = look_at(record, sizes)
        tiles = [encoder.count_tiles(size, bound, record) for size in sizes]
        found.tiles = sum(tiles)
        sides = [record] if encoder.answers == 1 else [answered(record, chosen) for chosen in (True, False)]
        for side in sides:
            ids, labels = encoder.encode_whole_text(side, tiles)
            found.tokens += len(ids)
            found.answers += (sum(label != IGNORE_INDEX for label in labels),)
            kept, _ = encoder.fit(side, ids, labels)
            found.cut = found.cut or len(kept) < len(ids)
    except UserError as error:
        found.reason = str(error)
    return found


def summarize(source, findings):
    """Counts and statistics of a source, as in ``report.json``; lengths are those of records that can be used."""
    good = [found for found in findings if found.reason is None]
    kinds = [found.kind for found in findings]
    summary = {
        "annotation": str(source.annotation),
        "records": len(findings),
        "samples_per_epoch": len(source),
        "stated_length": source.length,
        **{kind: kinds.count(kind) for kind in ("picture", "pictures", "video", "text")},
        "bad": len(findings) - len(good),
        "cut_to_max_seq_length": sum(found.cut for found in good),
    }
    found = [finding.doubts for finding in findings]
    for name in ("turned", "transparent"):
        summary[name] = sum(getattr(doubts, name) for doubts in found if doubts is not None)
    summary["warnings"] = doubtful.summarize(found, source.line)
    pairs = [found.answers for found in good if len(found.answers) == 2]
    if pairs:
        means = np.mean(pairs, axis=0)
        summary["answer_tokens"] = {"chosen": round(float(means[0]), 1), "rejected": round(float(means[1]), 1)}
    for name in ("tokens", "tiles"):
        values = np.array([getattr(found, name) for found in good] or [0])
        mean, p95, most = float(values.mean()), float(np.percentile(values, 95)), int(values.max())
        summary[name] = {"mean": round(mean, 1), "p95": round(p95), "max": most, "sum": int(values.sum())}
    return summary


def draw_lengths(findings, max_seq_length, path):
    """Draw how tokens and tiles are distributed over the usable among ``findings``, as a PNG."""
    from matplotlib.figure import Figure  # slow to import, and needed by nothing else
    from matplotlib.ticker import MaxNLocator

    good = [found for found in findings if found.reason is None]
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2), ("tokens", "tiles")):
        values = np.array([getattr(found, name) for found in good] or [0])
        width = max(1, -(-int(values.max() + 1) // 50))  # whole numbers, so that no bar is empty by rounding
        axes.hist(values, bins=np.arange(0, values.max() + 1 + width, width) - 0.5, edgecolor="white", linewidth=0.3)
        axes.set(xlabel=f"{name} of a sample", ylabel="samples", title=f"mean {values.mean():.1f}, longest {values.max()}")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if name == "tokens" and values.max() > max_seq_length / 2:
            axes.axvline(max_seq_length, color="tab:red", label=f"max_seq_length {max_seq_length}")
            axes.legend()
    figure.savefig(path, dpi=120)


def draw_answers(findings, path):
    """Draw how long the answers of the usable pairs among ``findings`` are, chosen against rejected, as a PNG.

    A model that learns from pairs of unlike lengths learns to be short or long before it learns anything else.
    """
    from matplotlib.figure import Figure

    chosen, rejected = np.array([found.answers for found in findings if found.reason is None] or [(0, 0)]).T
    figure = Figure(figsize=(10, 4), layout="constrained")
    both, each = figure.subplots(1, 2)
    most = int(max(chosen.max(), rejected.max())) + 1
    bins = np.linspace(0, most, min(most, 50) + 1)
    for name, values in (("chosen", chosen), ("rejected", rejected)):
        both.hist(values, bins=bins, alpha=0.6, label=f"{name}, mean {values.mean():.1f}")
    both.set(xlabel="tokens of an answer", ylabel="pairs")
    both.legend()
    each.scatter(chosen, rejected, s=4, alpha=0.4)
    each.plot([0, most], [0, most], color="tab:red", linewidth=0.8)
    each.set(xlabel="tokens of the chosen answer", ylabel="tokens of the rejected one")
    each.set_title(f"the chosen one is longer in {(chosen > rejected).mean():.0%}")
    figure.savefig(path, dpi=120)


def _findings(sources, encoder, workers):
    """A list of findings for each source."""
    jobs = [(number, index) for number, source in enumerate(sources) for index in range(source.num_records)]
    found = [[] for _ in sources]
    bar = tqdm(total=len(jobs), unit="record", desc="checking", file=sys.stderr)
    if workers == 1:
        results = (check_record(sources[number], index, encoder) for number, index in jobs)
        _collect(jobs, results, found, bar)
    else:
        with ProcessPoolExecutor(workers, initializer=_start, initargs=(sources, encoder)) as pool:
            _collect(jobs, pool.map(_run, jobs, chunksize=8), found, bar)
    bar.close()
    return found


def _collect(jobs, results, found, bar):
    for (number, _), result in zip(jobs, results):
        found[number].append(result)
        bar.update()


def _start(*shared):
    global _shared
    _shared = shared


def _run(job):
    sources, encoder = _shared
    return check_record(sources[job[0]], job[1], encoder)


def _encoder(args):
    """The encoder that training with these arguments would have; videos are read with as many frames as are allowed."""
    directory = resolve(args.model_name_or_path)
    config = InternVLChatConfig.from_pretrained(directory)
    if args.force_image_size is not None:
        config = dataclasses.replace(config, force_image_size=args.force_image_size)
    template = args.conv_style or config.template
    if template is None:
        raise ConfigError(f"{directory}/config.json names no template: give the model's as --conv_style")
    names = ("dynamic_image_size", "use_thumbnail", "multi_scale", "pad2square", "min_dynamic_patch", "max_dynamic_patch")
    changes = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    options = DataOptions.from_config(
        config,
        max_seq_length=args.max_seq_length,
        max_tiles=args.num_images_expected,
        min_num_frame=args.max_num_frame,
        max_num_frame=args.max_num_frame,
        sampling_method="middle",
        **changes,
    )
    return (PreferenceEncoder if args.pairs else SampleEncoder)(load_tokenizer(directory), template, options)


def _boolean(text):
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"'{text}' must be True or False")
    return text.lower() == "true"


def _parser():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("meta", help="meta file of the training data (docs/data.md)")
    parser.add_argument(
        "--model_name_or_path",
        default=str(DEMO_MODEL),
        help="the checkpoint that will be trained (default: the bundled demo model, whose tiles are small)",
    )
    parser.add_argument(
        "--pairs",
        action="store_true",
        help="the records are pairs for preference training (docs/mpo.md); tokens are of both answers",
    )
    parser.add_argument("--max_seq_length", type=int, default=4096, help="longest sample in tokens (default: 4096)")
    parser.add_argument("--output", default="data_report", help="folder for the report (default: data_report)")
    parser.add_argument("--max_problems", type=int, default=50, help="problems to print; the report has all (default: 50)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: one a core)")
    parser.add_argument(
        "--allowed_media_domains",
        nargs="+",
        metavar="HOST",
        help="hosts that pictures of records may be fetched from (default: none)",
    )
    training = parser.add_argument_group("as in training", "defaults are the checkpoint's own, if nothing else is said")
    training.add_argument("--conv_style", help="conversation template")
    training.add_argument("--force_image_size", type=int, help="side of a tile in pixels")
    training.add_argument("--dynamic_image_size", type=_boolean, help="True or False: whether pictures are tiled")
    training.add_argument("--use_thumbnail", type=_boolean, help="True or False")
    training.add_argument("--multi_scale", choices=["chat", "training"], help="Mini-Monkey's tiles")
    training.add_argument("--pad2square", type=_boolean, help="True or False")
    training.add_argument("--min_dynamic_patch", type=int, help="fewest tiles")
    training.add_argument("--max_dynamic_patch", type=int, help="most tiles")
    training.add_argument("--max_num_frame", type=int, default=32, help="most frames of a video (default: 32)")
    training.add_argument("--num_images_expected", type=int, help="most tiles of a sample, with --use_packed_ds")
    return parser


@command_main
def main(argv=None):
    """Parse the command line, check, report; exit code 1 if a record cannot be used."""
    args = _parser().parse_args(argv)
    encoder = _encoder(args)
    sources = read_meta(args.meta, parse_preference if args.pairs else None, domains=args.allowed_media_domains)
    options = encoder.options
    print(
        f"checkpoint {args.model_name_or_path}: template {encoder.template.name}, tiles of {options.image_size} pixels and "
        f"{options.num_image_token} tokens, at most {options.max_dynamic_patch if options.dynamic_image_size else 1} a sample"
    )
    findings = _findings(sources, encoder, max(1, args.workers))
    summaries = {source.name: summarize(source, found) for source, found in zip(sources, findings)}
    problems = [
        {"dataset": source.name, "file": str(source.where(index)[0]), "line": source.line(index), "reason": finding.reason}
        for source, found in zip(sources, findings)
        for index, finding in enumerate(found)
        if finding.reason is not None
    ]

    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(problem, ensure_ascii=False) + "\n" for problem in problems]
    (output / "problems.jsonl").write_text("".join(lines), encoding="utf-8", errors="replace")
    (output / "report.json").write_text(json.dumps(summaries, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    everything = [finding for found in findings for finding in found]
    draw_lengths(everything, args.max_seq_length, output / "lengths.png")
    if args.pairs:
        draw_answers(everything, output / "answers.png")

    _print_table(summaries)
    for problem in problems[: args.max_problems]:
        print(f"{problem['file']}:{problem['line']}: {problem['reason']}")
    if len(problems) > args.max_problems:
        print(f"... and {len(problems) - args.max_problems} more in {output / 'problems.jsonl'}")
    for name, summary in summaries.items():
        for line in doubtful.sentences(name, summary["warnings"], summary["annotation"]):
            print(line)
    print(f"{len(problems)} of {len(everything)} records cannot be used; the report is in {output}")
    if problems:
        raise SystemExit(1)


def _print_table(summaries):
    columns = ("records", "an epoch", "1 picture", "several", "video", "text", "tokens", "p95", "max", "tiles", "cut", "bad")
    width = max(len("data set"), *(len(name) for name in summaries))
    print("  ".join(["data set".ljust(width), *(f"{column:>9}" for column in columns)]))
    for name, s in summaries.items():
        values = [s["records"], s["samples_per_epoch"], s["picture"], s["pictures"], s["video"], s["text"]]
        values += [s["tokens"]["mean"], s["tokens"]["p95"], s["tokens"]["max"], s["tiles"]["mean"]]
        values += [s["cut_to_max_seq_length"], s["bad"]]
        print("  ".join([name.ljust(width), *(f"{value:>9}" for value in values)]))
    for name, s in summaries.items():
        if s["turned"] or s["transparent"]:
            print(
                f"note: '{name}' has {s['turned']} picture(s) that EXIF data turn and {s['transparent']} with transparency; "
                "training takes them as the original does, as they lie and with what transparency hides"
            )
        if s["stated_length"] not in (None, s["records"]):
            print(f"note: the meta file states length {s['stated_length']} for '{name}'; it is not used")


if __name__ == "__main__":
    main()
