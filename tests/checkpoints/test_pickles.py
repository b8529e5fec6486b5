"""Pickles that want more than tensors."""

import pickle
import zipfile

import pytest

from tests.checkpoints.helpers import (
    Call,
    Global,
    Persistent,
    assemble,
    config_of,
    equal,
    loaded,
    message_of,
    read_all,
    write_published_bin,
)


def gadgets(target):
    """Pickles, without frame and end, that would create the file ``target`` if they were loaded carelessly."""
    command = f"touch {target}"
    code = f"open({str(target)!r}, 'w')"
    calls = [
        ("os system", (command,)),
        ("posix system", (command,)),
        ("subprocess Popen", (["touch", str(target)],)),
        ("builtins eval", (code,)),
        ("builtins exec", (code,)),
        ("builtins open", (str(target), "w")),
        ("pathlib Path.touch", (str(target),)),
        ("numpy.testing._private.utils runstring", (code, {})),
        ("torch.serialization load", (str(target),)),
        ("collections OrderedDict.__init__.__globals__", ()),
    ]
    for name, arguments in calls:
        yield name, assemble({"a": Call(Global(name), arguments)})
        module, _, attribute = name.partition(" ")
        stack_global = b"\x80\x04" + assemble(module) + assemble(attribute) + b"\x93" + assemble(arguments) + b"R"
        yield name, stack_global
        yield name, b"\x80\x02" + assemble(Global(name)) + assemble(arguments) + b"\x81"  # NEWOBJ
        yield name, b"(" + b"".join(map(assemble, arguments)) + b"i" + f"{module}\n{attribute}\n".encode()  # INST
        yield name, b"(" + assemble(Global(name)) + b"".join(map(assemble, arguments)) + b"o"  # OBJ
    # Calls hidden in the state of something that is admitted, and in a tensor's backward hooks.
    hook = Call(Global("os system"), (command,))
    yield "os system", assemble({"a": Call(Global("collections OrderedDict"), (), {"b": hook})})
    yield "os system", assemble(hook)


@pytest.mark.parametrize("kind", ["bin", "pdparams"])
def test_pickles_run_nothing(kind, tmp_path):
    config, target = config_of("qwen2"), tmp_path / "proof"
    path = tmp_path / {"bin": "pytorch_model.bin", "pdparams": "model_state.pdparams"}[kind]
    for name, body in gadgets(target):
        if kind == "bin":
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("archive/data.pkl", body + b".")
        else:
            path.write_bytes(body + b".")
        message = message_of(read_all, config, tmp_path)
        assert f"'{name.replace(' ', '.')}'" in message and "nothing in it was run" in message, name
        assert not target.exists(), name


def test_the_gadgets_are_loaded_guns(tmp_path):
    """Or the test above would prove nothing."""
    target = tmp_path / "proof"
    name, body = next(gadgets(target))
    pickle.loads(body + b".")
    assert name == "os system" and target.exists()


def test_admitted_functions_cannot_be_tampered_with(qwen2):
    """A pickle can set attributes of what it is given; the next file must not see that."""
    config, tensors, directory = qwen2
    for name in ("torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter"):
        state = (None, {"__defaults__": (1, 2, 3, 4, 5, 6)})
        body = assemble(Global(name)) + assemble(state) + b"b."
        with zipfile.ZipFile(directory / "pytorch_model.bin", "w") as archive:
            archive.writestr("archive/data.pkl", body)
        assert "holds a function" in message_of(read_all, config, directory)
    write_published_bin(directory / "pytorch_model.bin", tensors)
    assert equal(read_all(config, directory), loaded("qwen2"))
    (directory / "pytorch_model.bin").unlink()
    body = assemble(Call(Global("collections OrderedDict"), ())) + assemble(Persistent(("storage", 1, "0", "cpu", 1))) + b"0."
    (directory / "model_state.pdparams").write_bytes(body)
    assert "data outside of itself" in message_of(read_all, config, directory)
