"""Training adapters on weights in few bits: what is saved, resumed and refused; chat models, LLaVA and preference training."""

import shutil

import numpy as np
import pytest

from paddlemix.checkpoints import convert_dtype, save_checkpoint
from paddlemix.checkpoints.files import open_weight_file
from paddlemix.errors import ConfigError
from paddlemix.models.blocks.chat import ChatSession
from paddlemix.models.internvl2 import InternVLChatModel, load_tokenizer
from paddlemix.training.arguments import parse
from tests.conftest import REFERENCE, tiles
from tests.training import test_llava as llava
from tests.training import test_preference as preference
from tests.training.helpers import flags, run
from tests.training.test_distributed import run_two
from tests.training.test_finetune import losses, stop_after  # noqa: F401  (a fixture)

LORA = ("--use_llm_lora", "4", "--lora_dropout", "0", "--freeze_llm", "True", "--freeze_mlp", "True")


def tensors(folder):
    """``{published name: float32 array}`` of a checkpoint."""
    with open_weight_file(folder / "model.safetensors") as stored:
        return {name: convert_dtype(t.read(0, t.shape[0]), t.dtype, "float32") for name, t in stored.items()}


@pytest.mark.parametrize("more, dtype", [(["--load_4bit"], "int4"), (["--load_8bit", "True", "--recompute", "True"], "int8")])
def test_what_is_saved_is_the_start_with_adapters_that_learned(tmp_path, more, dtype):
    run(tmp_path, *LORA, *more, "--max_steps", "12")
    found, start = tensors(tmp_path / "out"), tensors(REFERENCE / "qwen2" / "checkpoint")
    for name, values in found.items():
        if ".lora_" not in name:
            plain = name.replace(".base_model.model.", ".").replace(".base_layer.", ".")
            assert np.array_equal(values, start[plain]), name
    assert all(np.abs(values).max() > 0 for name, values in found.items() if ".lora_B" in name)
    curve = losses(tmp_path)
    assert np.mean([curve[i] for i in (11, 12)]) < 0.9 * np.mean([curve[i] for i in (1, 2)])
    # It loads like any other, and in as many bits as it learned in.
    path = str(tmp_path / "out")
    tokenizer, answers = load_tokenizer(path), []
    for bits in (None, dtype):
        model = InternVLChatModel.from_pretrained(path, dtype="float32", weight_dtype=bits)
        model.set_tokenizer(tokenizer)
        answers.append(ChatSession(model, tokenizer).ask("<image>\nWhat is it?", tiles(0), {"max_new_tokens": 8}))
    assert all(answers)


