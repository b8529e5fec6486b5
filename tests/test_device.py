"""Choosing a device and a dtype: what exists, and what each kind can do."""

import os
import subprocess
import sys

import paddle
import pytest

from paddlemix import device
from paddlemix.errors import DeviceError


@pytest.fixture
def plugged(monkeypatch):
    """Call to pretend that Paddle found these devices; the list of devices that were selected."""
    selected = []

    def plug(*names, stride=False):
        kinds = list(dict.fromkeys(name.split(":")[0] for name in names))
        monkeypatch.setattr(paddle.device, "get_all_custom_device_type", lambda: kinds)
        monkeypatch.setattr(paddle.device, "get_available_custom_device", lambda: list(names))
        monkeypatch.setattr(paddle, "get_flags", lambda name: {name: stride})
        monkeypatch.setattr(paddle, "set_device", selected.append)
        return selected

    return plug


def test_auto_prefers_a_plug_in(plugged):
    assert device.set_device("auto") == "cpu"
    selected = plugged("npu:0", "npu:1")
    assert device.set_device("auto") == "npu"
    assert device.set_device("npu:1") == "npu"
    assert device.set_device("cpu") == "cpu"
    assert selected == ["npu", "npu:1", "cpu"]


def test_other_plug_ins_go_by_their_name(plugged):
    selected = plugged("metax_gpu:0")
    assert device.set_device("auto") == device.set_device("metax_gpu:0") == "metax_gpu"
    assert selected == ["metax_gpu", "metax_gpu:0"]
    with pytest.raises(DeviceError, match="found only metax_gpu"):
        device.set_device("npu")


def test_the_launcher_gets_the_numbers_of_devices_that_are_not_hidden(plugged, monkeypatch):
    plugged("npu:0", "npu:1", "npu:2")
    monkeypatch.delenv("NPU_VISIBLE_DEVICES", raising=False)
    assert device.launch_numbers("npu", 2) == ["0", "1"]
    with pytest.raises(DeviceError, match="4 devices of kind npu were asked for, but 3 are visible"):
        device.launch_numbers("npu", 4)
    monkeypatch.setenv("NPU_VISIBLE_DEVICES", "2, 5")
    assert device.launch_numbers("npu", 2) == ["2", "5"]
    with pytest.raises(DeviceError, match="but 2 are visible"):
        device.launch_numbers("npu", 3)


@pytest.mark.parametrize("name", ["npu:2", "npu:-1", "npu:x"])
def test_numbers_beyond_the_last_device_are_refused(plugged, name):
    selected = plugged("npu:0", "npu:1")
    with pytest.raises(DeviceError, match=f"'{name}' does not exist: 2 of kind npu"):
        device.set_device(name)
    assert selected == []


def test_devices_that_are_not_there():
    with pytest.raises(DeviceError, match="device 'tpu' needs a Paddle plug-in of that name"):
        device.set_device("tpu")
    if not paddle.device.is_compiled_with_cuda():
        with pytest.raises(DeviceError, match="needs the GPU build of Paddle.*make install DEVICE=gpu"):
            device.set_device("gpu:0")


def test_strided_kernels_are_refused_on_plug_ins(plugged):
    selected = plugged("npu:0", stride=True)
    with pytest.raises(DeviceError, match="FLAGS_use_stride_kernel=0 .* before Paddle starts.*tools/npu/env.sh"):
        device.set_device("npu")
    assert selected == []


def test_settings_of_ascend_that_are_missing_are_named(plugged, monkeypatch, caplog):
    plugged("npu:0")
    for name in device._NPU_FLAGS[1:]:
        monkeypatch.setenv(name, "0")
    monkeypatch.delenv(device._NPU_FLAGS[0], raising=False)
    device.set_device("npu")
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{device._NPU_FLAGS[0]} not set: run `source tools/npu/env.sh`")
    monkeypatch.setenv(device._NPU_FLAGS[0], "0")
    caplog.clear()
    device.set_device("npu")
    assert not caplog.records


DTYPES = [
    # kind, compute capability, auto, refused
    ("cpu", None, "float32", ["bfloat16", "float16"]),
    ("gpu", (7, 0), "float16", ["bfloat16"]),
    ("gpu", (8, 0), "bfloat16", []),
    ("npu", None, "bfloat16", []),
    ("metax_gpu", None, "bfloat16", []),
]


@pytest.mark.parametrize("kind, capability, auto, refused", DTYPES)
def test_dtypes(monkeypatch, kind, capability, auto, refused):
    monkeypatch.setattr(device, "current", lambda: kind)
    monkeypatch.setattr(paddle.device.cuda, "get_device_capability", lambda: capability)
    assert device.resolve_dtype("auto") == auto
    for dtype in device.DTYPES:
        if dtype in refused:
            with pytest.raises(DeviceError, match="use --dtype"):
                device.resolve_dtype(dtype)
        else:
            assert device.resolve_dtype(dtype) == dtype
    with pytest.raises(DeviceError, match="'int8' is not known"):
        device.resolve_dtype("int8")


def test_what_is_left_on_cpu_is_brought_to_the_device(monkeypatch):
    x, moved = paddle.ones([2]), []
    assert device.brought(x) is x
    monkeypatch.setattr(device, "current", lambda: "npu")
    monkeypatch.setattr(paddle.device, "get_device", lambda: "npu:1")
    monkeypatch.setattr(paddle, "get_device", lambda: "npu:1")
    monkeypatch.setattr(paddle.Tensor, "to", lambda tensor, place: moved.append(place))
    device.brought(x)
    assert moved == ["npu:1"]


@pytest.mark.parametrize(
    "kind, dtype, never",
    [("gpu", "bfloat16", True), ("gpu", "float16", False), ("gpu", None, False), ("npu", "bfloat16", False)],
)
def test_memory_is_planned_for_attention_that_may_not_be_fused(kind, dtype, never):
    assert device.never_holds_scores(kind, dtype) == never


def test_memory_of_the_machine():
    x = paddle.ones([2**20])
    assert 4 * x.size < device.peak_memory() < device.total_memory()


def test_choices_are_told_on_request():
    code = "import paddle; from paddlemix.kernels import fused; fused.choose('norm', paddle.float32)"
    for level, told in (("debug", True), ("warning", False)):
        environment = {**os.environ, "PADDLEMIX_LOG": level}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
        assert ("paddlemix.kernels.fused: norm in float32 on cpu: plain" in done.stderr) == told
