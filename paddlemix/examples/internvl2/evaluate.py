"""Evaluate a model on benchmarks, as the original's evaluate.sh does.

  paddlemix evaluate --model_name_or_path OpenGVLab/InternVL2-1B --task vqa-chartqa-test --dynamic
  paddlemix evaluate --task refcoco,pope --processes 2
  paddlemix evaluate --task vqa --check

writes OUT/TASK/answers.jsonl, score.json, report.html and, where a server scores, the file to send it; OUT/suite.md is a table
of all tasks. The same command goes on where one was interrupted. docs/evaluation.md says where the data sets come from.
"""

import argparse
import sys

from paddlemix.commands import Parser, add_tensor_parallel, add_weight_flags, weight_options
from paddlemix.errors import UserError, command_main
from paddlemix.examples.internvl2 import cli


def make_parser():
    """The command's flags; the original's spellings are taken too."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("what is asked").add_argument
    add("--task", "--datasets", help="names or groups, separated by commas; --list shows them")
    add("--task_file", default=None, help="a data set of your own: YAML, or a .tsv of VLMEvalKit")
    add("--list", action="store_true", help="print the names of all tasks")
    add("--check", action="store_true", help="only tell what is missing of the tasks' data")
    add("--data_root", default="data", help="folder of the data sets (default: %(default)s)")
    add("--limit", type=int, default=None, help="ask only so many questions")
    add("--shuffle_seed", type=int, default=None, help="with --limit: which ones, by this seed")
    add("--subtask", default=None, help="of mme-realworld (default: Autonomous_Driving)")
    add = parser.add_argument_group("model").add_argument
    add("--model_name_or_path", "--checkpoint", default=str(cli.DEMO_MODEL), help="a checkpoint (default: the demo model)")
    add("--adapter", nargs="+", default=[], metavar="DIR", help="LoRA adapters to add to its weights, in PEFT's form")
    add("--device", default="auto", help="auto, cpu, gpu, npu or another Paddle device (default: auto)")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"], help="of the weights (default: auto)")
    add_weight_flags(parser)
    add("--minimonkey", action="store_true", help="it is a Mini-Monkey: pictures at two scales, of which it drops tokens")
    add("--no_scm", action="store_true", help="with --minimonkey: keep all tokens")
    add("--url", default=None, help="ask an OpenAI-compatible server in place of a local model")
    add("--url_model", default="default", help="the model's name there (default: %(default)s)")
    add = parser.add_argument_group("how it is asked").add_argument
    add("--dynamic", action="store_true", help="cut pictures into tiles, as published figures were made")
    add("--max_num", type=int, default=None, help="most tiles of a picture (default: the task's, 6 for most)")
    add("--cot", action="store_true", help="ask for reasoning before the answer")
    add("--temperature", type=float, default=0.0, help="above 0 draws tokens at random (default: 0)")
    add("--seed", type=int, default=0, help="with --temperature")
    add("--num_beams", type=int, default=1, help="beams of the search; 1 with --dynamic (default: 1)")
    add("--batch_size", type=int, default=0, help="questions at once (default: by memory)")
    add_tensor_parallel(parser)
    add("--processes", type=int, default=1, help="processes that share the work, each on a card of its own (default: 1)")
    add("--ray", metavar="ADDRESS", help="share it with a Ray cluster: host:port, auto, or local; all machines see the data")
    add("--auto", action="store_true", help="one process, as in the original")
    add("--num_workers", type=int, default=1, help=argparse.SUPPRESS)  # the original's; pictures are always prepared ahead
    add = parser.add_argument_group("scores").add_argument
    add("--out_dir", default="results", help="folder for the results (default: %(default)s)")
    add("--judge_url", default=None, help="OpenAI-compatible server of a judge, for llava-bench, mmhal, mmvet")
    add("--judge_model", default=None, help="the judge's name there; the key is OPENAI_API_KEY of the environment")
    add("--published", metavar="FILE.csv", help="known figures to show beside: columns model, task, score, source")
    add("--no_report", action="store_true", help="write no report.html")
    add("--no_resume", action="store_true", help="begin anew; what is there is moved aside")
    return parser


def _settled(parser, args):
    """Check flags that do not fit together."""
    if not args.task and not args.task_file:
        parser.error("--task is missing: --list shows the names")
    for name in ("batch_size", "processes", "limit", "max_num", "num_beams"):
        value = getattr(args, name)
        if value is not None and value < (0 if name == "batch_size" else 1):
            parser.error(f"--{name} is {value}: it must be at least 1")
    if bool(args.judge_url) != bool(args.judge_model):
        parser.error("--judge_url and --judge_model belong together")
    if args.no_scm and not args.minimonkey:
        parser.error("--no_scm belongs to --minimonkey")
    if args.minimonkey and args.num_beams > 1:
        parser.error("--minimonkey searches no beams: leave out --num_beams")
    if args.tensor_parallel != 1 and (args.processes > 1 or args.ray):
        parser.error("--tensor_parallel divides the model and --processes and --ray the questions: use one of them")
    if args.url and (args.ray or args.processes > 1):
        parser.error("--url asks one server: leave out --processes and --ray, and use --batch_size")


def _tasks(args):
    from paddlemix.evaluation.tasks import select, with_options

    tasks = select(args.task) if args.task else []
    if args.task_file:
        from paddlemix.evaluation.own import task_of_file

        tasks.append(task_of_file(args.task_file))
    return [with_options(task, subtask=args.subtask) for task in tasks] if args.subtask else tasks


def _check(tasks, data_root):
    from paddlemix.evaluation.checking import check

    whole = True
    for task in tasks:
        lines, good = check(task, data_root)
        print("\n".join(lines))
        whole = whole and good
    if not whole:
        raise SystemExit(1)


def _settings(args, directory):
    from paddlemix.checkpoints.hub import resolve
    from paddlemix.evaluation.runner import Settings

    names = (
        "data_root dynamic max_num batch_size limit shuffle_seed cot temperature seed device dtype ray tensor_parallel".split()
    )
    return Settings(
        model=str(directory),
        processes=1 if args.auto else args.processes,
        num_beams=1 if args.dynamic else args.num_beams,
        adapters=tuple(str(resolve(folder)) for folder in args.adapter),
        **weight_options(args),
        scales=("plain" if args.no_scm else "scm") if args.minimonkey else None,
        **{name: getattr(args, name) for name in names},
    )


@command_main
def main(argv=None):
    """Parse the command line, ask and score."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.list:
        from paddlemix.evaluation.tasks import GROUPS, TASKS

        print("\n".join([*TASKS, *GROUPS]))
        return
    _settled(parser, args)
    tasks = _tasks(args)
    if args.check:
        _check(tasks, args.data_root)
        return
    from paddlemix.checkpoints.files import model_digest
    from paddlemix.checkpoints.hub import resolve
    from paddlemix.evaluation.runner import run_task
    from paddlemix.evaluation.suite import read_published, write_suite

    published = read_published(args.published) if args.published else []
    judge = (args.judge_url, args.judge_model) if args.judge_url else None
    settings = _settings(args, args.url or resolve(args.model_name_or_path))
    model, digest = None, None if args.url else model_digest(settings.model)
    if args.url:
        from paddlemix.evaluation.judge import Server

        model, digest = Server(args.url, args.url_model, settings), f"{args.url_model} at {args.url}"
    results, bad = [], False
    for task in tasks:
        if settings.processes == 1 and not settings.ray and model is None:
            from paddlemix.evaluation.local import load_model

            model = load_model(settings)
        try:
            result = run_task(
                task,
                settings,
                args.out_dir,
                not args.no_resume,
                model,
                digest,
                judge=judge,
                published=published,
                report=not args.no_report,
            )
        except UserError as error:
            if len(tasks) == 1:
                raise
            print(f"error: {task.name}: {error}", file=sys.stderr)
            bad = True
            continue
        results.append(result)
        report(result)
        bad = bad or bool(result["failed"] or result["without_question"] or result.get("not_judged"))
    if len(results) > 1 or published:
        print("\n".join(["", *write_suite(results, args.out_dir, published)]))
    if bad:
        raise SystemExit(1)


def report(result):
    """Print what came out."""
    shown = "  ".join(f"{name} {value:.4g}" for name, value in result["score"].items()) or result.get("submission", "no score")
    counts = "".join(f", {result[name]} {name}" for name in ("empty", "cut", "unreadable") if result.get(name))
    print(f"{result['task']}: {shown}  ({result['scored']} of {result['questions']} questions{counts})")
    for failure in result["failures"][:5]:
        print(f"  failed: {failure['id']}: {failure['error']}", file=sys.stderr)
    if result["without_question"]:
        print(f"  {result['without_question']} answers have no question: see without_question.jsonl", file=sys.stderr)
    if not_judged := result.get("not_judged"):
        print(f"  not judged: {len(not_judged)}, such as {not_judged[0]['id']}: {not_judged[0]['error']}", file=sys.stderr)


if __name__ == "__main__":
    main()
