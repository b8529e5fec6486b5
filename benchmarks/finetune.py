"""Speed and memory of a training step, beside transformers + torch where these are installed. See README.md in this folder.

    python benchmarks/finetune.py --model demo,1b --save

One sample of four tiles and some text, the vision tower frozen, language model and projector trained whole, AdamW with
clipping; weights in float32, products in float32 and in bfloat16 (torch: under autocast). As in ``inference.py``, each
repetition starts a process for each side, in turns.
"""

import argparse
import itertools
import json
import statistics

import machine
import numpy as np
import sides
from sides import seconds

from paddlemix.errors import command_main
from paddlemix.models.blocks.flops import decoder_flops, parameter_counts, vision_flops
from paddlemix.models.internvl2 import InternVLChatConfig

TILES = 4
SETTINGS = {"learning_rate": 4e-5, "weight_decay": 0.01, "max_grad_norm": 1.0}

# What is measured; whether more is better; which limit of the machine it is compared with.
ROWS = {
    "step": ("step, s", False, ""),
    "tokens": ("tokens/s", True, "matmul peak"),
    "samples": ("samples/s", True, ""),
    "memory": ("peak memory, GB", False, ""),
}


def batch(config, spec):
    """Samples of random tiles and tokens, of which the last are learned, as the trainer's collator would give them."""
    random = np.random.default_rng(0)
    rows, answer, size = spec["rows"], spec["answer"], config.image_size
    context = config.llm_config.vocab_size - 1
    pictures = TILES * config.num_image_token
    ids = random.integers(0, context, [rows, pictures + spec["text"]])
    start = (spec["text"] - answer) // 2
    ids[:, start : start + pictures] = context
    return {
        "input_ids": ids,
        "labels": np.where(np.arange(ids.shape[1]) < ids.shape[1] - answer, -100, ids),
        "attention_mask": np.ones_like(ids),
        "pixel_values": random.standard_normal([rows * TILES, 3, size, size], np.float32),
        "names": ["random"] * rows,
    }


def run_side(side, spec):
    """Measure one side; print one line of JSON."""
    config = InternVLChatConfig.from_pretrained(spec["directory"])
    samples = batch(config, spec)
    model = sides.open_side(side, spec)
    model.start_training(config.llm_config.vocab_size - 1, spec["recompute"], spec["products"] == "bfloat16", **SETTINGS)
    losses, times = [], []
    for _ in range(1 + spec["steps"]):  # the first warms up, and makes the states of the optimiser
        times.append(seconds(lambda: losses.append(model.train(samples))))
    result = {"step": statistics.median(times[1:]), "memory": machine.peak_memory(), "losses": losses}
    sides.report(model, result, spec["matmul"])


def step_flops(config, spec):
    """FLOPs of a step: a backward pass costs as much for inputs as the forward pass, and as much again for weights."""
    tokens = TILES * config.num_image_token + spec["text"]
    decoder = decoder_flops(config, tokens, logits=spec["answer"])  # with logits where there are labels
    return spec["rows"] * (3 * decoder + vision_flops(config, TILES))


def figures(config, spec, result):
    """One side's rows: ``{row: (figure as people read it, FLOPs a second or None)}``."""
    tokens = spec["rows"] * (TILES * config.num_image_token + spec["text"])
    return {
        "step": (result["step"], None),
        "tokens": (tokens / result["step"], step_flops(config, spec) / result["step"]),
        "samples": (spec["rows"] / result["step"], None),
        "memory": (result["memory"] / 1e9, None),
    }


def apart(merged):
    """Largest relative difference between both sides' losses; None where one did not run."""
    if any("error" in result for result in merged.values()) or len(merged) < 2:
        return None
    ours, torch = (np.array(merged[side]["losses"]) for side in ("ours", "torch"))
    return np.abs(ours / torch - 1).max()


def parse_arguments():
    parser = argparse.ArgumentParser(description="Measure a training step, beside transformers + torch if installed.")
    add = parser.add_argument
    add("--model", default="demo,1b", help="comma-separated: demo (bundled), 1b (the shapes of InternVL2-1B with random "
        "weights, which take 1.9 GB of the cache folder; a step takes 17 GB of memory), or checkpoint directories")  # fmt: skip
    add("--products", default="float32,bfloat16", help="dtypes of products, comma-separated (default %(default)s)")
    add("--layers", type=int, help="blocks of the language model instead of all, with random weights")
    add("--rows", type=int, default=1, help="samples of a step (default %(default)s)")
    add("--text", type=int, default=128, help="tokens of text beside the tiles of a sample (default %(default)s)")
    add("--answer", type=int, default=64, help="how many of them are learned (default %(default)s)")
    add("--steps", type=int, default=3, help="in each process, after one to warm up (default %(default)s)")
    add("--recompute", action="store_true", help="both sides compute the activations of each block again")
    sides.add_arguments(add, "finetune")
    options = parser.parse_args()
    if not set(options.products.split(",")) <= {"float32", "bfloat16"}:
        parser.error("--products must be float32, bfloat16 or both")
    for name in ("rows", "text", "steps", "repeat", "threads", *(["layers"] if options.layers is not None else [])):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1")
    if not 1 <= options.answer < options.text:
        parser.error("--answer must be at least 1 and less than --text")
    return options


@command_main
def main():
    options = parse_arguments()
    if options.side:
        return run_side(options.side[0], json.loads(options.side[1]))
    models = options.model.split(",")
    directories = [sides.checkpoint_directory(model, options.layers) for model in models]
    pythons, others = sides.pythons(options), machine.OtherWork()
    chosen = {name: getattr(options, name) for name in ("threads", "rows", "text", "answer", "steps", "recompute")}
    sections = []
    for (model, directory), products in itertools.product(zip(models, directories), options.products.split(",")):
        spec = {**chosen, "directory": str(directory), "dtype": "float32", "engine": "eager", "matmul": 2048}
        spec["products"] = products
        merged = sides.measure(__file__, f"{model}, {products}", pythons, spec, options.repeat, ("step", "memory"))
        sections.append((model, InternVLChatConfig.from_pretrained(directory), spec, merged))

    results = [result for *_, merged in sections for result in merged.values()]
    peak = max(result.get("peak", 0) for result in results)
    lines = [*sides.heading("Fine-tuning", options, others, [f"matmul peak float32 {peak / 1e12:.2f} TFLOP/s"], results)]
    for model, config, spec, merged in sections:
        counts = parameter_counts(config)
        learned = sum(size for part, size in counts.items() if part != "vision")
        sizes = f"{sum(counts.values()) / 1e6:,.1f}M parameters, {learned / 1e6:,.1f}M learn"
        lines += ["", f"## {model}, products in {spec['products']} ({sizes})", ""]
        if options.layers:
            lines.append(f"With {options.layers} layers in the language model, not its own number.")
        lines += [
            f"{options.rows} x ({TILES} tiles of {config.num_image_token} tokens and {options.text} of text, {options.answer} "
            f"learned){', with recompute' if options.recompute else ''}; AdamW; {options.steps} steps after one."
        ]
        lines += sides.failures(merged)
        difference = apart(merged)
        lines += [f"Losses of both sides differ by {difference:.1e} at most."] if difference is not None else []
        limits = {"matmul peak": peak, "": None}
        lines += ["", *sides.table(ROWS, merged, lambda r, c=config, s=spec: figures(c, s, r), limits)]
    sides.publish(lines, "finetune", options.save)


if __name__ == "__main__":
    main()
