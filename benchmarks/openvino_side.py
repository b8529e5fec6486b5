"""OpenVINO's side of inference.py: graphs of the same shapes with random weights, where openvino and nncf are (make openvino).

A decoder with its cache as state, as exporters write it, with weights that NNCF compresses to 8 or 4 bits; a vision tower with
its projector, which NNCF quantises to 8 bits, activations too. Started by inference.py with a specification as JSON; prints one
line of JSON. Needs nothing of paddlemix.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import openvino as ov
from openvino import opset13 as op

CALIBRATION = 2  # random tiles


def constant(values, dtype=np.float32):
    return op.constant(np.asarray(values, dtype))


class Weights:
    """Random matrices, made in order."""

    def __init__(self):
        self.random = np.random.default_rng(0)

    def linear(self, x, inputs, outputs, bias=True):
        weight = self.random.standard_normal([outputs, inputs], np.float32) * np.float32(0.02)
        y = op.matmul(x, constant(weight), False, True)
        return op.add(y, constant(np.zeros([1, 1, outputs]))) if bias else y


def heads(x, count, width):
    """``[B, N, count * width] -> [B, count, N, width]``."""
    x = op.reshape(x, constant([0, 0, count, width], np.int64), True)
    return op.transpose(x, constant([0, 2, 1, 3], np.int64))


def merged(x, width):
    return op.reshape(op.transpose(x, constant([0, 2, 1, 3], np.int64)), constant([0, 0, width], np.int64), True)


def layer_norm(x, width):
    x = op.mvn(x, constant([-1], np.int64), True, 1e-6, "inside_sqrt")
    return op.add(op.multiply(x, constant(np.ones([1, 1, width]))), constant(np.zeros([1, 1, width])))


def rms_norm(x, width):
    mean = op.reduce_mean(op.power(x, constant([[[2.0]]])), constant([-1], np.int64), True)
    scale = op.power(op.add(mean, constant([[[1e-6]]])), constant([[[-0.5]]]))
    return op.multiply(op.multiply(x, scale), constant(np.ones([1, 1, width])))


def vision_graph(shapes):
    """``[1, 3, S, S]`` pixels -> picture features."""
    weights, width, patch, size = Weights(), shapes["width"], shapes["patch"], shapes["size"]
    side = size // patch
    pixels = op.parameter([1, 3, size, size], np.float32, "pixels")
    kernel = weights.random.standard_normal([width, 3, patch, patch], np.float32) * np.float32(0.02)
    x = op.convolution(pixels, constant(kernel), [patch] * 2, [0, 0], [0, 0], [1, 1])
    x = op.transpose(op.reshape(x, constant([1, width, side * side], np.int64), False), constant([0, 2, 1], np.int64))
    x = op.concat([constant(np.zeros([1, 1, width])), x], 1)
    x = op.add(x, constant(weights.random.standard_normal([1, side * side + 1, width], np.float32)))
    for _ in range(shapes["layers"]):
        y = layer_norm(x, width)
        q, k, v = (heads(weights.linear(y, width, width), shapes["heads"], width // shapes["heads"]) for _ in "qkv")
        y = merged(op.scaled_dot_product_attention(q, k, v, causal=False), width)
        x = op.add(x, op.multiply(weights.linear(y, width, width), constant(np.ones([1, 1, width]))))
        y = op.gelu(weights.linear(layer_norm(x, width), width, shapes["hidden"]), "erf")
        x = op.add(x, op.multiply(weights.linear(y, shapes["hidden"], width), constant(np.ones([1, 1, width]))))
    patches = op.slice(x, *(constant([n], np.int64) for n in (1, side * side + 1, 1, 1)))
    grid = op.reshape(patches, constant([1, side // 2, 2, side // 2, 2, width], np.int64), False)
    small = op.transpose(grid, constant([0, 1, 3, 2, 4, 5], np.int64))
    x = op.reshape(small, constant([1, side * side // 4, 4 * width], np.int64), False)
    x = op.gelu(weights.linear(layer_norm(x, 4 * width), 4 * width, shapes["out"]), "erf")
    return ov.Model([weights.linear(x, shapes["out"], shapes["out"])], [pixels], "vision")


def decoder_graph(shapes, longest):
    """Ids ``[B, N]``, their positions, a mask ``[B, 1, N, S]`` and rows' order -> logits of the last position."""
    weights, width, count, kv = Weights(), shapes["width"], shapes["heads"], shapes["kv_heads"]
    depth = width // count
    ids, positions = (op.parameter([-1, -1], np.int64, name) for name in ("ids", "positions"))
    mask = op.parameter([-1, 1, -1, -1], np.float32, "mask")
    order = op.parameter([-1], np.int32, "beam_idx")
    zero = constant(0, np.int64)
    table = weights.random.standard_normal([shapes["vocabulary"], width], np.float32) * np.float32(0.02)
    x = op.gather(constant(table), ids, zero)
    angles = np.outer(np.arange(longest), 1e6 ** (-np.arange(0, depth, 2) / depth)).astype(np.float32)
    tables = []
    for function in (np.cos, np.sin):
        rows = op.gather(constant(function(np.concatenate([angles, angles], 1))), positions, zero)
        tables.append(op.unsqueeze(rows, constant(1, np.int64)))

    def turned(x):
        low, high = op.split(x, constant(-1, np.int64), 2).outputs()
        swapped = op.concat([op.multiply(high, constant(-1.0)), low], -1)
        return op.add(op.multiply(x, tables[0]), op.multiply(swapped, tables[1]))

    batch = op.gather(op.shape_of(ids), constant([0], np.int64), zero)
    empty = op.broadcast(constant(0.0), op.concat([batch, constant([kv, 0, depth], np.int64)], 0))
    sinks = []

    def remembered(new, name):
        shape = ov.PartialShape([-1, kv, -1, depth])
        info = ov.op.util.VariableInfo()
        info.data_shape, info.data_type, info.variable_id = shape, ov.Type.f32, name
        variable = ov.op.util.Variable(info)
        past = op.read_value(empty, variable)
        seen = op.concat([op.gather(past, order, zero), new], 2)
        sinks.append(op.assign(seen, variable))
        return seen

    def repeated(x):
        x = op.unsqueeze(x, constant(2, np.int64))
        shape = op.shape_of(x)
        parts = [op.gather(shape, constant([i], np.int64), zero) for i in (0, 1, 3, 4)]
        target = op.concat([parts[0], parts[1], constant([count // kv], np.int64), parts[2], parts[3]], 0)
        x = op.broadcast(x, target, "BIDIRECTIONAL")
        return op.reshape(x, constant([0, count, -1, depth], np.int64), True)

    for i in range(shapes["layers"]):
        y = rms_norm(x, width)
        q = turned(heads(weights.linear(y, width, width), count, depth))
        k = turned(heads(weights.linear(y, width, kv * depth), kv, depth))
        v = heads(weights.linear(y, width, kv * depth), kv, depth)
        k, v = repeated(remembered(k, f"k{i}")), repeated(remembered(v, f"v{i}"))
        y = merged(op.scaled_dot_product_attention(q, k, v, mask, causal=False), width)
        x = op.add(x, weights.linear(y, width, width, bias=False))
        y = rms_norm(x, width)
        gate = op.swish(weights.linear(y, width, shapes["hidden"], bias=False))
        up = weights.linear(y, width, shapes["hidden"], bias=False)
        x = op.add(x, weights.linear(op.multiply(gate, up), shapes["hidden"], width, bias=False))
    last = op.slice(x, *(constant([n], np.int64) for n in (-1, 2**31, 1, 1)))
    logits = weights.linear(rms_norm(last, width), width, shapes["vocabulary"], bias=False)
    return ov.Model([op.result(logits)], sinks, [ids, positions, mask, order], "decoder")


def graph_file(folder, name, weights, make):
    """The graph's file, written the first time: ``weights`` are float32, int8 or int4."""
    path = Path(folder, f"openvino-{name}-{weights}.xml")
    if not path.exists():
        model = make()
        if weights != "float32":
            import nncf

            if name == "vision":
                shape = [CALIBRATION, *(int(n) for n in model.inputs[0].shape)]
                tiles = np.random.default_rng(1).standard_normal(shape, np.float32)
                quick = nncf.AdvancedQuantizationParameters(disable_bias_correction=True)  # random weights have no accuracy
                model = nncf.quantize(
                    model,
                    nncf.Dataset(list(tiles)),
                    model_type=nncf.ModelType.TRANSFORMER,
                    subset_size=CALIBRATION,
                    advanced_parameters=quick,
                )
            elif weights == "int8":
                model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_ASYM)
            else:
                model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT4_ASYM, group_size=64, ratio=1.0)
        part = path.with_name("part-" + path.name)
        ov.save_model(model, part, compress_to_fp16=False)
        part.with_suffix(".bin").replace(path.with_suffix(".bin"))
        part.replace(path)
    return path


def main():
    """Measure what the specification says."""
    spec = json.loads(sys.argv[1])
    few = spec["weights"] or "float32"
    rows, threads = spec["rows"], spec["threads"]
    depths, vocabulary = spec["depths"], spec["shapes"]["vocabulary"]
    longest = max([*depths, spec["prompt"]]) + spec["decode"] + 64
    decoder_path = graph_file(spec["folder"], "decoder", few, lambda: decoder_graph(spec["shapes"], 65536))
    tower_weights = "float32" if few == "float32" else "int8"
    vision_path = None
    if "vit" in rows:
        vision_path = graph_file(spec["folder"], "vision", tower_weights, lambda: vision_graph(spec["vision"]))
    if longest > 65536:
        raise SystemExit("the tables of positions have 65,536 rows")
    core = ov.Core()
    options = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    options["INFERENCE_PRECISION_HINT"] = {"float32": "f32", "bfloat16": "bf16"}[spec["products"]]
    start = time.perf_counter()
    decoder = core.compile_model(str(decoder_path), "CPU", options)
    tower = None if vision_path is None else core.compile_model(str(vision_path), "CPU", options)
    result = {"load": time.perf_counter() - start}
    request, state = decoder.create_infer_request(), {"length": 0}

    def run(ids):
        batch, count = ids.shape
        first = state["length"]
        positions = np.broadcast_to(np.arange(first, first + count), ids.shape)
        hidden = np.arange(first + count)[None] > np.arange(first, first + count)[:, None]
        mask = np.broadcast_to(np.where(hidden, np.float32(-1e9), np.float32(0)), [batch, 1, count, first + count])
        inputs = [ids, positions, mask, np.arange(batch, dtype=np.int32)]
        found = request.infer([np.ascontiguousarray(array) for array in inputs], share_inputs=True, share_outputs=True)[0]
        state["length"] = first + count
        return found[:, -1].argmax(-1)

    def measure(length, batch=1):
        request.reset_state()
        state["length"] = 0
        ids = (np.arange(batch * length) * 7919 % vocabulary).reshape([batch, length])
        start, times = time.perf_counter(), []
        token = run(ids)
        prefill = length / (time.perf_counter() - start)
        for _ in range(spec["decode"]):
            start = time.perf_counter()
            token = run(token[:, None])
            times.append(time.perf_counter() - start)
        return prefill, batch / float(np.median(times))

    measure(3)
    if "vit" in rows:
        pixels = np.random.default_rng(0).standard_normal([1, 3, spec["vision"]["size"], spec["vision"]["size"]], np.float32)
        tower(pixels)
        times = []
        for _ in range(spec["tiles"]):
            start = time.perf_counter()
            tower(pixels)
            times.append(time.perf_counter() - start)
        result["vit"] = 1 / float(np.median(times))
    if "prefill" in rows:
        result["prefill"] = measure(spec["prompt"])[0]
    if "decode" in rows:
        for depth in depths:
            result[f"decode {depth}"] = measure(max(depth, 1))[1]
    if "batch" in rows:
        for batch in spec["batches"]:
            result[f"batch {batch}"] = measure(64, batch)[1]
    status = Path("/proc/self/status").read_text().splitlines()
    result["memory"] = int(next(line for line in status if line.startswith("VmHWM")).split()[1]) * 1024
    print(json.dumps({**result, "versions": {"openvino": ov.__version__.split("-")[0]}}))


if __name__ == "__main__":
    main()
