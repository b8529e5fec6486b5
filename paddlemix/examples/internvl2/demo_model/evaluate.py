"""Ask a checkpoint about held-out scenes, each question alone, and print how many of the answers are exactly right.

  python -m paddlemix.examples.internvl2.demo_model.evaluate MODEL META.json [META.json ...]

takes meta files that :mod:`.data` wrote; each is a task of the same runner as ``paddlemix evaluate``, which --out_dir lets keep
its answers and reports. A box is right where the words are and it covers the true one with an IoU of 0.5 or
more.
"""

import argparse
import collections
import json
import os
import tempfile
from pathlib import Path

from paddlemix.commands import Parser
from paddlemix.datasets.records import read_meta
from paddlemix.errors import DataError, command_main


def read_questions(meta_path):
    """The questions of a meta file: list of (task, question with its picture marks, answer, paths).

    Raises:
        DataError: the meta file cannot be read, or its records are not as :mod:`.data` writes them.
    """
    questions = []
    for source in read_meta(meta_path):
        for line in Path(source.annotation).read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            if "tasks" not in record:
                raise DataError(f"{source.annotation}: its records do not say their 'tasks': draw it with demo_model.data")
            texts = [turn["value"] for turn in record["conversations"]]
            paths = [os.path.join(source.root, name) for name in record["image"]]
            for task, question, answer in zip(record["tasks"], texts[::2], texts[1::2]):
                questions.append((task, record["prefix"] + question.removeprefix(record["prefix"]), answer, paths))
    return questions


def is_right(task, answer, truth):
    """Whether ``answer`` counts as right where ``truth`` is the answer of the data."""
    if task != "box":
        return answer == truth
    (wanted,), found = _boxes(truth), _boxes(answer)
    same_words = answer.split("[")[0] == truth.split("<box>")[0].replace("<ref>", "").replace("</ref>", "")
    return same_words and len(found) == 1 and _overlap(found[0], wanted) >= 0.5


def _boxes(text):
    from paddlemix.boxes import parse_boxes

    return [(box.x1, box.y1, box.x2, box.y2) for box in parse_boxes(text, 1000, 1000)]


def _overlap(a, b):
    """Intersection over union of two boxes (x1, y1, x2, y2)."""
    sides = [max(0, min(a[i + 2], b[i + 2]) - max(a[i], b[i])) for i in (0, 1)]
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    both = sides[0] * sides[1]
    return both / max(sum(areas) - both, 1e-9)


def load_part(task, data_root):
    """The questions of the meta file that is the only one of ``task.files``."""
    from paddlemix.evaluation.rows import Question

    return [
        Question(i, question, tuple(paths), {"category": kind, "answers": [answer]})
        for i, (kind, question, answer, paths) in enumerate(read_questions(task.files[0]))
    ]


def score_part(references, answers):
    """Shares of right answers: of each kind of question, and ``overall``."""
    from paddlemix.evaluation.scorers import mean, means_by

    each = [
        float(answer is not None and is_right(reference["category"], answer, reference["answers"][0]))
        for reference, answer in zip(references, answers)
    ]
    by_kind = means_by([reference["category"] for reference in references], each)
    return {**dict(sorted(by_kind.items())), "overall": mean(each)}, each


def task_of(meta_path):
    """The task that a meta file is."""
    from paddlemix.evaluation.tasks import Task

    files, limits = (str(meta_path),), {"max_new_tokens": 96, "min_new_tokens": 0}
    return Task(f"demo-{Path(meta_path).stem}", load_part, score_part, "overall", files=files, **limits)


def evaluate(directory, meta_paths, limit=None, device="cpu", out_dir=None):
    """Accuracy of the model in ``directory`` on each part.

    Args:
        directory: a checkpoint.
        meta_paths: meta files of :mod:`.data`.
        limit: ask only so many questions of each part.
        device: where to run.
        out_dir: folder for answers, scores and reports, where an interrupted run goes on; None keeps none.

    Returns:
        For each meta file a dictionary ``{task: (right, asked)}``, and a list of wrong answers (task, question, answer, truth).

    Raises:
        DataError: a question could not be asked.
    """
    from paddlemix.checkpoints.files import model_digest
    from paddlemix.evaluation.answers import read_answers
    from paddlemix.evaluation.local import load_model
    from paddlemix.evaluation.runner import Settings, run_task

    settings = Settings(model=str(directory), limit=limit, device=device)
    model, digest, tables, wrong = load_model(settings), model_digest(directory), [], []
    with tempfile.TemporaryDirectory() as folder:
        for number, meta_path in enumerate(meta_paths):
            task, place = task_of(meta_path), Path(out_dir) if out_dir else Path(folder) / str(number)
            result = run_task(task, settings, place, model=model, digest=digest, report=out_dir is not None)
            if result["failed"]:
                raise DataError(result["failures"][0]["error"])
            right, asked = collections.Counter(), collections.Counter()
            for row in read_answers(place / task.name / "answers.jsonl"):
                kind, (truth,) = row["reference"]["category"], row["reference"]["answers"]
                good = is_right(kind, row["answer"], truth)
                asked[kind], right[kind] = asked[kind] + 1, right[kind] + good
                if not good:
                    wrong.append((kind, row["question"], row["answer"], truth))
            tables.append({kind: (right[kind], asked[kind]) for kind in sorted(asked)})
    return tables, wrong


def format_table(names, tables):
    """The accuracies as a Markdown table, one column for each part, ``overall`` last."""
    tables = [{**table, "overall": tuple(map(sum, zip(*table.values())))} for table in tables]
    tasks = sorted({task for table in tables for task in table} - {"overall"}) + ["overall"]
    rows = ["| task | " + " | ".join(names) + " |", "|---" + "|---:" * len(names) + "|"]
    for task in tasks:
        cells = [f"{table[task][0] / table[task][1]:.1%} of {table[task][1]}" if task in table else "" for table in tables]
        rows.append(f"| {task} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


@command_main
def main():
    """Parse the command line, ask and print."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a checkpoint directory")
    parser.add_argument("meta", nargs="+", help="meta files of the parts to ask about")
    parser.add_argument("--limit", type=int, default=None, help="ask only so many questions of each part")
    parser.add_argument("--wrong", type=int, default=0, help="also print so many of the wrong answers")
    parser.add_argument("--device", default="cpu", help="cpu, gpu, npu or another Paddle device (default: %(default)s)")
    parser.add_argument("--out_dir", default=None, help="keep answers, scores and reports in this folder")
    args = parser.parse_args()
    tables, wrong = evaluate(args.model, args.meta, args.limit, args.device, args.out_dir)
    print(format_table([Path(path).stem for path in args.meta], tables))
    for task, question, answer, truth in wrong[:: max(1, len(wrong) // max(args.wrong, 1))][: args.wrong]:
        print(f"{task}: {question.splitlines()[-1]} | {answer!r} instead of {truth!r}")


if __name__ == "__main__":
    main()
