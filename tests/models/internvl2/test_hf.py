"""transformers' own layout: read, answered from, written, and turned back."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import paddle
import pytest
from safetensors.numpy import load_file, save_file

from paddlemix.checkpoints.files import open_weight_file
from paddlemix.errors import CheckpointError, ConfigError
from paddlemix.models.internvl2 import InternVLChatConfig, InternVLChatModel
from paddlemix.models.internvl2.checkpoint import parameter_shapes, save_checkpoint
from paddlemix.models.internvl2.convert import convert
from paddlemix.tokenizers import load_tokenizer
from tests.conftest import REFERENCE, assert_close
from tests.models.internvl2.test_internvl3 import FOLDER, load, pictures

FAMILIES = ("qwen2_vit6b", "qwen3", "gpt_oss")
MEAN, STD = (np.array(values, "float32")[:, None, None] for values in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))


def bits(directory):
    """Shapes and bits of all tensors in a directory."""
    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        with open_weight_file(str(path)) as stored:
            found |= {name: (t.dtype, t.read(0, t.shape[0])) for name, t in stored.items()}
    return found


def same(one, other):
    assert one.keys() == other.keys()
    for name, (dtype, values) in one.items():
        assert other[name][0] == dtype and np.array_equal(other[name][1], values), name


@pytest.mark.parametrize("family", FAMILIES)
def test_features_logits_and_answers_equal_transformers(family):
    reference = load("hf_" + family)
    model, arrays = reference.model, reference.arrays
    drawn = dict(np.load(FOLDER / "hf_pictures.npz"))
    with paddle.no_grad():
        assert_close(model.extract_feature(arrays["pixel_values"]), arrays["image_features"])
        assert_close(model(input_ids=arrays["lm_input_ids"]).logits, arrays["lm_logits"])
    for i, chat in enumerate(reference.expected["chats"]):
        tiles = drawn.get(f"tiles_{0 if i == 2 else i}")
        pixels = None if tiles is None else (tiles.astype("float32") / 255 - MEAN) / STD
        ids = np.array([chat["input_ids"]])
        with paddle.no_grad():
            assert_close(model(pixels, ids).logits[:, -1], arrays[f"first_logits_{i}"])
        tokens = model.generate(pixels, ids, max_new_tokens=len(chat["output_ids"])).numpy()[0].tolist()
        assert tokens == chat["output_ids"], chat["label"]


@pytest.mark.parametrize("family", FAMILIES)
def test_one_checkpoint_answers_alike_in_either_layout(family):
    one, other = load(family), load("hf_" + family)
    assert other.model.config.template == one.model.config.template
    assert other.model.config.image_size == one.model.config.image_size
    assert other.model.config.num_image_token == one.model.config.num_image_token
    assert other.model.config.max_dynamic_patch == 6  # as its preprocessor_config says
    for chat in one.expected["chats"][:3]:
        history = chat["history"] and [tuple(turn) for turn in chat["history"]]
        asked = pictures(one, chat), chat["question"], {"max_new_tokens": 10}, history
        answers = [r.model.chat(r.tokenizer, *asked, num_patches_list=chat["num_patches_list"]) for r in (one, other)]
        assert answers[0] == answers[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_both_ways_bit_by_bit(tmp_path, family):
    there, back = tmp_path / "there", tmp_path / "back"
    convert(str(FOLDER / family / "checkpoint"), str(there), "hf", max_shard_size="100KB")
    same(bits(there), bits(FOLDER / f"hf_{family}" / "checkpoint"))
    tokenizer = load_tokenizer(str(there))
    for chat in load("hf_" + family).expected["chats"]:
        assert tokenizer.apply_chat_template(chat["messages"], add_generation_prompt=True) == chat["prompt"]
    convert(str(there), str(back), "torch")
    same(bits(back), bits(FOLDER / family / "checkpoint"))
    for path in (FOLDER / family / "checkpoint").glob("*.json"):
        assert json.loads((back / path.name).read_text()) == json.loads(path.read_text()), path.name
    # From a folder that transformers wrote, and nothing in it knows the original's configuration.
    foreign = tmp_path / "foreign"
    convert(str(FOLDER / f"hf_{family}" / "checkpoint"), str(foreign), "torch")
    same(bits(foreign), bits(FOLDER / family / "checkpoint"))
    model = InternVLChatModel.from_pretrained(str(foreign), dtype="float32")
    with paddle.no_grad():
        assert_close(model(input_ids=load(family).arrays["lm_input_ids"]).logits, load(family).arrays["lm_logits"])


@pytest.mark.parametrize("family", ["qwen3_moe", "internlm3"])
def test_other_families_there_and_back(tmp_path, family):
    there, back = tmp_path / "there", tmp_path / "back"
    convert(str(FOLDER / family / "checkpoint"), str(there), "hf")
    assert not any(name.startswith(("vision_model.", "mlp1.")) for name in bits(there))
    model = InternVLChatModel.from_pretrained(str(there), dtype="float32")
    with paddle.no_grad():
        assert_close(model(input_ids=load(family).arrays["lm_input_ids"]).logits, load(family).arrays["lm_logits"])
    convert(str(there), str(back), "torch")
    same(bits(back), bits(FOLDER / family / "checkpoint"))


def test_internlm2_is_written_as_llama(tmp_path):
    expected = json.loads((FOLDER / "hf_internlm2" / "expected.json").read_text())
    convert(str(REFERENCE / "internlm2" / "checkpoint"), str(tmp_path / "there"), "hf")
    written = bits(tmp_path / "there")
    assert {name: list(values.shape) for name, (_, values) in written.items()} == {
        name: weight["shape"] for name, weight in expected["weights"].items()
    }
    for name, weight in expected["weights"].items():
        values = written[name][1]
        assert hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest() == weight["sha256"], name
    config = json.loads((tmp_path / "there" / "config.json").read_text())
    for part in ("vision_config", "text_config"):
        wanted = expected["config"][part]
        assert {key: config[part].get(key, wanted[key]) for key in wanted} == wanted
    convert(str(tmp_path / "there"), str(tmp_path / "back"), "torch")
    same(bits(tmp_path / "back"), bits(REFERENCE / "internlm2" / "checkpoint"))


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_names_as_in_memory_are_read_too(tmp_path, family):
    convert(str(FOLDER / family / "checkpoint"), str(tmp_path / "files"), "hf", dtype="float32")
    tensors = load_file(tmp_path / "files" / "model.safetensors")
    renamed = {}
    for name, values in tensors.items():
        if name == "language_model.lm_head.weight":
            name = "lm_head.weight"
        elif name.startswith("language_model.model."):
            name = "model.language_model." + name.removeprefix("language_model.model.")
        else:
            name = "model." + name
        renamed[name] = values
    if family == "qwen3_moe":  # transformers 5 stacks experts
        for layer in range(3):
            prefix = f"model.language_model.layers.{layer}.mlp.experts"
            gate, up, down = (
                np.stack([renamed.pop(f"{prefix}.{i}.{name}_proj.weight") for i in range(8)]) for name in ("gate", "up", "down")
            )
            renamed[f"{prefix}.gate_up_proj"], renamed[f"{prefix}.down_proj"] = np.concatenate([gate, up], 1), down
    shutil.copytree(tmp_path / "files", tmp_path / "memory")
    save_file(renamed, tmp_path / "memory" / "model.safetensors")
    model = InternVLChatModel.from_pretrained(str(tmp_path / "memory"), dtype="float32")
    with paddle.no_grad():
        assert_close(model(input_ids=load(family).arrays["lm_input_ids"]).logits, load(family).arrays["lm_logits"])
    save_file({**renamed, **tensors}, tmp_path / "memory" / "model.safetensors")
    with pytest.raises(CheckpointError, match="mixes two namings"):
        InternVLChatModel.from_pretrained(str(tmp_path / "memory"))


def test_rope_parameters_of_newer_files_are_read():
    values = json.loads((FOLDER / "hf_gpt_oss" / "checkpoint" / "config.json").read_text())
    plain = InternVLChatConfig.from_dict(values).llm_config
    text = values["text_config"]
    text["rope_parameters"] = {**text.pop("rope_scaling"), "rope_theta": text.pop("rope_theta")}
    newer = InternVLChatConfig.from_dict(values).llm_config
    assert (newer.rope_theta, newer.rope_type) == (plain.rope_theta, plain.rope_type)
    assert newer.rope_scaling == plain.rope_scaling


def test_two_layouts_in_one_folder_are_refused(tmp_path):
    convert(str(FOLDER / "qwen3" / "checkpoint"), str(tmp_path / "hf"), "hf", dtype="float32")
    convert(str(FOLDER / "qwen3" / "checkpoint"), str(tmp_path / "torch"), "torch", dtype="float32")
    both = load_file(tmp_path / "hf" / "model.safetensors") | load_file(tmp_path / "torch" / "model.safetensors")
    save_file(both, tmp_path / "hf" / "model.safetensors")
    with pytest.raises(CheckpointError, match="mixes two layouts"):
        InternVLChatModel.from_pretrained(str(tmp_path / "hf"))


@pytest.mark.parametrize(
    "source, message",
    [
        (REFERENCE / "phi3" / "checkpoint", "Phi3ForCausalLM has no form"),
        (FOLDER / "flash" / "checkpoint", "router of Flash"),
    ],
)
def test_what_has_no_such_form(tmp_path, source, message):
    with pytest.raises(ConfigError, match=message):
        convert(str(source), str(tmp_path / "there"), "hf")
    assert not (tmp_path / "there").exists()


@pytest.mark.parametrize(
    "change, message", [({"ps_version": "v1"}, "ps_version v1"), ({"select_layer": -2}, "select_layer -2")]
)
def test_what_has_no_such_form_by_its_settings(tmp_path, change, message):
    source = tmp_path / "source"
    shutil.copytree(FOLDER / "qwen3" / "checkpoint", source)
    values = json.loads((source / "config.json").read_text()) | change
    (source / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=message):
        convert(str(source), str(tmp_path / "there"), "hf")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "internvlu_chat"}, "not supported: InternVL-U"),
        ({"model_type": "interns1"}, "'interns1' is not supported: Intern-S1 is"),
        ({"model_type": "interns1_pro"}, "'interns1_pro' is not supported: Intern-S1-Pro is"),
        ({"text_config": {"model_type": "mistral"}}, "text_config.model_type is 'mistral'"),
        ({"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy"),
    ],
)
def test_other_models_are_named(change, message):
    values = json.loads((FOLDER / "hf_qwen3" / "checkpoint" / "config.json").read_text()) | change
    with pytest.raises(ConfigError, match=message):
        InternVLChatConfig.from_dict(values)


def test_a_mixture_in_many_shards_is_converted_in_the_memory_of_a_few_tensors(tmp_path):
    """With a limit on a process's memory far below the model: as for 241B, whose largest tensor has 1.2 GB."""
    values = json.loads((FOLDER / "qwen3_moe" / "checkpoint" / "config.json").read_text())
    shutil.copytree(FOLDER / "qwen3_moe" / "checkpoint", tmp_path / "in", ignore=shutil.ignore_patterns("*.safetensors"))
    values["llm_config"] |= {"num_experts": 64, "hidden_size": 512, "moe_intermediate_size": 256, "vocab_size": 4000}
    (tmp_path / "in" / "config.json").write_text(json.dumps(values))
    config = InternVLChatConfig.from_pretrained(tmp_path / "in")
    rng = np.random.default_rng(0)
    shapes = parameter_shapes(config)
    save_checkpoint(
        {k: rng.integers(0, 0x3F80, s, "u2") for k, s in shapes.items()}, config, tmp_path / "in", max_shard_size="20MB"
    )
    sizes = [2 * int(np.prod(shape)) for shape in shapes.values()]
    largest, whole = max(sizes), sum(sizes)
    assert len(list((tmp_path / "in").glob("*.safetensors"))) > 5 and whole > 30 * largest
    program = (
        "import re, resource, sys\n"
        "from paddlemix.models.internvl2 import convert as module\n"
        "from paddlemix.tokenizers import load_tokenizer\n"
        "load_tokenizer(sys.argv[1])\n"
        "held = int(re.search(r'VmData:\\s+(\\d+)', open('/proc/self/status').read())[1]) * 1024\n"
        "limit = held + int(sys.argv[4])\n"
        "resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))\n"
        "module.convert(sys.argv[1], sys.argv[2], sys.argv[3])\n"
    )
    limit = 6 * largest
    assert limit < whole / 5
    root = Path(__file__).parents[3]
    for source, target, layout in (("in", "hf", "hf"), ("hf", "back", "torch")):
        command = [sys.executable, "-c", program, tmp_path / source, tmp_path / target, layout, limit]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=root)
        assert done.returncode == 0, done.stderr[-2000:]
    same(bits(tmp_path / "in"), bits(tmp_path / "back"))


