"""Random weights of a checkpoint's decoder shapes as GGUF, for llama.cpp: python llama_weights.py CONFIG.json OUT.gguf f32|bf16

It runs in llama.cpp's environment (packages gguf and numpy) and imports nothing of ours. Tokens are bytes and fillers: what is
measured is how fast, not what is said.
"""

import json
import sys
from pathlib import Path

import gguf
import numpy as np


def byte_names():
    """The 256 tokens of bytes, under the names that byte-level BPE gives them."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    names, hidden = {byte: chr(byte) for byte in shown}, 0
    for byte in range(256):
        if byte not in names:
            names[byte] = chr(256 + hidden)
            hidden += 1
    return [names[byte] for byte in range(256)]


def main():
    """Write the file."""
    config, target, kind = json.loads(Path(sys.argv[1]).read_text())["llm_config"], *sys.argv[2:4]
    width, heads, inner = config["hidden_size"], config["num_attention_heads"], config["intermediate_size"]
    few, vocabulary, layers = config.get("num_key_value_heads") or heads, config["vocab_size"], config["num_hidden_layers"]
    head = config.get("head_dim") or width // heads
    writer, draw = gguf.GGUFWriter(target, "qwen2"), np.random.default_rng(0)
    writer.add_context_length(config.get("max_position_embeddings", 4096))
    writer.add_embedding_length(width)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(few)
    writer.add_layer_norm_rms_eps(config.get("rms_norm_eps", 1e-6))
    writer.add_rope_freq_base(config.get("rope_theta", 10000.0))
    writer.add_rope_dimension_count(head)
    names = byte_names()
    tokens = [*names, *(f"<filler {i}>" for i in range(vocabulary - 257)), "<end>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (vocabulary - 1) + [3])
    writer.add_token_merges([f"{names[116]} {names[104]}"])
    writer.add_eos_token_id(vocabulary - 1)

    def add(name, *shape, ones=False):
        values = np.ones(shape, np.float32) if ones else draw.standard_normal(shape, np.float32) * np.float32(0.02)
        if kind == "bf16" and len(shape) > 1:
            bits = (values.view(np.uint32) >> 16).astype(np.uint16)
            return writer.add_tensor(name, bits.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
        return writer.add_tensor(name, values)

    add("token_embd.weight", vocabulary, width)
    add("output_norm.weight", width, ones=True)
    add("output.weight", vocabulary, width)
    for i in range(layers):
        for name, rows in (("q", heads * head), ("k", few * head), ("v", few * head)):
            add(f"blk.{i}.attn_{name}.weight", rows, width)
            add(f"blk.{i}.attn_{name}.bias", rows)
        add(f"blk.{i}.attn_output.weight", width, heads * head)
        add(f"blk.{i}.attn_norm.weight", width, ones=True)
        add(f"blk.{i}.ffn_norm.weight", width, ones=True)
        add(f"blk.{i}.ffn_gate.weight", inner, width)
        add(f"blk.{i}.ffn_up.weight", inner, width)
        add(f"blk.{i}.ffn_down.weight", width, inner)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
