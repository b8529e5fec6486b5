"""What works on a card and what does not, operator by operator: ``paddlemix doctor --device npu`` or ``gpu``.

Each check is one line of a table: pass; slow, where it works but a part went through the CPU; skip, where there is nothing
to check; or fail, with advice. Checks that may take the process down run in one of their own.
"""

import argparse
import contextlib
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np

import paddlemix
from paddlemix.commands import Parser

PACKAGE = Path(paddlemix.__file__).parent

# Largest difference from CPU float32, relative to the largest value. Cards multiply float32 with fewer bits by default.
TOLERANCE = {"float32": 2e-3, "bfloat16": 2e-2, "float16": 5e-3}


# ---------------------------------------------------------------------- operators


def cases():
    """``{kernel: (function of tensors that uses it, their shapes)}`` of every operator that the models compute with."""
    import paddle
    from paddle.nn import functional as F

    numbers = np.array([[2, 0, 1], [1, 1, 4]])

    def integers(values):
        return paddle.to_tensor(np.asarray(values, "int64"))

    def adamw(weight, gradient):
        zero = paddle.nn.initializer.Constant(0.0)
        parameter = paddle.create_parameter(weight.shape, weight.dtype, default_initializer=zero)
        parameter.set_value(weight.detach())
        parameter.grad = gradient.detach()
        paddle.optimizer.AdamW(1e-2, parameters=[parameter], weight_decay=0.1).step()
        return parameter.detach()

    def cross_entropy(x):
        return F.cross_entropy(x, integers([[1], [0], [4], [2]]), reduction="none")

    return {
        "matmul": (paddle.matmul, [[4, 6, 32], [4, 32, 24]]),
        "add": (lambda x, y: x + y, [[4, 6, 32], [32]]),
        "multiply": (lambda x, y: x * y, [[4, 6, 32], [6, 1]]),
        "scale": (lambda x: x * 0.125, [[4, 32]]),
        "square": (paddle.square, [[4, 32]]),
        "sum": (paddle.sum, [[4, 32]]),
        "mean": (lambda x: paddle.mean(x, axis=-1, keepdim=True), [[4, 32]]),
        "rsqrt": (lambda x: paddle.rsqrt(x * x + 0.5), [[4, 32]]),
        "swiglu": (F.swiglu, [[4, 64]]),
        "gelu": (F.gelu, [[4, 64]]),
        "exp": (paddle.exp, [[4, 6]]),
        "log_softmax": (lambda x: F.log_softmax(x, axis=-1), [[4, 32]]),
        "softmax": (lambda x: F.softmax(x, axis=-1), [[4, 6, 32]]),
        "layer_norm": (lambda x, w, b: F.layer_norm(x, [32], w, b, 1e-6), [[4, 6, 32], [32], [32]]),
        "conv2d": (lambda x, w, b: F.conv2d(x, w, b, stride=14), [[2, 3, 28, 42], [16, 3, 14, 14], [16]]),
        "embedding": (lambda table: F.embedding(integers(numbers), table), [[5, 32]]),
        "cross_entropy_with_softmax": (cross_entropy, [[4, 16]]),
        "transpose": (lambda x: x.transpose([0, 2, 1]), [[4, 6, 32]]),
        "concat": (lambda x, y: paddle.concat([x, y], axis=1), [[4, 6], [4, 2]]),
        "split": (lambda x: x.split([4, 2, 2], axis=1)[1], [[4, 8]]),
        "split_with_num": (lambda x: x.split(2, axis=1)[1], [[4, 8]]),
        "slice": (lambda x: x[:, 1:3], [[4, 8]]),
        "expand": (lambda x: x.expand([4, -1, -1]), [[1, 2, 8]]),
        "scatter": (lambda x, y: paddle.scatter(x, integers([3, 1]), y, overwrite=True), [[5, 8], [2, 8]]),
        "argmax": (lambda x: paddle.argmax(x, axis=-1), [[4, 64]]),
        "topk": (lambda x: paddle.topk(x, 3, axis=-1)[0], [[4, 32]]),
        "clip": (lambda x: x.clip(-0.5, 0.5), [[4, 32]]),
        "sigmoid": (F.sigmoid, [[4, 32]]),
        "cast": (lambda x: x.astype("float32"), [[4, 8]]),
        "adamw": (adamw, [[4, 8], [4, 8]]),
    }