@pytest.mark.parametrize("file", ["preprocessor_config.json", "processor_config.json"])
def test_settings_of_the_preprocessor_are_honoured(tmp_path, file):
    folder = FOLDER / "hf_qwen3" / "checkpoint"
    given = json.loads((folder / "preprocessor_config.json").read_text())

    def config_with(**change):
        shutil.copy(folder / "config.json", tmp_path)
        values = given | change
        (tmp_path / file).write_text(json.dumps(values if file[:3] == "pre" else {"image_processor": values}))
        return InternVLChatConfig.from_pretrained(str(tmp_path))

    plain = config_with()
    side = plain.vision_config.patch_size * 2
    config = config_with(min_patches=2, max_patches=5, crop_to_patches=False, size={"height": 2 * side, "width": 2 * side})
    assert (config.min_dynamic_patch, config.max_dynamic_patch, config.image_size) == (2, 5, 2 * side)
    assert config.num_image_token == 4
    for change, message in [
        ({"image_mean": [0.5, 0.5, 0.5]}, "image_mean is"),
        ({"image_std": [1, 1]}, "image_std is"),
        ({"do_normalize": False}, "do_normalize is false: only True"),
        ({"resample": 2}, "resample is 2: only 3"),
        ({"rescale_factor": 1}, "rescale_factor is 1"),
        ({"size": {"height": side, "width": 2 * side}}, "size is"),
        ({"size": {"height": side + 1, "width": side + 1}}, f"a multiple of {side}"),
        ({"min_patches": 7, "max_patches": 2}, "min_patches and max_patches are 7 and 2"),
    ]:
        with pytest.raises(ConfigError, match=message):
            config_with(**change)
