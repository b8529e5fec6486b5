"""What no linter knows: calls that work on one device only, or that change their meaning there.

docs/npu.md tells what each of them does. Only ``paddlemix/device.py`` knows devices apart (and
``paddlemix/doctor``, whose subject they are), and only ``paddlemix/kernels/fused.py`` calls kernels that not every device has.
"""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "paddlemix"
SOURCES = sorted(PACKAGE.rglob("*.py"))

DEVICE_NAME = re.compile(r"(cpu|gpu|cuda|npu|xpu|ascend)(:\d+)?")
DEVICE_CALLS = re.compile(r"paddle\.(device\.)?(cuda|set_device)|(\w+\.)+(is_compiled_with_\w+|(CUDA|Custom|XPU)\w*Place)")
# Without strided kernels these fail, or return their input unchanged.
VIEWS = {"view", "view_as", "as_strided", "unfold", "narrow"}
# No bfloat16 kernel on Ascend.
PRODUCTS = {"einsum", "bmm", "baddbmm"}
# No kernel on CPU.
FUSED = re.compile(r"fused_\w+|flash\w*attention\w*|memory_efficient_attention|top_p_sampling|_run_custom_op")
OTHERS = ("safetensors.paddle", "torch", "transformers")
FUSED_ATTRIBUTES = re.compile(rf"{FUSED.pattern}|rms_norm|scaled_dot_product_attention")


def dotted(node):
    """``a.b.c`` of an attribute or a name, with ``()`` or ``[]`` where something else is in the way."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "()"


def docstrings(tree):
    """The nodes of all docstrings."""
    found = set()
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
            found.add(body[0].value)
    return found


def defaults(node):
    """The default values of a function's parameters, or of a command-line flag."""
    if isinstance(node, ast.FunctionDef):
        return [default for default in (*node.args.defaults, *node.args.kw_defaults) if default]
    return [k.value for k in node.keywords if k.arg == "default"] if isinstance(node, ast.Call) else []


def of_numpy(call):
    """Whether a view is one of NumPy's: a function of its own, or a dtype of its own as the only argument."""
    if dotted(call.func).startswith("np."):
        return True
    return len(call.args) == 1 and dotted(call.args[0]).startswith(("np.", "dtype"))


def of_dictionary(target):
    """Whether one of the items in an assignment to an item of an item is a dictionary's, going by its key."""
    keys = [part.slice for part in (target, target.value)]
    texts = [key for key in keys if isinstance(key, ast.Constant) and isinstance(key.value, str)]
    return bool(texts) or dotted(keys[1]) in ("name", "key")


def targets(node):
    """What a statement assigns to."""
    if isinstance(node, ast.Assign):
        return node.targets
    return [node.target] if isinstance(node, (ast.AugAssign, ast.AnnAssign)) else []


def problems(source, path="x.py"):
    """``line: what is wrong`` for the text of a module; ``path`` is relative to the package."""
    tree = ast.parse(source)
    anywhere, kernels = path == "device.py" or path.startswith("doctor/"), path == "kernels/fused.py"
    ignored = docstrings(tree)
    if path.startswith("examples/"):  # what a command takes as a value
        ignored |= {default for node in ast.walk(tree) for default in defaults(node)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in ignored:
            if DEVICE_NAME.fullmatch(node.value) and not anywhere:
                found.append((node, f"device name '{node.value}'"))
        elif isinstance(node, ast.Attribute):
            name = dotted(node)
            fused = name.startswith(("paddle.", "F.", "_C_ops.")) and FUSED_ATTRIBUTES.fullmatch(node.attr)
            if (DEVICE_CALLS.fullmatch(name) and not anywhere) or (fused and not kernels):
                found.append((node, name))
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            module = getattr(node, "module", None) or ""
            for alias in node.names:
                name = f"{module}.{alias.name}".strip(".")
                special = FUSED.fullmatch(alias.name) or alias.name in PRODUCTS or DEVICE_CALLS.fullmatch(name)
                if name.startswith(OTHERS) or (module.startswith("paddle") and special and not kernels):
                    found.append((node, f"import of {name}"))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            name = node.func.attr
            if name in PRODUCTS or (name in VIEWS and not of_numpy(node)):
                found.append((node, f".{name}("))
        for target in targets(node):
            if isinstance(target, ast.Subscript) and isinstance(target.value, ast.Subscript) and not of_dictionary(target):
                found.append((node, "assignment to an item of an item"))
    return [f"{node.lineno}: {told}" for node, told in found]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_package(path):
    assert not problems(path.read_text(encoding="utf-8"), path.relative_to(PACKAGE).as_posix())


@pytest.mark.parametrize(
    "line",
    [
        "paddle.cuda.empty_cache()",
        "paddle.device.cuda.synchronize()",
        "if paddle.is_compiled_with_cuda(): pass",
        "if paddle.device.is_compiled_with_custom_device(kind): pass",
        "place = paddle.CustomPlace(kind, 0)",
        "paddle.device.set_device(name)",
        "x.to('gpu:0')",
        "if kind == 'npu': pass",
        "y = x.view([2, 3])",
        "y = paddle.as_strided(x, [2], [1])",
        "y[0][1] = x",
        "y[0][1] += x",
        "z = paddle.einsum('ij,jk->ik', x, y)",
        "z = x.bmm(y)",
        "y = F.rms_norm(x, [4])",
        "y = F.scaled_dot_product_attention(q, k, v)",
        "y = paddle.incubate.nn.functional.fused_linear(x, w)",
        "from paddle.incubate.nn.functional import fused_rms_norm",
        "from paddle import CUDAPlace",
        "from safetensors.paddle import load_file",
        "import torch",
    ],
)
def test_each_rule_finds_what_it_forbids(line):
    assert len(problems(line)) == 1


def test_what_is_allowed():
    code = (
        "'''The gpu.'''\nd = device.set_device('auto')\ny = x.reshape([2])\ny[0, 1] = x\nflags = {'--device': 'cpu or gpu'}\n"
    )
    assert problems(code) == []
    assert problems("kind = 'npu'\npaddle.set_device(kind)", "device.py") == []
    assert problems("kind = 'npu'\npaddle.set_device(kind)", "doctor/npu.py") == []
    assert problems("F.rms_norm(x, [4])", "kernels/fused.py") == []
