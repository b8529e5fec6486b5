"""See a wrong habit go by preference training (MPO), on this machine's CPU in a few minutes.

  python paddlemix/examples/internvl2/demo_mpo/run.py

draws scenes; teaches the demo model by fine-tuning to say the wrong color; and trains it on pairs of the right and the wrong
answer, by the script of InternVL2.5's preference training. Before and after, held-out scenes are asked about: for colors, and
for other things, which it should still know. The margin is how much more likely the right answer is than the wrong one, as a
difference of log-probabilities. Results are in ``work_dirs/demo_mpo``: ``model`` is a checkpoint like any other,
``rewards.png`` shows the run.
"""

import argparse
import json
import time
from pathlib import Path

from paddlemix.commands import Parser
from paddlemix.errors import command_main
from paddlemix.examples.internvl2 import cli
from paddlemix.examples.internvl2.demo_model.evaluate import evaluate
from paddlemix.examples.internvl2.demo_mpo.scenes import write_data
from paddlemix.examples.internvl2.demo_training import EXAMPLES, run_script

SCRIPT = EXAMPLES / "shell/internvl2.5_mpo/preference_optimization/internvl2_5_1b_qwen2_5_0_5b_dynamic_res_mpo.sh"
# What differs from the scripts' settings: a model of 84-pixel tiles and of the first InternVL2's template, so small that it
# bears a high learning rate; and steps so short that workers and a dashboard would only be in the way.
FLAGS = """
    --conv_style Hermes-2 --force_image_size 84 --max_dynamic_patch 1 --freeze_backbone True --drop_path_rate 0
    --dataloader_num_workers 0 --report_to none --recompute False --save_strategy no --logging_steps 1
    --overwrite_output_dir True --num_train_epochs 2
""".split()
BATCH = 16


def accuracy(directory, meta, device):
    """Shares of the held-out questions for colors, and of the others, that a model answers exactly right."""
    (table,), _ = evaluate(directory, [str(meta)], device=device)
    return [right / asked for right, asked in (table["color"], table["other"])]


def margin(directory, meta, device, batch=40):
    """Mean over held-out pairs of the log-probability of the right answer less that of the wrong one."""
    import paddle

    from paddlemix import device as devices
    from paddlemix.datasets.encoding import DataOptions
    from paddlemix.datasets.preference import PairCollator, PreferenceEncoder, parse_preference
    from paddlemix.datasets.records import read_meta
    from paddlemix.models.blocks.inputs import pixel_tensor
    from paddlemix.models.internvl2 import InternVLChatModel, load_tokenizer
    from paddlemix.training.preference import log_probabilities

    devices.set_device(device)
    model, tokenizer = InternVLChatModel.from_pretrained(directory, engine="eager"), load_tokenizer(directory)
    model.set_tokenizer(tokenizer)
    encoder = PreferenceEncoder(tokenizer, model.config.template, DataOptions.from_config(model.config))
    (source,) = read_meta(meta, parse_preference)
    samples = [encoder.encode(source.read(i)) | {"name": source.place(i), "bad": []} for i in range(len(source))]
    total = 0.0
    for start in range(0, len(samples), batch):
        data = PairCollator(tokenizer.pad_token_id or 0)(samples[start : start + batch])
        with paddle.no_grad():
            sums, _, _, _ = log_probabilities(model, data, pixel_tensor(data["pixel_values"]))
        total += float(sums[: data["pairs"]].sum() - sums[data["pairs"] :].sum())
    return total / len(samples)


def draw_rewards(log, path):
    """Draw what a ``train_log.jsonl`` of preference training says of rewards, and of pairs that are told apart, as a PNG."""
    from matplotlib.figure import Figure

    rows = [json.loads(line) for line in Path(log).read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if "rewards/margins" in row and "loss" in row]
    steps = [row["step"] for row in rows]
    figure = Figure(figsize=(11, 4), layout="constrained")
    rewards, told = figure.subplots(1, 2)
    for name in ("chosen", "rejected", "margins"):
        rewards.plot(steps, [row[f"rewards/{name}"] for row in rows], label=name)
    rewards.set(xlabel="step", title="rewards: gains over the start, times beta")
    rewards.legend(frameon=False)
    told.plot(steps, [row["rewards/accuracies"] for row in rows], label="rewards/accuracies")
    told.plot(steps, [row["loss"] for row in rows], label="loss")
    told.set(xlabel="step", ylim=(0, None), title="share of pairs whose right answer gained more; loss")
    told.legend(frameon=False)
    figure.savefig(path, dpi=120)


@command_main
def main():
    """Parse the command line and run."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="work_dirs/demo_mpo", help="default: %(default)s")
    parser.add_argument("--device", default="cpu", help="cpu, gpu, npu or another Paddle device (default: %(default)s)")
    parser.add_argument("--scale", type=float, default=1.0, help="how many scenes, as a share of the usual (default: 1)")
    args = parser.parse_args()
    output, start = Path(args.output_dir).resolve(), time.monotonic()
    metas = write_data(output / "data", args.scale)

    def measure(name, directory):
        colors, others = accuracy(directory, metas["heldout"], args.device)
        difference = margin(directory, metas["heldout_pairs"], args.device)
        print(f"{name}: colors {colors:.1%} right, other questions {others:.1%}, margin {difference:+.2f}", flush=True)
        return colors, others, difference

    common = dict(batch=BATCH, device=args.device)
    measure("the demo model", str(cli.DEMO_MODEL))
    flags = [*FLAGS, "--learning_rate", "1.5e-3"]
    run_script(flags, model=cli.DEMO_MODEL, meta=metas["habit"], output_dir=output / "habit", **common)
    before = measure("with a wrong habit", str(output / "habit"))
    flags = [*FLAGS, "--learning_rate", "1e-3"]
    run_script(flags, model=output / "habit", meta=metas["pairs"], output_dir=output / "model", script=SCRIPT, **common)
    after = measure("after preference training", str(output / "model"))
    draw_rewards(output / "model" / "train_log.jsonl", output / "rewards.png")
    minutes = (time.monotonic() - start) / 60
    print(
        f"held-out colors before: {before[0]:.1%}, after: {after[0]:.1%}; margin before: {before[2]:+.2f}, after: "
        f"{after[2]:+.2f}; {minutes:.1f} minutes in all"
    )
    picture = output / "data" / "heldout" / "0000.png"
    question = json.loads((output / "data" / "heldout.jsonl").read_text().splitlines()[0])["conversations"][0]["value"]
    print(f"curves: {output / 'rewards.png'}; model: {output / 'model'}; try it:")
    print(
        f"  python paddlemix/examples/internvl2/chat_demo.py --model_name_or_path {output / 'model'} "
        f'--image_path {picture} --text "{question.splitlines()[-1]}"'
    )


if __name__ == "__main__":
    main()
