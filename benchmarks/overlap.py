"""Print what it saves to send gradients and weights while something is computed, over a link that is slowed down on purpose.

  python benchmarks/overlap.py [--sharding stage1 stage3]

Two processes of this machine train a small model. Each of their messages takes as long as its bytes at a bandwidth at which a
step sends for as long as the passes compute in which it sends: the backward pass, and with stages of ZeRO the forward pass too
(or at --bandwidth), by a sleep before the real one. Nothing else may run on the machine. Each line is the median of several
pairs of runs. The command ends with status 1 where a step takes more than --at_most of one that sends nothing meanwhile.
"""

import argparse
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STAGES = ("", "stage1", "stage2", "stage3")
PROCESSES = 2


def train(options):
    """What one of the processes finds, printed as a line of JSON behind ``@``."""
    import numpy as np
    import paddle

    from paddlemix.models.internvl2 import InternVLChatConfig, InternVLChatModel
    from paddlemix.parallel.groups import Group
    from paddlemix.training.arguments import ModelArguments, PreTrainingArguments
    from paddlemix.training.building import prepare
    from paddlemix.training.processes import Processes
    from paddlemix.training.trainer import Trainer

    vision = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, image_size=112)
    vision.update(qkv_bias=True, qk_normalization=False, norm_type="layer_norm")
    llm = dict(architectures=["Qwen2ForCausalLM"], vocab_size=500, hidden_size=192, intermediate_size=576)
    llm.update(num_hidden_layers=8, num_attention_heads=6, num_key_value_heads=2)
    config = InternVLChatConfig.from_dict({"vision_config": vision, "llm_config": llm, "ps_version": "v2"})
    processes = Processes()
    args = PreTrainingArguments(
        output_dir="x",
        sharding=options.worker,
        lr_scheduler_type="constant",
        learning_rate=1e-4,
        overlap_communication=not options.no_overlap,
    )
    paddle.seed(0)
    model = InternVLChatModel(config)
    model.img_context_token_id, tiles = 7, 2
    trained = prepare(model, ModelArguments("x", freeze_backbone=True), args.recompute)
    sizes = {name: p.size for name, p in model.named_parameters()}
    trainer = Trainer(model, trained, args, processes, 99)
    rng = np.random.default_rng(processes.rank)
    ids = rng.integers(10, 400, (1, options.tokens))
    ids[0, 5 : 5 + 16 * tiles] = 7
    batch = dict(pixel_values=rng.normal(size=(tiles, 3, 112, 112)).astype("float32"), input_ids=ids, labels=ids, names=[])
    batch["attention_mask"] = np.ones_like(ids)
    group, losses, spent = processes.data, [], {}

    def timed(name, function):
        def call(*given, **named):
            began = time.perf_counter()
            try:
                return function(*given, **named)
            finally:
                spent[name] = spent.get(name, 0.0) + time.perf_counter() - began

        return call

    trainer._loss, trainer.optimizer.step = timed("forward", trainer._loss), timed("update", trainer.optimizer.step)

    def steps(count):
        """The median time of a step; what the last has left on its way counts with it."""
        spent.clear()
        edges = [time.perf_counter()]
        for number in range(1, count + 1):
            losses.append(trainer.step(len(losses), [batch])[0])
            if number == count:
                trainer.optimizer.arrive()
            edges.append(time.perf_counter())
        return statistics.median(np.diff(edges))

    steps(2)
    group.bytes.clear()
    group.calls.clear()
    seconds = steps(3)
    found = {"bytes": dict(group.bytes), "calls": dict(group.calls), "steps": 3, "sizes": sizes, "trained": list(trained)}
    found |= {"sends": len(trainer.optimizer._order or ()), "blocks": config.llm_config.num_hidden_layers}
    if options.slow:
        sending = seconds - (spent["update"] + (0 if options.worker else spent["forward"])) / 3
        bandwidth = options.bandwidth or sum(group.bytes.values()) / 3 / sending
        plain = Group._now

        def slowed(self, name, tensor, *more):
            time.sleep(tensor.size * tensor.element_size() / bandwidth)
            plain(self, name, tensor, *more)

        Group._now = slowed
        steps(1)
        found |= {"bandwidth": bandwidth, "seconds": steps(options.steps)}
    print("@" + json.dumps({**found, "losses": losses}), flush=True)


