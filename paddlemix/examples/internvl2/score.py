"""Score answers again, without a model.

  paddlemix score vqa-chartqa-test results/vqa-chartqa-test/answers.jsonl
  paddlemix score pope others.jsonl --data_root data

Lines are {"id", "answer"}; those of other programs are joined with the data set by id.
"""

import argparse
import json
import sys

from paddlemix.commands import Parser
from paddlemix.errors import command_main


@command_main
def main(argv=None):
    """Parse the command line, join and score."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", help="a task's name, or a file that describes one")
    parser.add_argument("answers", help="JSON lines with id and answer (or review)")
    parser.add_argument("--data_root", default="data", help="folder of the data sets, for lines without 'reference'")
    args = parser.parse_args(argv)
    from paddlemix.errors import DataError
    from paddlemix.evaluation.answers import read_answers
    from paddlemix.evaluation.intervals import intervals
    from paddlemix.evaluation.loaders import load
    from paddlemix.evaluation.own import task_of_file
    from paddlemix.evaluation.scorers import texts_of
    from paddlemix.evaluation.tasks import TASKS, score, select

    known = args.task in TASKS or not args.task.endswith((".yaml", ".yml", ".tsv"))
    (task,) = select(args.task) if known else [task_of_file(args.task)]
    rows = read_answers(args.answers)
    if not rows:
        raise DataError(f"{args.answers} is missing or holds no answer: name a file of JSON lines with id and answer")
    if all("reference" in row for row in rows):
        references = [{"id": row["id"], **row["reference"]} for row in rows if "error" not in row]
    else:
        references = [{"id": q.id, **q.reference} for q in load(task, args.data_root) if not q.error]
    asked = {str(reference["id"]) for reference in references}
    given = {str(row.get("id")) for row in rows}
    strangers = sorted(given - asked)
    answered = [row for row in rows if "error" not in row]
    scores = score(task, answered, references)
    result = {"task": task.name, "score": scores, "questions": len(references), "missing": len(asked - given)}
    texts = texts_of(answered, references, task.prediction_key)
    result |= {"intervals": intervals(task.scorer, references, texts), "without_question": len(strangers)}
    print(json.dumps(result, indent=1, ensure_ascii=False))
    if strangers:
        print(f"error: {len(strangers)} answers have no question, such as {strangers[0]!r}", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    main()
