"""What weights in 8 and 4 bits cost in answers: the demo model's held-out questions, beside its answers in float32.

    python -m paddlemix.examples.internvl2.demo_model.data work_dirs/demo_data --parts heldout
    python benchmarks/quality.py work_dirs/demo_data/heldout.json

prints, for each choice of bits and parts, the share of answers that stay the same, and the points of accuracy.
"""

import argparse
import tempfile
from pathlib import Path

from paddlemix.checkpoints.files import model_digest
from paddlemix.errors import command_main
from paddlemix.evaluation.answers import read_answers
from paddlemix.evaluation.local import load_model
from paddlemix.evaluation.runner import Settings, run_task
from paddlemix.examples.internvl2.cli import DEMO_MODEL
from paddlemix.examples.internvl2.demo_model.evaluate import is_right, task_of

ALL = "language,projector,vision"
CHOICES = (  # weight_dtype, quantize_parts, kv_cache_dtype, activation_dtype
    (None, None, None, None),
    (None, None, "int8", None),
    ("int8", None, None, None),
    ("int8", None, "int8", None),
    ("int8", ALL, None, None),
    ("int8", None, None, "int8"),
    ("int8", ALL, None, "int8"),
    ("int4", None, None, None),
    ("int4", None, "int8", None),
    ("int4", ALL, None, None),
    ("int4", None, None, "int8"),
    ("int4", ALL, None, "int8"),
)


def answers(directory, meta_path, weight_dtype, parts, cache, activations, limit):
    """``{question: (answer, whether it is right)}``."""
    few = {"weight_dtype": weight_dtype, "quantize_parts": parts, "kv_cache_dtype": cache, "activation_dtype": activations}
    settings = Settings(str(directory), limit=limit, device="cpu", dtype="float32", **few)
    task = task_of(meta_path)
    with tempfile.TemporaryDirectory() as folder:
        run_task(task, settings, Path(folder), model=load_model(settings), digest=model_digest(directory), report=False)
        rows = list(read_answers(Path(folder) / task.name / "answers.jsonl"))
    return {
        row["index"]: (row["answer"], is_right(row["reference"]["category"], row["answer"], row["reference"]["answers"][0]))
        for row in rows
    }


@command_main
def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("meta", help="held-out questions that demo_model.data wrote")
    parser.add_argument("--model_name_or_path", default=str(DEMO_MODEL))
    parser.add_argument("--limit", type=int, default=None, help="ask only so many")
    args = parser.parse_args()
    print("| weights | parts | keys and values | activations | equal answers | right | points lost |")
    print("|---|---|---|---|---:|---:|---:|", flush=True)
    first = None
    for weight_dtype, parts, cache, activations in CHOICES:
        found = answers(args.model_name_or_path, args.meta, weight_dtype, parts, cache, activations, args.limit)
        first = first or found
        right, before = (100 * sum(good for _, good in each.values()) / len(each) for each in (found, first))
        equal = 100 * sum(found[key][0] == first[key][0] for key in first) / len(first)
        parts = "" if weight_dtype is None else parts or "language,projector"
        named = f"{weight_dtype or 'float32'} | {parts} | {cache or 'float32'} | {activations or 'float32'}"
        print(f"| {named} | {equal:.1f}% | {right:.2f}% | {before - right:.2f} |", flush=True)


if __name__ == "__main__":
    main()