FLOAT32_ONLY = {
    "adamw",
    "clip",
    "cross_entropy_with_softmax",
    "exp",
    "log_softmax",
    "sigmoid",
    "topk",
}  # as the models use them


@contextlib.contextmanager
def _native_log():
    """Collect what Paddle's C++ writes to stderr; with GLOG_v=3 it tells every operator that falls back to CPU."""
    text = []
    with tempfile.TemporaryFile() as file:
        kept = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield text
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            text.append(file.read().decode(errors="replace"))


def _fallbacks(log):
    return sorted(set(re.findall(r"missing \w+ kernel: (\w+), .*fallbacking to CPU", log)))


def _first_line(error):
    """The sentence in Paddle's errors that says what is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if line.startswith("(") or "Error" in line]
    return (told or lines or [type(error).__name__])[0][:300]


def _run(function, arrays, dtype, place):
    """Outputs and gradients of ``function`` as float32 arrays: inputs are rounded to ``dtype`` first, wherever it runs."""
    import paddle

    paddle.set_device(place)
    inputs = [paddle.to_tensor(array).astype(dtype) for array in arrays]
    if place == "cpu":
        inputs = [x.astype("float32") for x in inputs]
    for x in inputs:
        x.stop_gradient = False
    output = function(*inputs)
    results = [output]
    if not output.stop_gradient:
        cotangent = np.random.default_rng(1).standard_normal(output.shape).astype("float32")
        paddle.autograd.backward([output], [paddle.to_tensor(cotangent).astype(output.dtype)])
        results += [x.grad for x in inputs]
    return [result.astype("float32").numpy() for result in results]


def compare(function, shapes, dtype, place):
    """(largest relative difference from CPU float32, names of kernels that fell back) of outputs and gradients."""
    arrays = [np.random.default_rng(i).standard_normal(shape).astype("float32") for i, shape in enumerate(shapes)]
    expected = _run(function, arrays, dtype, "cpu")
    with _native_log() as log:
        actual = _run(function, arrays, dtype, place)
    if any(not np.isfinite(a).all() for a in actual):
        return np.inf, _fallbacks(log[0])
    errors = [np.abs(a - e).max() / max(np.abs(e).max(), 1e-6) for a, e in zip(actual, expected)]
    return float(max(errors)), _fallbacks(log[0])


def _verdict(name, dtype, function, shapes, place):
    """One line of the table for a comparison with CPU float32."""
    try:
        error, fallbacks = compare(function, shapes, dtype, place)
    except Exception as problem:  # whatever a back end throws belongs in the table
        return name, "fail", f"{_first_line(problem)}"
    detail = f"differs by {error:.1e} from CPU float32"
    if error > TOLERANCE[dtype]:
        return name, "fail", f"{detail}, more than {TOLERANCE[dtype]:.0e}: trust no results, and report it to Paddle"
    if fallbacks:
        return name, "slow", f"{detail}; on CPU: {', '.join(fallbacks)}"
    return name, "pass", detail


def check_operators(place, dtypes):
    """Yield the name of what is about to run, then its line: every operator, forward and backward, in every dtype."""
    for name, (function, shapes) in cases().items():
        for dtype in dtypes:
            if dtype == "float32" or name not in FLOAT32_ONLY:
                label = f"operator {name}, {dtype}"
                yield label
                yield _verdict(label, dtype, function, shapes, place)


def check_fused(place, dtypes):
    """The same for the fused kernels of attention, norm and rotary positions, against their plain composition on CPU."""
    import paddle

    from paddlemix import device
    from paddlemix.kernels import fused
    from paddlemix.models.blocks.layers import AttentionMask, RMSNorm, apply_rope, attention

    def norm(x, weight):
        return RMSNorm.forward(SimpleNamespace(weight=weight, eps=1e-6), x)

    def rope(x):
        angles = np.outer(np.arange(x.shape[1]), 1e4 ** -np.linspace(0, 1, x.shape[-1] // 2))[None, :, None]
        sin = np.concatenate([-np.sin(angles), np.sin(angles)], -1).astype("float32")
        cos = np.concatenate([np.cos(angles)] * 2, -1).astype("float32")
        return apply_rope(x, paddle.to_tensor(cos), paddle.to_tensor(sin))

    def attend(mask):
        return lambda q, k, v: attention(q, k, v, mask() if mask else None)

    starts, segments = np.array([0, 5]), np.repeat([[0, 1, 2], [0, 1, 1]], [16, 40, 8], axis=1)

    def padded(q, k, v):  # what padding itself comes to is nobody's business, and differs between kernels
        out = attention(q, k, v, AttentionMask(starts))
        return out * paddle.to_tensor((np.arange(64) >= starts[:, None])[..., None].astype("float32")).astype(out.dtype)

    square = [[2, 64, 8, 64], [2, 64, 2, 64], [2, 64, 2, 64]]
    functions = [
        ("norm", "norm", norm, [[2, 16, 256], [256]]),
        ("rope", "rope", rope, [[2, 16, 4, 64]]),
        ("attention", "attention of a tile", attend(None), [[2, 65, 4, 64]] * 3),
        ("attention", "attention, causal", attend(AttentionMask), square),
        ("attention", "attention, padded", padded, square),
        ("attention", "attention, packed", attend(lambda: AttentionMask(None, segments)), square),
        ("attention", "attention, KV cache", attend(AttentionMask), [[2, 24, 8, 64], *square[1:]]),
    ]
    for dtype in dtypes:
        for kind, title, function, shapes in functions:
            label = f"{title}, {dtype}"
            yield label
            paddle.set_device(place)
            kernel, best = (f(kind, getattr(paddle, dtype)) for f in (fused.choose, device.fused_kernel))
            if best not in (None, kernel):
                kernel += f" ({best} is not offered)"
            name, status, detail = _verdict(label, dtype, function, shapes, place)
            yield name, status, f"{kernel}: {detail}"


CHILDREN = {"operators": check_operators, "fused": check_fused}


def _with_package():
    """An environment in which a process finds this package, wherever it runs from."""
    paths = [str(PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def in_child(kind, place, dtypes):
    """Lines of a check that runs in a process of its own; the line that takes it down is a failure like others."""
    command = [sys.executable, __file__, "--child", kind, "--device", place, "--dtypes", ",".join(dtypes)]
    environment = {**_with_package(), "GLOG_v": "3", "GLOG_logtostderr": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace")
    running = None
    for line in done.stdout.splitlines():
        if not line.startswith("@"):
            continue
        told = json.loads(line[1:])
        running = told if isinstance(told, str) else None
        if running is None:
            yield tuple(told)
    if done.returncode:
        last = [line for line in done.stderr.splitlines() if line.strip()][-1:] or ["nothing was said"]
        detail = f"the process ended with code {done.returncode}: {last[0][:200]}; later checks were not tried"
        yield running or kind, "fail", detail


# ---------------------------------------------------------------------- the model


def _demo(place, dtype):
    import paddle

    from paddlemix.models.internvl2 import InternVLChatModel, load_tokenizer

    paddle.set_device(place)
    folder = str(PACKAGE / "demo_model")
    model = InternVLChatModel.from_pretrained(folder, dtype=dtype, engine="eager")
    tokenizer = load_tokenizer(folder)
    model.set_tokenizer(tokenizer)
    return model, tokenizer


def _picture(model):
    from paddlemix.processors.image import load_image

    return load_image(str(PACKAGE / "demo_images" / "scene_1.png"), input_size=model.config.image_size, max_num=1)


def losses(place, dtype, steps=10):
    """Losses of AdamW steps on one picture and its answer, all weights trained, float32 master weights; and seconds a step."""
    import paddle

    from paddlemix.models.internvl2.conversation import insert_image_tokens

    model, tokenizer = _demo(place, dtype)
    model.train()
    pixels = _picture(model)
    (question,) = insert_image_tokens(["<image>\nWhat is in the picture?"], [len(pixels) * model.config.num_image_token])
    prompt = tokenizer.encode(model.template().prompt(question, []))
    answer = tokenizer.encode("There is a small blue star above a large red square.")
    ids = np.array([prompt + answer])
    labels = np.array([[-100] * len(prompt) + answer])
    optimiser = paddle.optimizer.AdamW(2e-4, parameters=model.parameters(), multi_precision=dtype != "float32")
    found, started = [], time.perf_counter()
    for step in range(steps):
        loss = model(pixels, ids, labels=labels).loss
        loss.backward()
        optimiser.step()
        optimiser.clear_grad()
        found.append(float(loss))
        if step == 0:
            started = time.perf_counter()
    return found, (time.perf_counter() - started) / (steps - 1)


def answer(place, dtype):
    """Greedy answer of the bundled model."""
    model, tokenizer = _demo(place, dtype)
    return model.chat(tokenizer, _picture(model), "<image>\nDescribe this image.", {"max_new_tokens": 24})


def check_model(place, dtypes):
    """Lines for chat and training of the bundled model; the same on CPU in float32 is what is right."""
    said, (expected, _) = answer("cpu", "float32"), losses("cpu", "float32")
    for dtype in dtypes:
        try:
            text = answer(place, dtype)
            same = text == said
            # In half precision rounding may turn a choice between two words.
            status = "fail" if not same and dtype == "float32" else "pass"
            words = "the same words as on CPU" if same else f"'{text}', on CPU in float32 '{said}': read whether it makes sense"
            yield f"chat, {dtype}", status, words
        except Exception as problem:
            yield f"chat, {dtype}", "fail", _first_line(problem)
        try:
            found, seconds = losses(place, dtype)
        except Exception as problem:
            yield f"ten training steps, {dtype}", "fail", _first_line(problem)
            continue
        error = float(np.max(np.abs(np.array(found) - expected) / np.abs(expected)))
        good = np.isfinite(error) and error < {"float32": 1e-3}.get(dtype, 0.1)
        detail = f"loss {found[0]:.4f} to {found[-1]:.4f}, CPU float32 {expected[0]:.4f} to {expected[-1]:.4f}, "
        detail += f"largest difference {error:.1e}, {seconds:.3f} s a step"
        yield f"ten training steps, {dtype}", "pass" if good else "fail", detail


# ---------------------------------------------------------------------- the machine


def check_matmul(place, dtypes):
    """Speed of a large product."""
    import paddle

    paddle.set_device(place)
    size = 256 if stand_in() else 8192
    for dtype in dtypes:
        try:
            x = paddle.ones([size, size], dtype)
            paddle.matmul(x, x)
            paddle.device.synchronize()
            started = time.perf_counter()
            for _ in range(5):
                y = paddle.matmul(x, x)
            paddle.device.synchronize()
            speed = 5 * 2 * size**3 / (time.perf_counter() - started) / 1e12
            right = bool((y.astype("float32") == size).all())
            yield f"product of {size} x {size}, {dtype}", "pass" if right else "fail", f"{speed:.2f} TFLOP/s"
        except Exception as problem:
            yield f"product of {size} x {size}, {dtype}", "fail", _first_line(problem)


def check_collectives(kind):
    """All-reduce over the first two devices."""
    from paddlemix import device

    if device.count(kind) < 2:
        yield "all-reduce of two devices", "skip", f"{device.count(kind)} device is visible"
        return
    first = ",".join(device.launch_numbers(kind, 2))
    with tempfile.TemporaryDirectory() as logs:
        command = [sys.executable, "-m", "paddle.distributed.launch", "--devices", first, "--log_dir", logs]
        command += [__file__, "--child", "all-reduce", "--device", kind]
        try:
            done = subprocess.run(command, env=_with_package(), capture_output=True, text=True, errors="replace", timeout=300)
            text = "".join(path.read_text(errors="replace") for path in sorted(Path(logs).glob("workerlog.*")))
            told = re.findall(r"^@all-reduce (.*)$", text, re.MULTILINE)
            if done.returncode == 0 and len(told) == 2:
                yield "all-reduce of two devices", "pass", told[0]
                return
            lines = [line for line in (text or done.stderr).splitlines() if line.strip()]
            reason = next((line for line in lines if "Error" in line), lines[-1] if lines else "no output")
        except subprocess.TimeoutExpired:
            reason = "nothing came back for 5 minutes"
        yield "all-reduce of two devices", "fail", f"{reason[:200]}: see the section on several cards in tools/npu/README.md"


def _all_reduce():
    import paddle
    import paddle.distributed as dist

    dist.init_parallel_env()
    for dtype in ("float32", "bfloat16"):
        x = paddle.full([2**20], dist.get_rank() + 1.0, "float32").astype(dtype)
        started = time.perf_counter()
        dist.all_reduce(x)
        x = x.astype("float32").numpy()
        seconds = time.perf_counter() - started
        assert (x == 3).all(), f"all_reduce of 1 and 2 in {dtype} gave {x.min()} to {x.max()}"
    print(f"\n@all-reduce 1 + 2 = 3 in float32 and bfloat16, {seconds * 1e3:.1f} ms for 2 MB", flush=True)


def stand_in():
    """Whether the plug-in is tests/fake_npu, which keeps its memory on the host and has no bfloat16 arithmetic."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return False
    libraries = set(re.findall(r"(/\S*libpaddle-custom-\S+\.so)", maps.read_text()))
    return any(b"FAKE_DEVICE_COUNT" in Path(library).read_bytes() for library in libraries)


