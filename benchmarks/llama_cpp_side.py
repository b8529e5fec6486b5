"""llama.cpp's side of fewbits.py: a decoder of the same shapes with random weights, where llama-cpp-python and gguf are.

    pip install llama-cpp-python==0.3.36 gguf==0.19.0        (built from source, needs g++ and cmake)

Started by fewbits.py with a specification as JSON; prints one line of JSON. Needs nothing of paddlemix.
"""

import json
import os
import resource
import sys
import time
from pathlib import Path


def write_gguf(path, shapes, kind):
    """A qwen2 model of ``shapes`` with its matrices in ``kind`` (BF16, Q8_0, Q4_0)."""
    import gguf
    import numpy as np
    from gguf.quants import quantize

    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(str(path) + ".tmp", "qwen2")
    writer.add_block_count(shapes["layers"])
    writer.add_context_length(32768)
    writer.add_embedding_length(shapes["width"])
    writer.add_feed_forward_length(shapes["hidden"])
    writer.add_head_count(shapes["heads"])
    writer.add_head_count_kv(shapes["kv_heads"])
    writer.add_rope_freq_base(1e6)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(shapes["vocabulary"])
    writer.add_tokenizer_model("none")

    def matrix(name, out, inputs, kind=kind):
        values = random.standard_normal([out, inputs], np.float32) * np.float32(0.02)
        number = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(name, quantize(values, number), raw_dtype=number)

    def vector(name, size, value):
        writer.add_tensor(name, np.full(size, value, np.float32))

    width, kv = shapes["width"], shapes["kv_heads"] * shapes["width"] // shapes["heads"]
    # Embeddings and head in 8 bits where the rest has fewer, as on our side.
    outer = "Q8_0" if kind == "Q4_0" else kind
    matrix("token_embd.weight", shapes["vocabulary"], width, outer)
    for i in range(shapes["layers"]):
        for name, out in (("q", width), ("k", kv), ("v", kv)):
            matrix(f"blk.{i}.attn_{name}.weight", out, width)
            vector(f"blk.{i}.attn_{name}.bias", out, 0)
        matrix(f"blk.{i}.attn_output.weight", width, width)
        matrix(f"blk.{i}.ffn_gate.weight", shapes["hidden"], width)
        matrix(f"blk.{i}.ffn_up.weight", shapes["hidden"], width)
        matrix(f"blk.{i}.ffn_down.weight", width, shapes["hidden"])
        vector(f"blk.{i}.attn_norm.weight", width, 1)
        vector(f"blk.{i}.ffn_norm.weight", width, 1)
    vector("output_norm.weight", width, 1)
    matrix("output.weight", shapes["vocabulary"], width, outer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(str(path) + ".tmp", path)


def main():
    """Measure what the specification says."""
    spec = json.loads(sys.argv[1])
    path = Path(spec["folder"], f"{spec['kind']}.gguf")
    if not path.exists():
        write_gguf(path, spec["shapes"], spec["kind"])
    import llama_cpp

    llama_cpp.llama_backend_init()
    silent = llama_cpp.llama_log_callback(lambda *_: None)  # must outlive what calls it
    llama_cpp.llama_log_set(silent, None)
    start = time.perf_counter()
    model = llama_cpp.llama_load_model_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
    options = llama_cpp.llama_context_default_params()
    options.n_ctx, options.n_batch, options.n_ubatch = max(spec["depths"]) + spec["decode"] + 64, 512, 512
    options.n_threads = options.n_threads_batch = spec["threads"]
    context = llama_cpp.llama_new_context_with_model(model, options)
    if not context:
        raise SystemExit("llama.cpp makes no context of this model")
    result = {"load": time.perf_counter() - start}

    def run(tokens):
        for at in range(0, len(tokens), 512):
            part = (llama_cpp.llama_token * len(tokens[at : at + 512]))(*tokens[at : at + 512])
            if llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(part, len(part))):
                raise SystemExit("llama.cpp cannot compute this")

    def clear():
        if hasattr(llama_cpp, "llama_memory_clear"):
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        else:
            llama_cpp.llama_kv_cache_clear(context)

    run([1, 2, 3])
    for depth in spec["depths"]:
        clear()
        prompt = [i * 7919 % spec["shapes"]["vocabulary"] for i in range(max(depth, 1))]
        start = time.perf_counter()
        run(prompt)
        if depth:
            result[f"prefill {depth}"] = depth / (time.perf_counter() - start)
        times = []
        for i in range(spec["decode"]):
            start = time.perf_counter()
            run([i + 1])
            times.append(time.perf_counter() - start)
        result[f"decode {depth}"] = 1 / sorted(times)[len(times) // 2]
    result["memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    print(json.dumps(result))


if __name__ == "__main__":
    main()
