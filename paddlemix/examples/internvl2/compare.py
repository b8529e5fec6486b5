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
    parser.add_argument("--show", type=int, default=10, help="questions to show (default: %(default)s)")
    args = parser.parse_args(argv)
    from paddlemix.errors import DataError
    from paddlemix.evaluation.answers import read_answers
    from paddlemix.evaluation.intervals import compare
    from paddlemix.evaluation.tasks import TASKS, score
    from paddlemix.files import read_json

    runs, names = [], []
    for folder in (args.first, args.second):
        name = read_json(Path(folder, "run.json"), DataError, absent="name the folder of a run")["task"]
        if name not in TASKS:
            raise DataError(f"{folder} is of the task '{name}', which is not one of the package's: score its files instead")
        rows = [row for row in read_answers(Path(folder, "answers.jsonl")) if "error" not in row]
        _, each = score(name, rows, [{"id": row["id"], **row["reference"]} for row in rows], each=True)
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