@pytest.mark.slow
def test_the_losses_are_those_of_a_start_that_was_rounded(tmp_path):
    """Plain LoRA on a checkpoint whose weights under adapters were rounded and stored in float32."""
    model = InternVLChatModel.from_pretrained(
        str(REFERENCE / "qwen2" / "checkpoint"), dtype="float32", engine="eager", weight_dtype="int4", learning=True
    )
    values = {name: value.numpy() for name, value in model.state_dict().items()}
    for name, layer in model.quantised_layers.items():
        values[name] = np.ascontiguousarray(layer.plain().dequantised("float32").numpy().T)
    start = tmp_path / "start"
    save_checkpoint(values, model.config, start)
    model.config.save(start)
    load_tokenizer(str(REFERENCE / "qwen2" / "checkpoint")).save_pretrained(str(start))
    run(tmp_path, *LORA, "--model_name_or_path", str(start), output="plain")
    run(tmp_path, *LORA, "--load_4bit", "True")
    run(tmp_path, *LORA, output="all")
    run(tmp_path, *LORA, "--load_4bit", "True", "--recompute", "True", output="again")
    few, plain, all_bits, again = (losses(tmp_path, name) for name in ("out", "plain", "all", "again"))
    assert list(few.values()) == pytest.approx(list(plain.values()), rel=1e-5)
    assert list(again.values()) == pytest.approx(list(few.values()), rel=1e-5)
    assert abs(few[1] - all_bits[1]) > 1e-3  # it is another start than with all bits


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(tmp_path, stop_after):  # noqa: F811
    common = (*LORA[:2], "--freeze_llm", "True", "--load_4bit", "True")  # with dropout, and a projector that learns
    run(tmp_path, *common, output="whole")
    stop_after(3)
    with pytest.raises(SystemExit):
        run(tmp_path, *common)
    stop_after(0)
    run(tmp_path, *common)
    assert losses(tmp_path) == losses(tmp_path, "whole") and len(losses(tmp_path)) == 6
    whole, resumed = tensors(tmp_path / "whole"), tensors(tmp_path / "out")
    assert whole.keys() == resumed.keys() and all(np.array_equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize(
    "more, message",
    [
        (["--load_4bit", "--load_8bit", "--use_llm_lora", "4"], "exclude each other"),
        (["--load_4bit"], "do not learn: train adapters"),
        (["--load_4bit", "--use_backbone_lora", "4"], "do not learn: train adapters"),
        (["--load_8bit", *LORA, "--sharding", "stage3"], "use stage2 instead of stage3"),
        (["--load_8bit", *LORA, "--tensor_parallel_degree", "2"], "leave out --tensor_parallel_degree"),
    ],
)
def test_settings_that_make_no_sense(tmp_path, more, message):
    with pytest.raises(ConfigError, match=message):
        run(tmp_path, *more)


def test_parts_are_put_together_first(tmp_path):
    given = flags(tmp_path, "--load_4bit", "--use_llm_lora", "4", "--vision_path", "a", "--llm_path", "b")
    at = given.index("--model_name_or_path")
    with pytest.raises(ConfigError, match="need a whole model: put it together first"):
        parse(given[:at] + given[at + 2 :])


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["8", "4"])
def test_llava_with_bits(tmp_path, bits):
    lora = ["--lora_enable", "True", "--lora_r", "4", "--lora_dropout", "0", "--bits", bits, "--double_quant", "True"]
    saved = ["--save_strategy", "steps", "--save_steps", "2"]
    whole = [row["loss"] for row in llava.run(tmp_path, *lora, output="whole")]
    llava.run(tmp_path, *lora, "--max_steps", "2", *saved, output="cut")
    cut = [row["loss"] for row in llava.run(tmp_path, *lora, *saved, output="cut")]
    np.testing.assert_allclose(cut, whole, rtol=1e-5)
    assert whole[-1] < whole[0]
    plain = [row["loss"] for row in llava.run(tmp_path, *lora[:6], output="plain")]
    assert 1e-5 < abs(whole[0] - plain[0]) < (0.01 if bits == "8" else 0.2) * plain[0]
    own = llava.LlavaForCausalLM.from_pretrained(tmp_path / "whole", model_base=llava.BASE, vision_tower=llava.TOWER)
    assert own.config.use_llm_lora == 0


def test_either_spelling_of_bits_is_llavas(tmp_path):
    lora = ["--lora_enable", "True", "--lora_r", "4"]
    for more in (["--bits", "4"], ["--load_4bit", "True"], ["--bits", "4", "--load_4bit"]):
        assert llava.parse_llava(llava.flags(tmp_path, *lora, *more))[0].weight_dtype == "int4"


def test_llava_says_what_bits_need(tmp_path):
    with pytest.raises(ConfigError, match="--lora_enable"):
        llava.parse_llava(llava.flags(tmp_path, "--bits", "4"))


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    common = (*LORA, "--load_4bit", "True")
    run(tmp_path, *common, "--gradient_accumulation_steps", "2", output="one")
    run_two(tmp_path, *common, "--sharding", "stage2", output="two")
    assert list(losses(tmp_path, "two").values()) == pytest.approx(list(losses(tmp_path, "one").values()), rel=1e-5)
    one, two = tensors(tmp_path / "one"), tensors(tmp_path / "two")
    assert all(np.array_equal(one[name], two[name]) for name in one if ".lora_" not in name)


@pytest.mark.slow
def test_preferences_on_few_bits_start_at_the_reference_and_go_on(tmp_path):
    """The reference is the policy, rounded as it is, without its adapters: no reward differs in the first step."""
    preference.write_pairs(tmp_path)
    more = ["--use_llm_lora", 4, "--lora_dropout", 0, "--freeze_llm", True, "--load_4bit", True, "--max_steps", 4]
    more += ["--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 1, "--save_steps", 2]
    whole = preference.run(tmp_path, tmp_path / "whole", *more)
    assert whole[0]["rewards/chosen"] == whole[0]["rewards/margins"] == 0 and whole[-1]["rewards/margins"] > 0
    shutil.copytree(tmp_path / "whole/checkpoint-2", tmp_path / "cut/checkpoint-2")
    rest = preference.run(tmp_path, tmp_path / "cut", *more)
    for one, other in zip(whole[2:], rest, strict=True):
        for name in ("loss", "rewards/chosen", "rewards/margins", "logps/rejected"):
            assert one[name] == pytest.approx(other[name], rel=1e-5, abs=1e-7), name
    told = preference.run(tmp_path, tmp_path / "other", *more, "--reference_model", preference.CHECKPOINT, code=1)
    assert "--reference_model needs weights in all bits" in told
