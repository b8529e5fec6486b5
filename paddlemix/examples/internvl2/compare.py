"""Where two runs of the same task differ, with a paired bootstrap interval of the difference.

paddlemix compare results_bf16/vqa-chartqa-test results_int4/vqa-chartqa-test
"""

import argparse
import json
from pathlib import Path

from paddlemix.commands import Parser
from paddlemix.errors import command_main


@command_main
def main(argv=None):
    """Parse the command line, compare and print."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", help="folder of a run")
    parser.add_argument("second", help="folder of another run of the same task")
    parser.add_argument("--task_file", default=None, help="what describes the task, where it is a data set of your own")
    parser.add_argument("--show", type=int, default=10, help="questions to show (default: %(default)s)")
    args = parser.parse_args(argv)
    from paddlemix.errors import DataError
    from paddlemix.evaluation.answers import read_answers
    from paddlemix.evaluation.intervals import compare
    from paddlemix.evaluation.tasks import TASKS, score
    from paddlemix.files import read_json

    own = None
    if args.task_file:
        from paddlemix.evaluation.own import task_of_file

        own = task_of_file(args.task_file)
    runs, names = [], []
    for folder in (args.first, args.second):
        name = read_json(Path(folder, "run.json"), DataError, absent="name the folder of a run")["task"]
        task = own if own is not None and own.name == name else TASKS.get(name)
        if task is None:
            raise DataError(f"{folder} is of the task '{name}', which is not one of the package's: name its --task_file")
        rows = [row for row in read_answers(Path(folder, "answers.jsonl")) if "error" not in row]
        if not rows:
            raise DataError(f"{folder} holds no answer: run the task first")
        if task.prediction_key == "review":
            reviews = {str(row["id"]): row["review"] for row in read_answers(Path(folder, "reviews.jsonl"))}
            rows = [{**row, "review": reviews[str(row["id"])]} for row in rows if str(row["id"]) in reviews]
        _, each = score(task, rows, [{"id": row["id"], **row["reference"]} for row in rows], each=True)
        if len(each) != len(rows):
            raise DataError(f"{folder}: some of its questions have no known truth: complete the data set, and run it again")
        runs.append({str(row["id"]): (row["answer"], value) for row, value in zip(rows, each)})
        names.append(name)
    if names[0] != names[1]:
        raise DataError(f"{args.first} is of {names[0]} and {args.second} of {names[1]}: compare runs of the same task")
    found = compare(*runs)
    low, high = found["interval"]
    print(f"{names[0]}: {found['questions']} questions in both, means {found['means'][0]:.4f} and {found['means'][1]:.4f}")
    print(f"difference {found['difference']:+.4f}, 95% of resamplings from {low:+.4f} to {high:+.4f}")
    print(f"{len(found['gained'])} gained, {len(found['lost'])} lost, {len(found['differ'])} answers differ")
    for identity in found["differ"][: args.show]:
        print(json.dumps({"id": identity, "first": runs[0][identity][0], "second": runs[1][identity][0]}, ensure_ascii=False))


if __name__ == "__main__":
    main()
