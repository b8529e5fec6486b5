"""AWQ and GPTQ checkpoints, made by packers written from the formats, answer as the floating-point weights they stand for."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from paddlemix.checkpoints.checkpoint import Checkpoint, read_parameters
from paddlemix.errors import CheckpointError
from paddlemix.models.internvl2 import InternVLChatConfig, InternVLChatModel
from tests.checkpoints.packers import pack_awq, pack_gptq, random_codes, values
from tests.conftest import REFERENCE

FORMS = ("awq", "gptq", "gptq_v2", "gptq_order", "gptq_8")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """``(name of a reference, form) -> (packed folder, floating-point folder)``, each made once."""
    made = {}

    def make(name, form, group=32):
        if (name, form, group) not in made:
            folder, source = tmp_path_factory.mktemp(form), REFERENCE / name / "checkpoint"
            made[name, form, group] = packed_and_plain(folder, source, form, group)
        return made[name, form, group]

    return make


def packed_and_plain(folder, source, form, group):
    """Folders of a checkpoint in few bits and of the numbers that it stands for, made in ``folder`` of one at ``source``."""
    from paddlemix.checkpoints.contents import OpenFiles

    config = InternVLChatConfig.from_pretrained(str(source))
    checkpoint, rng = Checkpoint(str(source), config), np.random.default_rng(0)
    packed, plain = {}, {}
    bits = 8 if form.endswith("8") else 4
    with OpenFiles() as files:
        for part in {s.part.name: s for s in checkpoint.sources}.values():
            stored, name = files.get(part.location), part.part.name
            array = stored.read(0, stored.shape[0] if stored.shape else 1).reshape(stored.shape)
            array = (array.astype(np.uint32) << 16).view(np.float32) if stored.dtype == "bfloat16" else array.astype(np.float32)
            inside = name.startswith("language_model.") and ".layers." in name and array.ndim == 2
            if not inside or array.shape[0] % 8:
                packed[name] = plain[name] = np.ascontiguousarray(array)
                continue
            out, inputs = array.shape
            codes, zeros, scales = random_codes(rng, out, inputs, group, bits)
            group_of = np.arange(inputs) // group
            if form == "gptq_order":
                group_of = np.random.default_rng(inputs).permutation(group_of)  # the same for q, k and v
            if bits == 8:
                zeros[:] = 128
                scales = (scales / 16).astype(np.float16)
            plain[name] = values(codes, zeros, scales, group_of)
            if form == "awq":
                tensors = pack_awq(codes, zeros, scales)
            else:
                tensors = pack_gptq(codes, zeros, scales, bits, group_of if form == "gptq_order" else None, form == "gptq_v2")
            packed |= {name.removesuffix("weight") + end: array for end, array in tensors.items()}
    said = {"quant_method": "awq" if form == "awq" else "gptq", "bits": bits, "group_size": group}
    said |= {"version": "gemm", "zero_point": True} if form == "awq" else {}
    said |= {"checkpoint_format": "gptq_v2"} if form == "gptq_v2" else {}
    for name, tensors in (("packed", packed), ("plain", plain)):
        target = folder / name
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors", "*.bin", "*.index.json"))
        save_file(tensors, str(target / "model.safetensors"), {"format": "pt"})
        values_ = json.loads((target / "config.json").read_text())
        if name == "packed":
            values_["llm_config"]["quantization_config"] = said
        (target / "config.json").write_text(json.dumps(values_))
    return folder / "packed", folder / "plain"


@pytest.mark.parametrize("engine", ["eager", "inference"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["qwen2", "internlm2"])
def test_logits_are_those_of_the_weights_they_stand_for(folders, name, form, engine):
    packed, plain = folders(name, form)
    ids = np.random.default_rng(1).integers(0, 700, [2, 40])
    expected = InternVLChatModel.from_pretrained(str(plain), dtype="float32", engine="eager")(input_ids=ids).logits.numpy()
    model = InternVLChatModel.from_pretrained(str(packed), dtype="float32", engine=engine)
    assert model.quantised_layers
    got = model(input_ids=ids).logits.numpy()
    assert np.abs(got - expected).max() < 2e-3 * np.abs(expected).max()
    # One row at a time goes through another kernel.
    one = model(input_ids=ids[:1, :8]).logits.numpy()
    assert np.abs(one - expected[:1, :8]).max() < 2e-3 * np.abs(expected).max()


@pytest.mark.parametrize("form", FORMS)
def test_codes_are_taken_over_not_rounded_anew(folders, form):
    packed, plain = folders("qwen2", form)
    config = InternVLChatConfig.from_pretrained(str(packed))
    checkpoint = Checkpoint(str(packed), config)
    assert len(checkpoint.packed) == 4 * config.llm_config.num_hidden_layers
    expected = dict(read_parameters(config, str(plain), "float32"))
    for name, weight in read_parameters(config, checkpoint, "float32", checkpoint.packed):
        if name in checkpoint.packed:
            assert weight.bits == (8 if form == "gptq_8" else 4)
            np.testing.assert_array_equal(weight.dequantised().T, expected[name], name)


def test_q_k_and_v_of_different_orders_stay_within_8_bits(folders, tmp_path):
    packed, plain = folders("qwen2", "gptq_order")
    shutil.copytree(packed, tmp_path / "mixed")
    tensors = load_file(packed / "model.safetensors")
    float_tensors = load_file(plain / "model.safetensors")
    name = "language_model.model.layers.0.self_attn.v_proj"
    rng = np.random.default_rng(5)
    out, inputs = float_tensors[name + ".weight"].shape
    codes, zeros, scales = random_codes(rng, out, inputs, 32)
    group_of = rng.permutation(np.arange(inputs) // 32)
    for end, array in pack_gptq(codes, zeros, scales, 4, group_of).items():
        tensors[f"{name}.{end}"] = array
    save_file(tensors, str(tmp_path / "mixed" / "model.safetensors"), {"format": "pt"})
    config = InternVLChatConfig.from_pretrained(str(packed))
    checkpoint = Checkpoint(str(tmp_path / "mixed"), config)
    weight = dict(read_parameters(config, checkpoint, "float32", checkpoint.packed))[
        "language_model.model.layers.0.self_attn.qkv_proj.weight"
    ]
    got, expected = weight.dequantised()[-out:], values(codes, zeros, scales, group_of)
    assert np.abs(got - expected).max() < np.abs(expected).max() / 200


def test_such_weights_are_not_trained_converted_or_read_as_numbers(folders):
    packed, _ = folders("qwen2", "awq")
    config = InternVLChatConfig.from_pretrained(str(packed))
    with pytest.raises(CheckpointError, match="can be asked but not trained"):
        next(read_parameters(config, str(packed), "float32"))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t, n: t.pop(n + ".qzeros"), "has no qzeros beside it"),
        (lambda t, n: t.update({n + ".scales": t[n + ".scales"][:, :-8]}), "take the original checkpoint"),
        (lambda t, n: t.update({n + ".qweight": t[n + ".qweight"].view(np.uint8)}), "take the original|not of AWQ or GPTQ"),
        (lambda t, n: t.update({n + ".g_idx": np.zeros(64, np.int32)}), "does not put"),
        (lambda t, n: t.update({n + ".g_idx": np.full(64, -1, np.int32)}), "does not put"),
        (lambda t, n: t.update({n + ".g_idx": np.zeros(3, np.int32)}), "g_idx is"),
    ],
)
def test_what_does_not_fit_is_told(folders, tmp_path, change, message):
    packed, _ = folders("qwen2", "gptq")
    tensors = load_file(packed / "model.safetensors")
    change(tensors, "language_model.model.layers.0.self_attn.o_proj")
    target = tmp_path / "broken"
    shutil.copytree(packed, target)
    save_file(tensors, str(target / "model.safetensors"), {"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        InternVLChatModel.from_pretrained(str(target))


@pytest.mark.parametrize(
    "said, message",
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "method bitsandbytes"),
        ({"quant_method": "awq", "version": "gemv"}, "version gemv|nor GPTQ"),
    ],
)
def test_other_forms_are_refused_in_a_sentence(folders, tmp_path, said, message):
    packed, _ = folders("qwen2", "awq")
    target = tmp_path / "other"
    shutil.copytree(packed, target)
    config = json.loads((target / "config.json").read_text())
    config["llm_config"]["quantization_config"] = said
    (target / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        InternVLChatModel.from_pretrained(str(target))


@pytest.mark.parametrize("weight_dtype", ["int8", "int4"])
@pytest.mark.parametrize("name", ["qwen2", "internlm2"])
def test_converted_checkpoints_are_mapped_and_answer_as_those_rounded_while_they_load(tmp_path, name, weight_dtype):
    from paddlemix.models.internvl2.convert import convert

    source, target = str(REFERENCE / name / "checkpoint"), str(tmp_path / "few")
    convert(source, target, weight_dtype=weight_dtype, quantize_parts="language,projector,vision", max_shard_size="200KB")
    assert len(list((tmp_path / "few").glob("*.safetensors"))) > 1
    assert not [path for path in (tmp_path / "few").iterdir() if path.name.startswith(".")]
    ids = np.random.default_rng(1).integers(0, 700, [1, 40])
    rounded = InternVLChatModel.from_pretrained(source, weight_dtype=weight_dtype, quantize_parts="language,projector,vision")
    mapped = InternVLChatModel.from_pretrained(target)
    assert mapped.quantised_layers.keys() == rounded.quantised_layers.keys()
    groups = {name: layer.quantised.group for name, layer in mapped.quantised_layers.items()}
    # Of the tower's weights in 8 bits those of 256 inputs have one scale for all of them.
    wide = {
        name for name in groups if name.startswith("vision_model.") and name.endswith("fc2.weight") and weight_dtype == "int8"
    }
    assert wide == {name for name, group in groups.items() if group == 256} and set(groups.values()) <= {64, 256}
    for key, layer in mapped.quantised_layers.items():
        arrays, expected = layer.quantised.arrays(), rounded.quantised_layers[key].quantised.arrays()
        assert arrays.keys() == expected.keys()
        for kind in arrays:
            np.testing.assert_array_equal(arrays[kind], expected[kind], f"{key} {kind}")
            assert not arrays[kind].flags.owndata and not arrays[kind].flags.writeable  # the file's own memory
            assert arrays[kind].ctypes.data % arrays[kind].itemsize == 0
    np.testing.assert_array_equal(mapped(input_ids=ids).logits.numpy(), rounded(input_ids=ids).logits.numpy())
    with pytest.raises(CheckpointError, match="original"):
        convert(target, str(tmp_path / "again"), layout="torch")
    with pytest.raises(CheckpointError, match="original"):
        mapped.save_pretrained(str(tmp_path / "saved"))


def test_damaged_files_of_our_own_are_told(tmp_path):
    from paddlemix.models.internvl2.convert import convert

    convert(str(REFERENCE / "qwen2" / "checkpoint"), str(tmp_path / "few"), weight_dtype="int4", dtype="float32")
    path = tmp_path / "few" / "model.safetensors"
    tensors = load_file(path)
    name = "language_model.model.layers.0.self_attn.qkv_proj.weight"
    for change in ({name + ".scales": tensors[name + ".scales"][1:]}, {name + ".codes": tensors[name + ".codes"][:, :-1]}):
        save_file(tensors | change, str(path), {"format": "pt"})
        with pytest.raises(CheckpointError, match="do not fit|of another shape"):
            InternVLChatModel.from_pretrained(str(tmp_path / "few"))
    save_file({key: value for key, value in tensors.items() if key != name + ".factors"}, str(path), {"format": "pt"})
    with pytest.raises(CheckpointError, match="do not fit"):
        InternVLChatModel.from_pretrained(str(tmp_path / "few"))
