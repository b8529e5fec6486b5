"""llama.cpp's side of inference.py: a decoder of the same shapes with random weights, where llama-cpp-python and gguf are.

    pip install llama-cpp-python==0.3.36 gguf==0.19.0        (built from source, needs g++ and cmake)

Started by inference.py with a specification as JSON; prints one line of JSON. Needs nothing of paddlemix.
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

    def context_of(sequences, positions):
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch, options.n_seq_max = sequences * positions, 512, 512, sequences
        options.n_threads = options.n_threads_batch = spec["threads"]
        context = llama_cpp.llama_new_context_with_model(model, options)
        if not context:
            raise SystemExit("llama.cpp makes no context of this model")
        return context

    depths = [*spec["depths"], spec["prompt"]]
    context = context_of(1, max(depths) + spec["decode"] + 64)
    result = {"load": time.perf_counter() - start}
    vocabulary = spec["shapes"]["vocabulary"]

    def check(status):
        if status:
            raise SystemExit("llama.cpp cannot compute this")

    def run(tokens):
        for at in range(0, len(tokens), 512):
            part = (llama_cpp.llama_token * len(tokens[at : at + 512]))(*tokens[at : at + 512])
            check(llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(part, len(part))))

    def clear():
        if hasattr(llama_cpp, "llama_memory_clear"):
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        else:
            llama_cpp.llama_kv_cache_clear(context)

    def measure(depth):
        """Tokens a second of a prompt and of what follows."""
        clear()
        start, times = time.perf_counter(), []
        run([i * 7919 % vocabulary for i in range(max(depth, 1))])
        prefill = max(depth, 1) / (time.perf_counter() - start)
        for i in range(spec["decode"]):
            start = time.perf_counter()
            run([i + 1])
            times.append(time.perf_counter() - start)
        return prefill, 1 / sorted(times)[len(times) // 2]

    def together(sequences, depth=64):
        """Tokens a second of some sequences that are decoded together."""
        context = context_of(sequences, depth + spec["decode"] + 64)
        batch, times = llama_cpp.llama_batch_init(512, 0, 1), []

        def step(entries):
            batch.n_tokens = len(entries)
            for i, (sequence, position) in enumerate(entries):
                batch.token[i], batch.pos[i], batch.n_seq_id[i] = (7919 * position + sequence) % vocabulary, position, 1
                batch.seq_id[i][0], batch.logits[i] = sequence, 1
            start = time.perf_counter()
            check(llama_cpp.llama_decode(context, batch))
            return time.perf_counter() - start

        for sequence in range(sequences):
            step([(sequence, position) for position in range(depth)])
        times = [step([(sequence, depth + i) for sequence in range(sequences)]) for i in range(spec["decode"])]
        llama_cpp.llama_batch_free(batch)
        llama_cpp.llama_free(context)
        return sequences / sorted(times)[len(times) // 2]

    run([1, 2, 3])
    measured = {depth: measure(depth) for depth in dict.fromkeys(depths)}
    result["prefill"] = measured[spec["prompt"]][0]
    result |= {f"decode {depth}": measured[depth][1] for depth in spec["depths"]}
    if "batch" in spec["rows"]:
        result |= {f"batch {count}": together(count) for count in spec["batches"]}
    result["memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    print(json.dumps(result))


if __name__ == "__main__":
    main()
