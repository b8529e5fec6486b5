"""Questions a second of evaluation on the demo model: one by one, and at the default batch size. See README.md in this folder.

    python benchmarks/evaluation.py --questions 1000

The questions are those of the demo model's own held-out scenes, drawn anew; both ways answer all of them by the runner of
``paddlemix evaluate``, in turns.
"""

import argparse
import dataclasses
import tempfile
import time

import machine
import sides

from paddlemix.errors import command_main
from paddlemix.evaluation.local import LocalModel
from paddlemix.evaluation.rows import Question
from paddlemix.evaluation.runner import Settings, ask, batches
from paddlemix.evaluation.tasks import Task
from paddlemix.examples.internvl2 import cli
from paddlemix.examples.internvl2.demo_model.data import PARTS, write_part
from paddlemix.examples.internvl2.demo_model.evaluate import read_questions

# As the demo model's own evaluation asks.
TASK = Task("demo", read_questions, None, "", max_new_tokens=96, min_new_tokens=0)


def measure(model, questions):
    """Questions a second, and the answers in the order of the questions."""
    found = [None] * len(questions)

    def write(rows):
        for row in rows:
            found[row["index"]] = row["answer"]

    start = time.perf_counter()
    ask(model, TASK, batches(questions, {}, model.batch_size(TASK)), write)
    return len(questions) / (time.perf_counter() - start), found


@command_main
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=1000, help="default: %(default)s")
    parser.add_argument("--model", default=str(cli.DEMO_MODEL), help="a checkpoint (default: the demo model)")
    parser.add_argument("--repeat", type=int, default=2, help="times that both ways run; the best counts (%(default)s)")
    parser.add_argument("--save", action="store_true", help="write results/DATE-evaluation.md")
    options = parser.parse_args()
    others = machine.OtherWork()
    with tempfile.TemporaryDirectory() as folder:
        meta = write_part(folder, "heldout", scale=options.questions / PARTS["heldout"][1], processes=2)
        asked = read_questions(meta)[: options.questions]
        questions = [Question(i, text, tuple(paths)) for i, (_, text, _, paths) in enumerate(asked)]
        settings = Settings(model=options.model, device="cpu")
        many = LocalModel.load(settings)
        one = LocalModel(many.model, many.tokenizer, dataclasses.replace(settings, batch_size=1))
        for model in (one, many):
            measure(model, questions[:8])  # warm up
        speeds, answers = {"one by one": 0, "batched": 0}, {}
        for _ in range(options.repeat):
            for name, model in (("one by one", one), ("batched", many)):
                speed, answers[name] = measure(model, questions)
                speeds[name] = max(speeds[name], speed)
    apart = sum(a != b for a, b in zip(*answers.values()))
    size = many.batch_size(TASK)
    engine = "inference" if getattr(many.model, "packed", False) else "eager"
    lines = [
        f"# Evaluation, {time.strftime('%Y-%m-%d')}, commit {machine.commit()}",
        "",
        f"{machine.cpu_name()}; other programs used {others.cores():.1f} cores meanwhile. {len(questions)} questions, engine "
        f"{engine}.",
        "",
        "| way | questions/s |",
        "|---|---:|",
        f"| one by one | {speeds['one by one']:.1f} |",
        f"| batches of {size} | {speeds['batched']:.1f} |",
        f"| ratio | {speeds['batched'] / speeds['one by one']:.2f} |",
        "",
        f"{apart} answers differ.",
    ]
    sides.publish(lines, "evaluation", options.save)


if __name__ == "__main__":
    main()