def main(kind, versions, argv=None):
    """Run all checks on devices of a kind, print the table and exit: 0 if none failed, 1 if one did or there is no device.

    Args:
        kind: ``gpu`` or ``npu``.
        versions: a function that yields (name, status, detail) for drivers, libraries and settings.
        argv: arguments; None for the command line's.
    """
    parser = Parser(description=f"Check what works on {kind.upper()}, operator by operator.")
    parser.add_argument("--device", default=kind, help=f"{kind} or {kind}:1 (default: the first)")
    parser.add_argument("--dtypes", default=None, help="such as float32,bfloat16 (default: float32 and the device's own)")
    parser.add_argument("--report", metavar="FILE.json", help="write the results there too, to send with a question")
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore", message="No ccache found")

    from paddlemix import device
    from paddlemix.errors import DeviceError

    try:
        if device.set_device(args.device) != kind:
            parser.error(f"--device must be {kind} or {kind}:NUMBER")
        half = device.resolve_dtype("auto")
    except DeviceError as error:
        sys.exit(f"nothing to check: {error}")
    place = args.device if ":" in args.device else f"{kind}:0"
    dtypes = args.dtypes.split(",") if args.dtypes else ["float32", half]
    results = []

    def note(name, status, detail):
        results.append({"check": name, "status": status, "detail": detail})
        print(f"{status:5}  {name:44}  {detail}", flush=True)

    for line in versions():
        note(*line)
    imitation = stand_in()
    if imitation:
        note("stand-in", "skip", "this is tests/fake_npu on host memory: it has no bfloat16 and says nothing about a real card")
        dtypes = ["float32"]
    memory = device.total_memory()
    note("devices", "pass", f"{device.count(kind)} visible" + (f", {memory / 2**30:.0f} GB" if memory else ""))
    sections = [
        lambda: check_matmul(place, dtypes),
        lambda: in_child("operators", place, dtypes),
        lambda: in_child("fused", place, dtypes),
        lambda: check_model(place, dtypes),
        lambda: check_collectives(kind),
    ]
    for section in sections:
        try:
            for line in section():
                note(*line)
        except Exception as problem:  # one broken check must not hide the others
            traceback.print_exc()
            note("the check itself", "fail", _first_line(problem))

    counts = {status: sum(r["status"] == status for r in results) for status in ("pass", "slow", "skip", "fail")}
    print("\n" + ", ".join(f"{number} {status}" for status, number in counts.items()))
    failed = [r["check"] for r in results if r["status"] == "fail"]
    if counts["slow"]:
        print("slow: works, but not as well as it could; the detail says why")
    if failed:
        print("fail: " + "; ".join(failed))
        print("Next: PADDLEMIX_KERNELS=plain turns the fused kernels off; see the last section of docs/npu.md")
    if args.report:
        told = {"machine": platform.platform(), "device": place, "stand_in": imitation, "counts": counts, "results": results}
        Path(args.report).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    sys.exit(1 if failed else 0)


def _child(argv):
    parser = argparse.ArgumentParser()
    parser.add_argument("--child", choices=[*CHILDREN, "all-reduce"])
    parser.add_argument("--device")
    parser.add_argument("--dtypes", default="float32")
    args = parser.parse_args(argv)
    if args.child == "all-reduce":
        return _all_reduce()
    for told in CHILDREN[args.child](args.device, args.dtypes.split(",")):
        print("@" + json.dumps(told), flush=True)


if __name__ == "__main__":
    _child(sys.argv[1:])
