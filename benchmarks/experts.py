"""Time of a token in a mixture of experts, as its experts and those at work grow.

python benchmarks/experts.py --save

InternVL3.5-30B-A3B's decoder (Qwen3-MoE: width 2,048, experts of 768) cut to a few blocks, on the CPU engine, one token after the
other. Weights of experts are one constant, those of routers and attention random, which changes no time: as many bytes are read.
"""

import argparse
import copy
import datetime
import statistics
import time

import machine
import numpy as np
import paddle
from machine import RESULTS

from paddlemix.models.blocks import engine
from paddlemix.models.blocks.experts import GatedMLP
from paddlemix.models.blocks.language import KVCache, LanguageModel
from paddlemix.training.published import published_config

PROMPT, TOKENS = 64, 32


def make(layers, count, active, dtype):
    """The decoder with ``count`` experts of which ``active`` work, packed for the engine, without a vocabulary to speak of."""
    config = copy.deepcopy(published_config("InternVL3_5-30B-A3B").llm_config)
    config.num_hidden_layers, config.vocab_size = layers, 256
    config.experts = type(config.experts)(**{**vars(config.experts), "count": count, "active": active})
    with paddle.LazyGuard():
        model = LanguageModel(config)
    for i, layer in enumerate(model.model.layers):
        constant = {id(p) for mlp in layer.sublayers() if isinstance(mlp, GatedMLP) for p in mlp.parameters()}
        for parameter in layer.parameters():
            if id(parameter) in constant:
                parameter._initializer = None
            parameter.initialize() if id(parameter) not in constant else fill(parameter)
        model.model.layers[i] = engine._DecoderLayer(layer, dtype)
    for parameter in model.parameters():
        if not parameter._is_initialized():
            parameter.initialize()
    model.eval()
    return model


def fill(parameter):
    """Give a parameter that was built lazily one constant, which takes no time to draw."""
    parameter._init_func = None
    parameter.get_tensor().set(np.full(parameter.shape, 0.01, "float32"), paddle.CPUPlace())


@paddle.no_grad()
def token_time(model, repeat):
    """Median seconds of a decode step."""
    config, times = model.config, []
    random = np.random.default_rng(0)
    cache = KVCache(config, 1, PROMPT + TOKENS * repeat, "float32")
    model(paddle.to_tensor(random.standard_normal([1, PROMPT, config.hidden_size]).astype("float32")), cache=cache)
    for _ in range(TOKENS * repeat):
        token = paddle.to_tensor(random.standard_normal([1, 1, config.hidden_size]).astype("float32"))
        start = time.perf_counter()
        model(token, cache=cache).numpy()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", default="16/8,32/8,64/8,128/8,128/4,128/2", help="in all/at work, ...")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--save", action="store_true", help="write results/DATE-experts.md")
    args = parser.parse_args()
    width, inner = 2048, 768
    lines = ["| experts | at work | parameters of experts, millions | at work, millions | ms a token |", "|--:|--:|--:|--:|--:|"]
    for pair in args.experts.split(","):
        count, active = map(int, pair.split("/"))
        model = make(args.layers, count, active, args.dtype)
        taken = token_time(model, args.repeat)
        each = 3 * width * inner * args.layers / 1e6
        lines.append(f"| {count} | {active} | {each * count:,.0f} | {each * active:,.0f} | {taken * 1e3:.1f} |")
        print(lines[-1], flush=True)
        del model
    print("\n".join(lines))
    if args.save:
        text = f"# A token in a mixture of experts\n\n{machine.describe()}\n\nInternVL3.5-30B-A3B's decoder cut to {args.layers} "
        text += f"blocks, {args.dtype}, median of {TOKENS * args.repeat} steps.\n\n" + "\n".join(lines) + "\n"
        path = RESULTS / f"{datetime.date.today()}-experts.md"
        path.write_text(text, encoding="utf-8")
        print(f"written to {path}")


if __name__ == "__main__":
    main()
