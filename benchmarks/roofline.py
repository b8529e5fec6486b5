"""Print the least time that each step of an answer can take on a device, for docs/performance.md.

  python benchmarks/roofline.py
      a table for the published sizes and some devices
  python benchmarks/roofline.py --operators
      how many operators Paddle runs for each step, counted on a small model

A step takes at least its FLOPs over the peak of matrix products, and its bytes over the bandwidth of memory; the larger one
bounds it. Nothing here is a measurement of the devices.
"""

import argparse
from pathlib import Path

from paddlemix.models.blocks.flops import decode_bytes, decoder_flops, parameter_bytes, vision_flops
from paddlemix.models.internvl2.configuration import InternVLChatConfig

# Vendors' figures: TFLOP/s of dense products in half precision with float32 sums, and memory bandwidth in GB/s.
DEVICES = {
    "V100 SXM2": (125, 900),
    "A100 80GB SXM": (312, 2039),
    "RTX 4090": (165, 1008),
    "Ascend 910B3": (313, 1600),
}
_300M = dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096, norm_type="layer_norm")
_300M |= dict(image_size=448, qkv_bias=True, qk_normalization=False)
_6B = dict(hidden_size=3200, num_hidden_layers=45, num_attention_heads=25, intermediate_size=12800, image_size=448)
_LANGUAGE = ("architectures", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
_LANGUAGE += ("intermediate_size", "vocab_size")
SIZES = {
    "InternVL2-1B": (_300M, (["Qwen2ForCausalLM"], 896, 24, 14, 2, 4864, 151655)),
    "InternVL2-2B": (_300M, (["InternLM2ForCausalLM"], 2048, 24, 16, 8, 8192, 92553)),
    "InternVL2-8B": (_300M, (["InternLM2ForCausalLM"], 4096, 32, 32, 8, 14336, 92553)),
    "InternVL2-26B": (_6B, (["InternLM2ForCausalLM"], 6144, 48, 48, 8, 16384, 92553)),
}
TILES, PROMPT = 13, 13 * 256 + 64  # a picture of twelve tiles and its thumbnail, and a question
DEMO_MODEL = Path(__file__).parents[1] / "paddlemix" / "demo_model"


def configuration(size):
    """The configuration of a published size, as far as its cost goes."""
    vision, language = SIZES[size]
    return InternVLChatConfig.from_dict(
        dict(vision_config=vision, llm_config={**dict(zip(_LANGUAGE, language)), "bias": False}, force_image_size=448)
    )


def roofline():
    """Print a table: milliseconds for the tower, prefill and a decode step, each with what bounds it."""
    print(f"{TILES} tiles, {PROMPT} tokens of prompt, bfloat16 (float16 on V100)\n")
    print("| model | device | vision, ms | prefill, ms | first token, ms | decode step, ms | tokens/s |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for size in SIZES:
        config = configuration(size)
        for name, (tflops, bandwidth) in DEVICES.items():

            def least(flops, size_in_bytes, tflops=tflops, bandwidth=bandwidth):
                return max(flops / tflops / 1e9, size_in_bytes / bandwidth / 1e6)

            vision = least(vision_flops(config, TILES), parameter_bytes(config, "bfloat16", ("vision", "projector")))
            prefill = least(decoder_flops(config, PROMPT), parameter_bytes(config, "bfloat16", ("decoder", "head")))
            step = least(decoder_flops(config, 1, PROMPT), decode_bytes(config, PROMPT, "bfloat16"))
            print(
                f"| {size} | {name} | {vision:.0f} | {prefill:.0f} | {vision + prefill:.0f} | {step:.2f} | {1000 / step:.0f} |"
            )


def count_operators():
    """Print how many operators each step runs on the bundled model, and how many of them a block does."""
    import numpy as np
    import paddle

    from paddlemix.models.blocks.language import KVCache
    from paddlemix.models.internvl2 import InternVLChatModel

    model = InternVLChatModel.from_pretrained(str(DEMO_MODEL), dtype="float32", engine="eager")
    language = model.language_model

    def decode(tokens):
        cache = KVCache(language.config, 1, 64, "float32")
        cache.reserve(16)

        def step():
            cache.truncate(16)
            hidden = language(language.embed(paddle.zeros([1, tokens], "int64")), cache=cache)
            return language.lm_head(hidden[:, -1])

        return step

    tile = np.zeros([1, 3, *[model.config.image_size] * 2], "float32")
    steps = {
        "vision tower and projector": (lambda: model.extract_feature(tile), model.vision_model.encoder.layers),
        "prefill": (decode(32), language.model.layers),
        "decode step": (decode(1), language.model.layers),
    }
    print("| step | operators of a block | all others |\n| --- | --- | --- |")
    for name, (step, blocks) in steps.items():
        step()  # tables of positions are made once
        blocks_run = _operators(step)
        last = blocks[-1]
        del blocks[len(blocks) - 1]
        of_a_block = blocks_run - _operators(step)  # what one block less saves
        blocks.append(last)
        print(f"| {name} | {of_a_block} | {blocks_run - of_a_block * len(blocks)} |")


def _operators(step):
    """Number of operators that Paddle runs in ``step()``."""
    import paddle

    paddle.set_flags({"FLAGS_low_precision_op_list": 1})
    paddle.base.core.clear_low_precision_op_list()
    with paddle.no_grad():
        step()
    calls = paddle.base.core.get_low_precision_op_list()
    paddle.set_flags({"FLAGS_low_precision_op_list": 0})
    return sum(int(count) for counts in calls.values() for count in str(counts).split(","))


def main():
    """Parse the command line and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operators", action="store_true", help="count operators instead")
    (count_operators if parser.parse_args().operators else roofline)()


if __name__ == "__main__":
    main()
