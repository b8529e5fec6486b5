"""Ask a checkpoint about held-out scenes, each question alone, and print how many of the answers are exactly right.

  python -m paddlemix.examples.internvl2.demo_model.evaluate MODEL META.json [META.json ...]

takes meta files that :mod:`.data` wrote. A box is right where the words are and it covers the true one with an IoU of 0.5 or
more.
"""

import argparse
import collections
import json
import os
from pathlib import Path

from tqdm import tqdm

from paddlemix.datasets.records import read_meta
from paddlemix.errors import DataError, command_main

BATCH = 32  # questions that are asked at once


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


def evaluate(directory, meta_paths, limit=None, device="cpu"):
    """Accuracy of the model in ``directory`` on each part.

    Args:
        directory: a checkpoint.
        meta_paths: meta files of :mod:`.data`.
        limit: ask only so many questions of each part.
        device: where to run.

    Returns:
        For each meta file a dictionary ``{task: (right, asked)}``, and a list of wrong answers (task, question, answer, truth).
    """
    from paddlemix.evaluation.local import LocalModel
    from paddlemix.evaluation.rows import Question
    from paddlemix.evaluation.runner import Settings, ask, batches
    from paddlemix.evaluation.tasks import Task

    model = LocalModel.load(Settings(model=str(directory), batch_size=BATCH, device=device))
    task = Task("demo", read_questions, None, "", max_new_tokens=96, min_new_tokens=0)
    tables, wrong = [], []
    for meta_path in meta_paths:
        questions = read_questions(meta_path)[:limit]
        right, asked = collections.Counter(), collections.Counter()
        found = [Question(i, question, tuple(paths)) for i, (_, question, _, paths) in enumerate(questions)]
        with tqdm(total=len(found), desc=Path(meta_path).stem, unit="question", disable=None) as bar:

            def write(rows, questions=questions, right=right, asked=asked, bar=bar):
                bar.update(len(rows))
                for row in rows:
                    if "error" in row:
                        raise DataError(row["error"])
                    kind, question, truth, _ = questions[row["index"]]
                    asked[kind] += 1
                    if is_right(kind, row["answer"], truth):
                        right[kind] += 1
                    else:
                        wrong.append((kind, question, row["answer"], truth))

            ask(model, task, batches(found, {}, BATCH), write)
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a checkpoint directory")
    parser.add_argument("meta", nargs="+", help="meta files of the parts to ask about")
    parser.add_argument("--limit", type=int, default=None, help="ask only so many questions of each part")
    parser.add_argument("--wrong", type=int, default=0, help="also print so many of the wrong answers")
    parser.add_argument("--device", default="cpu", help="cpu, gpu, npu or another Paddle device (default: %(default)s)")
    args = parser.parse_args()
    tables, wrong = evaluate(args.model, args.meta, args.limit, args.device)
    print(format_table([Path(path).stem for path in args.meta], tables))
    for task, question, answer, truth in wrong[:: max(1, len(wrong) // max(args.wrong, 1))][: args.wrong]:
        print(f"{task}: {question.splitlines()[-1]} | {answer!r} instead of {truth!r}")


if __name__ == "__main__":
    main()
