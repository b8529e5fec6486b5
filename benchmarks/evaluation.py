"""Questions a second of evaluation on the demo model: by ``chat``, one by one, and at the default batch size. See README.md.

    python benchmarks/evaluation.py --questions 1000

The questions are those of the demo model's own held-out scenes, drawn anew. All ways answer all of them, in turns: a loop
around ``model.chat``, and the runner of ``paddlemix evaluate`` with ``--batch_size 1`` and with what it chooses by memory.
"""

import argparse
import dataclasses
import tempfile
import time

import machine
import sides

from paddlemix.errors import command_main
from paddlemix.evaluation.local import LocalModel, load_model
from paddlemix.evaluation.media import tiles
from paddlemix.evaluation.runner import Settings, ask, batches
from paddlemix.examples.internvl2 import cli
from paddlemix.examples.internvl2.demo_model.data import PARTS, write_part
from paddlemix.examples.internvl2.demo_model.evaluate import load_part, task_of

TASK = task_of("the scenes of each run")


def measure(model, questions):
    """Questions a second, and the answers in the order of the questions."""
    found = [None] * len(questions)

    def write(rows):
        for row in rows:
            found[row["index"]] = row["answer"]

    start = time.perf_counter()
    ask(model, TASK, batches(questions, {}, model.batch_size(TASK)), write)
    return len(questions) / (time.perf_counter() - start), found


def chat(local, questions):
    """As :func:`measure`, by a loop around ``model.chat``, as somebody without the runner writes it."""
    model, tokenizer, found = local.model, local.tokenizer, []
    settings = {"max_new_tokens": TASK.max_new_tokens, "min_new_tokens": TASK.min_new_tokens}
    start = time.perf_counter()
    for question in questions:
        pixels, counts, _ = tiles(question, TASK, model.config, False, TASK.max_num)
        found.append(model.chat(tokenizer, pixels, question.prompt, settings, num_patches_list=counts))
    return len(questions) / (time.perf_counter() - start), found


@command_main
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=1000, help="default: %(default)s")
    parser.add_argument("--model", default=str(cli.DEMO_MODEL), help="a checkpoint (default: the demo model)")
    parser.add_argument("--repeat", type=int, default=2, help="times that all ways run; the best counts (%(default)s)")
    parser.add_argument("--save", action="store_true", help="write results/DATE-evaluation.md")
    options = parser.parse_args()
    others = machine.OtherWork()
    with tempfile.TemporaryDirectory() as folder:
        meta = write_part(folder, "heldout", scale=options.questions / PARTS["heldout"][1], processes=2)
        questions = load_part(task_of(meta), None)[: options.questions]
        settings = Settings(model=options.model, device="cpu")
        many = load_model(settings)
        one = LocalModel(many.model, many.tokenizer, dataclasses.replace(settings, batch_size=1))
        ways = {"chat": (chat, many), "one by one": (measure, one), "batched": (measure, many)}
        for way, model in ways.values():
            way(model, questions[:8])  # warm up
        speeds, answers = dict.fromkeys(ways, 0), {}
        for _ in range(options.repeat):
            for name, (way, model) in ways.items():
                speed, answers[name] = way(model, questions)
                speeds[name] = max(speeds[name], speed)
    apart = [sum(a != b for a, b in zip(answers["batched"], answers[name])) for name in ("chat", "one by one")]
    size = many.batch_size(TASK)
    engine = "inference" if getattr(many.model, "packed", False) else "eager"
    lines = [
        f"# Evaluation, {time.strftime('%Y-%m-%d')}, commit {machine.commit()}",
        "",
        f"{machine.cpu_name()}; other programs used {others.cores():.1f} cores meanwhile. {len(questions)} questions, engine "
        f"{engine}.",
        "",
        "| way | questions/s | batched is faster by |",
        "|---|---:|---:|",
        *(
            f"| {label} | {speeds[name]:.1f} | {speeds['batched'] / speeds[name]:.2f} |"
            for name, label in (
                ("chat", "a loop around chat"),
                ("one by one", "`--batch_size 1`"),
                ("batched", f"{size} at once"),
            )
        ),
        "",
        f"{apart[0]} answers differ from those of chat, {apart[1]} from those of `--batch_size 1`.",
    ]
    sides.publish(lines, "evaluation", options.save)


if __name__ == "__main__":
    main()
