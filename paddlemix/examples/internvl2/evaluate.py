"""Evaluate a model on benchmarks, as the original's evaluate.sh does.

  python paddlemix/examples/internvl2/evaluate.py --model_name_or_path OpenGVLab/InternVL2-1B --task vqa-chartqa-test --dynamic
  python paddlemix/examples/internvl2/evaluate.py --task refcoco,pope --processes 2

writes OUT/TASK/answers.jsonl, score.json and, where a server scores, the file to send it. The same command goes on where one
was interrupted. docs/evaluation.md says where the data sets come from.
"""

import argparse
import sys

from paddlemix.errors import UserError, command_main
from paddlemix.examples.internvl2 import cli


def make_parser():
    """The command's flags; the original's spellings are taken too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model_name_or_path", "--checkpoint", default=str(cli.DEMO_MODEL), help="a checkpoint (default: the demo model)")
    add("--task", "--datasets", help="names or groups, separated by commas; --list shows them")
    add("--task_file", default=None, help="a data set of your own: YAML, or a .tsv of VLMEvalKit")
    add("--list", action="store_true", help="print the names of all tasks")
    add("--data_root", default="data", help="folder of the data sets (default: %(default)s)")
    add("--out_dir", "--out-dir", default="results", help="folder for the results (default: %(default)s)")
    add("--dynamic", action="store_true", help="cut pictures into tiles, as published figures were made")
    add("--max_num", "--max-num", type=int, default=None, help="most tiles of a picture (default: the task's, 6 for most)")
    add("--batch_size", "--batch-size", type=int, default=0, help="questions at once (default: by memory)")
    add("--limit", type=int, default=None, help="ask only so many questions")
    add("--shuffle_seed", type=int, default=None, help="with --limit: which ones, by this seed")
    add("--cot", action="store_true", help="ask for reasoning before the answer")
    add("--temperature", type=float, default=0.0, help="above 0 draws tokens at random (default: 0)")
    add("--seed", type=int, default=0, help="with --temperature")
    add("--num_beams", "--num-beams", type=int, default=1, help="beams of the search; 1 with --dynamic (default: 1)")
    add("--processes", type=int, default=1, help="processes that share the work (default: 1)")
    add("--auto", action="store_true", help="one process, as in the original")
    add("--subtask", default=None, help="of mme-realworld (default: Autonomous_Driving)")
    add("--device", default="auto", help="auto, cpu, gpu, npu or another Paddle device (default: auto)")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"], help="of the weights (default: auto)")
    add("--judge_url", default=None, help="OpenAI-compatible server of a judge, for llava-bench, mmhal, mmvet")
    add("--judge_model", default=None, help="the judge's name there; the key is OPENAI_API_KEY of the environment")
    add("--url", default=None, help="ask an OpenAI-compatible server in place of a local model")
    add("--url_model", default="default", help="the model's name there (default: %(default)s)")
    add("--no_resume", action="store_true", help="begin anew; what is there is moved aside")
    return parser


@command_main
def main(argv=None):
    """Parse the command line, ask and score."""
    parser = make_parser()
    args = parser.parse_args(argv)
    from paddlemix.evaluation.tasks import GROUPS, TASKS, select, with_options

    if args.list:
        print("\n".join([*TASKS, *GROUPS]))
        return
    if not args.task and not args.task_file:
        parser.error("--task is missing: --list shows the names")
    if min(args.batch_size, 0) < 0 or args.processes < 1 or (args.limit is not None and args.limit < 1):
        parser.error("--batch_size, --processes and --limit must be positive")
    if args.max_num is not None and args.max_num < 1:
        parser.error("--max_num must be at least 1")
    if bool(args.judge_url) != bool(args.judge_model):
        parser.error("--judge_url and --judge_model belong together")
    judge = (args.judge_url, args.judge_model) if args.judge_url else None
    tasks = select(args.task) if args.task else []
    if args.task_file:
        from paddlemix.evaluation.own import task_of_file

        tasks.append(task_of_file(args.task_file))
    if args.subtask:
        tasks = [with_options(task, subtask=args.subtask) for task in tasks]

    from paddlemix.checkpoints.files import model_digest
    from paddlemix.checkpoints.hub import resolve
    from paddlemix.evaluation.local import LocalModel
    from paddlemix.evaluation.runner import Settings, run_task

    names = "data_root dynamic max_num batch_size limit shuffle_seed cot temperature seed device dtype".split()
    directory = args.url or resolve(args.model_name_or_path)
    settings = Settings(
        model=str(directory),
        processes=1 if args.auto else args.processes,
        num_beams=1 if args.dynamic else args.num_beams,
        **{name: getattr(args, name) for name in names},
    )
    digest, model, bad = None if args.url else model_digest(directory), None, False
    if args.url:
        from paddlemix.evaluation.judge import Server

        model, digest = Server(args.url, args.url_model, settings), f"{args.url_model} at {args.url}"
    for task in tasks:
        if settings.processes == 1 and model is None:
            model = LocalModel.load(settings)
        try:
            result = run_task(task, settings, args.out_dir, not args.no_resume, model, digest, judge=judge)
        except UserError as error:
            if len(tasks) == 1:
                raise
            print(f"error: {task.name}: {error}", file=sys.stderr)
            bad = True
            continue
        report(result)
        bad = bad or result["failed"] > 0 or bool(result.get("not_judged"))
    if bad:
        raise SystemExit(1)


def report(result):
    """Print what came out."""
    shown = "  ".join(f"{name} {value:.4g}" for name, value in result["score"].items()) or result.get("submission", "no score")
    print(f"{result['task']}: {shown}  ({result['scored']} of {result['questions']} questions)")
    for failure in result["failures"][:5]:
        print(f"  failed: {failure['id']}: {failure['error']}", file=sys.stderr)


if __name__ == "__main__":
    main()
