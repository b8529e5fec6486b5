"""What scale compression costs in memory: `python benchmarks/minimonkey.py [--layers 3] [--engine eager]`.

InternVL2-2B's shapes with random weights and few layers, which peaks do not depend on: a prompt of 20 tiles (5,120 picture
tokens) and a question is read with and without compression, each in a process of its own, whose peak is compared.
"""

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

TILES, GRID, QUESTION = 20, (4, 3), 40  # 7 tiles of the coarser scale, 12 of the finer one, and a thumbnail


def child(layers, compress):
    """Read the prompt; prints the peak of resident memory in MB before and after, and seconds."""
    import dataclasses

    import numpy as np
    import paddle

    from paddlemix.models.blocks.generation import GenerationConfig, generate_tokens
    from paddlemix.models.blocks.layers import take_rows
    from paddlemix.models.minimonkey import MiniMonkeyChatModel
    from paddlemix.training.published import published_config

    paddle.seed(0)
    config = published_config("InternVL2-2B")
    llm = dataclasses.replace(config.llm_config, num_hidden_layers=layers)
    vision = dataclasses.replace(config.vision_config, num_hidden_layers=1)
    model = MiniMonkeyChatModel(dataclasses.replace(config, llm_config=llm, vision_config=vision))
    model.eval()
    model.img_context_token_id = 92546
    count = TILES * config.num_image_token
    ids = [1] * 40 + [model.img_context_token_id] * count + [7] * QUESTION
    with paddle.no_grad():
        embeds = paddle.randn([1, len(ids), llm.hidden_size]) * 0.02
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
        began = time.perf_counter()
        if compress:
            dropped = model.dropped_positions(embeds, ids, GRID)
            embeds = take_rows(embeds[0], np.delete(np.arange(len(ids)), dropped)).unsqueeze(0)
        next(generate_tokens(model.language_model, embeds, GenerationConfig(max_new_tokens=1, do_sample=False)))
    print(before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3, time.perf_counter() - began, embeds.shape[1])


def main():
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=3, help="blocks of the language model (default: %(default)s)")
    parser.add_argument("--child", choices=["True", "False"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args.layers, args.child == "True")
    print("| | peak beside the model (MB) | positions that are generated from | seconds |")
    print("| --- | --: | --: | --: |")
    for name, compress in (("as it is", False), ("compressed", True)):
        command = [sys.executable, __file__, "--child", str(compress), "--layers", str(args.layers)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        before, after, seconds, positions = map(float, done.stdout.splitlines()[-1].split())
        print(f"| {name} | {after - before:,.0f} | {positions:,.0f} | {seconds:.1f} |")


if __name__ == "__main__":
    main()
