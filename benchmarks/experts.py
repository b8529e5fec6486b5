"""Time of a token in a mixture of experts, as its experts and those at work grow.

    python benchmarks/experts.py --save

InternVL3.5-30B-A3B's decoder (Qwen3-MoE: width 2,048, experts of 768) cut to a few blocks, on the CPU engine, one token after
the other. Weights are random, those of the experts one small constant: as many bytes are read. 128 experts of four blocks take
10 GB.
"""

import argparse
import datetime
import os
import statistics
import time

import machine
import numpy as np
import paddle
import sides

from paddlemix.kernels import cpu as kernels
from paddlemix.models.blocks import engine
from paddlemix.models.blocks.configuration import LanguageConfig
from paddlemix.models.blocks.language import KVCache, LanguageModel
from paddlemix.training.published import published_config

PROMPT, TOKENS = 64, 32
MODEL, WIDTH, INNER = "InternVL3_5-30B-A3B", 2048, 768


def make(layers, count, active, dtype):
    """The decoder with ``count`` experts of which ``active`` work, packed for the engine, without a vocabulary to speak of."""
    values = published_config(MODEL).llm_config.to_dict()
    values |= {"num_experts": count, "num_experts_per_tok": active, "num_hidden_layers": layers, "vocab_size": 256}
    with paddle.LazyGuard():
        model = LanguageModel(LanguageConfig.from_dict(values))
    for name, parameter in model.named_parameters():
        shape = parameter.shape
        if ".experts." in name:
            value = paddle.full(shape, 1e-3)
        else:
            value = paddle.to_tensor(np.random.default_rng(0).standard_normal(shape, "float32") * np.float32(0.02))
        value._share_buffer_to(parameter)
    model.eval()
    for i, layer in enumerate(model.model.layers):
        model.model.layers[i] = engine._DecoderLayer(layer, dtype)
    return model


@paddle.no_grad()
def token_time(model, repeat):
    """Median seconds that the processor is at work for a decode step, whoever else uses the machine."""
    width, times = model.config.hidden_size, []
    random = np.random.default_rng(0)
    cache = KVCache(model.config, 1, PROMPT + TOKENS * repeat, "float32")
    model(paddle.to_tensor(random.standard_normal([1, PROMPT, width], "float32")), cache=cache)
    for _ in range(TOKENS * repeat):
        token = paddle.to_tensor(random.standard_normal([1, 1, width], "float32"))
        start = time.process_time()
        model(token, cache=cache).numpy()
        times.append(time.process_time() - start)
    return statistics.median(times)


def main():
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4, help="blocks (default: %(default)s)")
    parser.add_argument(
        "--experts", default="16/8,32/8,64/8,128/8,128/4,128/2", help="in all/at work, ... (default: %(default)s)"
    )
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="default: %(default)s")
    parser.add_argument("--repeat", type=int, default=1, help=f"times {TOKENS} steps (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--save", action="store_true", help="also write benchmarks/results/DATE-experts.md")
    args = parser.parse_args()
    kernels.set_num_threads(args.threads)
    lines = ["| experts | at work | their weights, millions | of those at work | ms a token |", "|--:|--:|--:|--:|--:|"]
    for pair in args.experts.split(","):
        count, active = map(int, pair.split("/"))
        model = make(args.layers, count, active, args.dtype)
        taken, each = token_time(model, args.repeat), 3 * WIDTH * INNER * args.layers / 1e6
        lines.append(f"| {count} | {active} | {each * count:,.0f} | {each * active:,.0f} | {taken * 1e3:.1f} |")
        print(lines[-1], flush=True)
        del model
    heading = [
        "# A token in a mixture of experts",
        "",
        f"- machine: {machine.cpu_name()}, {kernels.num_threads()} threads, {os.cpu_count()} cores; commit {machine.commit()}; "
        f"{datetime.date.today()}",
        f"- {MODEL}'s decoder cut to {args.layers} blocks, {args.dtype}, without head; processor time, "
        f"median of {TOKENS * args.repeat} steps",
        "",
    ]
    sides.publish([*heading, *lines], "experts", args.save)


if __name__ == "__main__":
    main()