def run(stage, *more, folder):
    """What the first of the processes found."""
    logs = Path(folder) / "logs"
    for log in logs.glob("workerlog.*"):
        log.unlink()  # the launcher appends
    command = [sys.executable, "-m", "paddle.distributed.launch", "--nproc_per_node", str(PROCESSES), "--log_dir", str(logs)]
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([*command, __file__, "--worker", stage, *more], env=environment, capture_output=True, text=True)
    said = (logs / "workerlog.0").read_text(encoding="utf-8") if (logs / "workerlog.0").exists() else done.stderr
    told = re.findall(r"^@(.+)$", said, re.MULTILINE)
    if done.returncode or not told:
        raise SystemExit(f"error: the processes ended with status {done.returncode}: {said[-2000:]}")
    return json.loads(told[0])


def compare(stage, options, folder):
    """What :func:`run` gave without and with sending meanwhile, over the same link."""
    more = ["--slow", "--tokens", str(options.tokens), "--steps", str(options.steps)]
    given = [] if options.bandwidth is None else ["--bandwidth", str(options.bandwidth)]
    without = run(stage, *more, *given, "--no_overlap", folder=folder)
    return without, run(stage, *more, "--bandwidth", str(without["bandwidth"]), folder=folder)


def line(stage, pairs):
    """(a row of the table, the median ratio) of what :func:`compare` gave several times."""
    without, overlapped = sorted(pairs, key=lambda pair: pair[1]["seconds"] / pair[0]["seconds"])[len(pairs) // 2]
    ratio = statistics.median(b["seconds"] / a["seconds"] for a, b in pairs)
    equal = all(abs(y / x - 1) < 1e-6 for a, b in pairs for x, y in zip(a["losses"], b["losses"], strict=True))
    sent = sum(without["bytes"].values()) / without["steps"] / 1e6
    seconds = f"{without['seconds']:.3f} | {overlapped['seconds']:.3f}"
    told = f"{sent:.1f} | {without['bandwidth'] / 1e6:.0f} | {seconds} | {ratio:.2f}"
    return f"| {stage or 'none'} | {told} | {'equal' if equal else 'DIFFER'} |", ratio if equal else math.inf


def make_parser():
    """The command's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--sharding", nargs="*", default=STAGES, choices=STAGES, help="stages of ZeRO (default: none and all three)")
    add("--tokens", type=int, default=1024, help="of a sample (default: %(default)s)")
    add("--steps", type=int, default=5, help="that are timed (default: %(default)s)")
    add("--repeats", type=int, default=3, help="pairs of runs (default: %(default)s)")
    add("--at_most", type=float, default=0.7, help="of a step that sends nothing meanwhile (default: %(default)s)")
    add("--bandwidth", type=float, help="bytes a second of the link (default: see above)")
    add("--worker", help=argparse.SUPPRESS)
    add("--slow", action="store_true", help=argparse.SUPPRESS)
    add("--no_overlap", action="store_true", help=argparse.SUPPRESS)
    return parser


def main(argv=None):
    """Print the table."""
    options = make_parser().parse_args(argv)
    if options.worker is not None:
        return train(options)
    print("| sharding | MB a step | link, MB/s | step without, s | with, s | with / without | losses |")
    print("| --- | --: | --: | --: | --: | --: | --- |")
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for stage in options.sharding:
            told, ratio = line(stage, [compare(stage, options, folder) for _ in range(options.repeats)])
            worst = max(worst, ratio)
            print(told, flush=True)
    return int(worst > options.at_most)


if __name__ == "__main__":
    sys.exit(main())
