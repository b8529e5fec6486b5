"""Whole runs: what they write, that they resume, and what they refuse."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors import safe_open

from paddlemix.errors import CheckpointError, ConfigError, DataError, TrainingError
from paddlemix.models.internvl2 import InternVLChatModel, load_tokenizer
from paddlemix.training import trainer as trainer_module
from paddlemix.training.arguments import parse
from paddlemix.training.log import read_log
from tests.conftest import REFERENCE, tiles
from tests.datasets.helpers import picture_record, talk, write_meta
from tests.training.helpers import RECORDS, flags, run

ORIGINAL = REFERENCE / "qwen2" / "checkpoint" / "model.safetensors"
SCRIPT = trainer_module.__file__.replace("training/trainer.py", "examples/internvl2/internvl_chat_finetune.py")


def losses(folder, output="out"):
    """Loss of each step, by step."""
    return {row["step"]: row["loss"] for row in read_log(str(folder / output / "train_log.jsonl")) if "loss" in row}


@pytest.fixture
def stop_after(monkeypatch):
    """Have this process get a SIGTERM in a step."""
    original = trainer_module.Trainer.step

    def stop_after(number):
        def step(self, done, batches):
            result = original(self, done, batches)
            if done + 1 == number:
                os.kill(os.getpid(), signal.SIGTERM)
            return result

        monkeypatch.setattr(trainer_module.Trainer, "step", step)

    yield stop_after


def test_a_run_learns_and_leaves_a_whole_model(tmp_path):
    run(tmp_path, "--max_steps", "20", "--eval_meta_path", str(write_meta(tmp_path, RECORDS, "eval")), "--do_eval")
    found = losses(tmp_path)
    assert len(found) == 20 and found[20] < 0.5 * found[1]

    rows = read_log(str(tmp_path / "out" / "train_log.jsonl"))
    assert rows[-1]["step"] == 20 and 0 < rows[-1]["eval_loss"] < found[1]
    row = rows[5]
    names = "loss learning_rate grad_norm tokens_per_second samples_per_second tiles_per_step mfu step_time data_time memory_gb padding"
    assert set(names.split()) <= row.keys()
    assert 0 < row["mfu"] < 1.5 and 0 <= row["padding"] < 1 and row["tiles_per_step"] >= 0
    assert row["step_time"] * row["samples_per_second"] == pytest.approx(2, rel=0.2)

    out = str(tmp_path / "out")
    model, tokenizer = InternVLChatModel.from_pretrained(out, dtype="float32"), load_tokenizer(out)
    config = json.load(open(f"{out}/config.json"))
    assert (config["template"], config["max_dynamic_patch"], config["torch_dtype"]) == ("Hermes-2", 3, "float32")
    generation = json.load(open(f"{out}/generation_config.json"))
    assert tokenizer.convert_ids_to_tokens(generation["eos_token_id"]) == "<|im_end|>"
    assert model.chat(tokenizer, None, "What is 2 + 2?", dict(max_new_tokens=5)) is not None
    start = InternVLChatModel.from_pretrained(str(REFERENCE / "qwen2" / "checkpoint"), dtype="float32")
    for name, value in model.state_dict().items():
        assert np.array_equal(value.numpy(), start.state_dict()[name].numpy()) == name.startswith("vision_model."), name
    # The layout is the original's: the same tensors of the same shapes.
    with safe_open(f"{out}/model.safetensors", "np") as ours, safe_open(ORIGINAL, "np") as original:
        shapes = [{key: file.get_slice(key).get_shape() for key in file.keys()} for file in (ours, original)]  # noqa: SIM118
    assert shapes[0] == shapes[1]


MODES = {
    "plain": [],
    "workers": ["--dataloader_num_workers", "2"],
    "bfloat16": "--bf16 True --fp16_opt_level O2 --amp_master_grad True --recompute True".split(),
    "lora": "--use_llm_lora 2 --freeze_llm True --freeze_mlp True".split(),
    "packed": "--use_packed_ds True --max_packed_tokens 256 --max_seq_length 256 --num_images_expected 6 --max_buffer_size 2 "
    "--per_device_train_batch_size 1".split(),
    "vision": "--freeze_backbone False --drop_path_rate 0.5 --recompute True --gradient_accumulation_steps 2".split(),
}


QUICK = ("plain", "bfloat16")


@pytest.mark.parametrize("mode", [mode if mode in QUICK else pytest.param(mode, marks=pytest.mark.slow) for mode in MODES])
def test_a_run_interrupted_by_sigterm_goes_on_as_if_it_had_not_been(tmp_path, mode, stop_after):
    run(tmp_path, *MODES[mode], output="whole")
    stop_after(3)
    with pytest.raises(SystemExit) as exit:
        run(tmp_path, *MODES[mode])
    assert exit.value.code == 143
    assert not (tmp_path / "out" / "config.json").exists() and (tmp_path / "out" / "checkpoint-3").is_dir()
    stop_after(0)
    run(tmp_path, *MODES[mode])
    assert losses(tmp_path) == losses(tmp_path, "whole")
    assert len(losses(tmp_path)) == 6
    whole, resumed = (
        InternVLChatModel.from_pretrained(str(tmp_path / name), dtype="float32").state_dict() for name in ("whole", "out")
    )
    assert all(np.array_equal(whole[name].numpy(), resumed[name].numpy()) for name in whole)


def test_checkpoints_are_kept_or_removed_and_a_finished_run_is_not_repeated(tmp_path):
    settings = ["--save_strategy", "steps", "--save_steps", "2", "--save_total_limit", "2"]
    run(tmp_path, *settings)
    assert sorted(path.name for path in (tmp_path / "out").glob("*checkpoint*")) == ["checkpoint-4", "checkpoint-6"]
    before = (tmp_path / "out" / "train_log.jsonl").read_text()
    run(tmp_path, *settings)
    assert (tmp_path / "out" / "train_log.jsonl").read_text() == before
    run(tmp_path, *settings, "--overwrite_output_dir", "True", "--max_steps", "2")
    assert sorted(path.name for path in (tmp_path / "out").glob("*checkpoint*")) == ["checkpoint-2"]
    assert list(losses(tmp_path)) == [1, 2]


def test_epochs_end_where_the_data_do(tmp_path):
    """8 samples, 3 a step: three steps an epoch."""
    meta = str(write_meta(tmp_path, RECORDS, "eval"))
    run(
        *(tmp_path, "--per_device_train_batch_size", "3", "--max_steps", "-1", "--num_train_epochs", "2"),
        *("--save_strategy", "epoch", "--evaluation_strategy", "epoch", "--eval_meta_path", meta),
    )
    assert sorted(path.name for path in (tmp_path / "out").glob("checkpoint*")) == ["checkpoint-3", "checkpoint-6"]
    rows = read_log(str(tmp_path / "out" / "train_log.jsonl"))
    assert [row["step"] for row in rows if "eval_loss" in row] == [3, 6]
    assert [row["epoch"] for row in rows if "epoch" in row] == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3, 5 / 3, 2])


@pytest.mark.slow
def test_packed_epochs_end_about_where_the_data_do_and_go_on_exactly(tmp_path, stop_after):
    settings = [*MODES["packed"], "--max_steps", "-1", "--num_train_epochs", "4"]
    run(tmp_path, *settings, output="whole")
    rows = read_log(str(tmp_path / "whole" / "train_log.jsonl"))
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    passed = np.diff([0, *(row["epoch"] for row in rows)])
    assert 3 < rows[-1]["epoch"] < 5 and (passed > 0).all()
    assert rows[-1]["learning_rate"] == pytest.approx(rows[0]["learning_rate"] / len(rows))  # it decays to the end
    stop_after(3)
    with pytest.raises(SystemExit):
        run(tmp_path, *settings)
    stop_after(0)
    run(tmp_path, *settings)
    assert losses(tmp_path) == losses(tmp_path, "whole")


def test_validation_is_the_mean_over_all_labels(tmp_path):
    """The same for any batch size, and the first training loss where nothing was learned yet."""
    meta = str(write_meta(tmp_path, RECORDS, "eval"))
    found = []
    for size in ("1", "8"):
        run(
            *(tmp_path, "--eval_meta_path", meta, "--evaluation_strategy", "steps", "--max_steps", "1", "--learning_rate", "0"),
            *("--per_device_train_batch_size", "8", "--per_device_eval_batch_size", size),
        )
        first, evaluation = read_log(str(tmp_path / "out" / "train_log.jsonl"))
        found += [first["loss"], evaluation["eval_loss"]]
    assert found == pytest.approx([found[0]] * 4, rel=1e-5)


def test_visualdl_gets_every_curve(tmp_path):
    run(tmp_path, "--report_to", "visualdl", "--max_steps", "2")
    from visualdl import LogReader

    (file,) = (tmp_path / "out" / "runs").iterdir()
    reader = LogReader(file_path=str(file))
    assert [round(point.value, 3) for point in reader.get_data("scalar", "loss")] == [
        round(x, 3) for x in losses(tmp_path).values()
    ]


def test_tensorboard_and_visualdl_get_the_same_curves(tmp_path):
    tensorboard = pytest.importorskip("tensorboardX")
    run(tmp_path, "--report_to", "tensorboard,visualdl", "--max_steps", "2")
    from tensorboardX.proto import event_pb2
    from tensorboardX.record_writer import masked_crc32c

    files = sorted((tmp_path / "out" / "runs").iterdir())
    assert len(files) == 2 and tensorboard.__version__
    stored = next(file for file in files if "tfevents" in file.name).read_bytes()
    found = {}
    while stored:  # length, its check sum, an event, its check sum
        length = int.from_bytes(stored[:8], "little")
        content = stored[12 : 12 + length]
        assert int.from_bytes(stored[12 + length : 16 + length], "little") == masked_crc32c(content)
        event = event_pb2.Event.FromString(content)
        found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
        stored = stored[16 + length :]
    assert {step: found["loss", step] for step in (1, 2)} == pytest.approx(losses(tmp_path), rel=1e-5)


def test_what_curves_need_is_told_and_nothing_is_sent_unasked(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    run(tmp_path, "--max_steps", "1")  # needs none
    with pytest.raises(ConfigError, match=r"wandb is not installed, .* pip install 'paddlemix\[wandb\]'"):
        run(tmp_path, "--report_to", "wandb", "--max_steps", "1", output="other")
    for wrong in ("tensorbord", "visualdl,none", "wandb,x"):
        with pytest.raises(ConfigError, match="use one or more of visualdl, tensorboard, wandb"):
            parse(flags(tmp_path, "--report_to", wrong))


def test_settings_of_the_run_are_those_of_the_model_afterwards(tmp_path):
    run(tmp_path, "--max_steps", "1", "--vision_select_layer", "-2", "--max_dynamic_patch", "2", "--use_thumbnail", "False")
    config = json.load(open(tmp_path / "out" / "config.json"))
    assert (config["select_layer"], config["max_dynamic_patch"], config["use_thumbnail"]) == (-2, 2, False)


def test_small_files_of_the_model_go_along(tmp_path):
    import shutil

    source = tmp_path / "source"
    shutil.copytree(REFERENCE / "qwen2" / "checkpoint", source)
    (source / "modeling_internvl_chat.py").write_text("# remote code\n")
    (source / "generation_config.json").write_text('{"eos_token_id": 5}')
    run(tmp_path, "--max_steps", "1", "--model_name_or_path", str(source))
    assert (tmp_path / "out" / "modeling_internvl_chat.py").read_text() == "# remote code\n"
    assert json.load(open(tmp_path / "out" / "generation_config.json")) == {"eos_token_id": 5}


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "more, error, message",
    [
        (["--conv_style", "vicuna"], Exception, "vicuna"),
        (["--down_sample_ratio", "0.25"], ConfigError, "--down_sample_ratio is 0.25, but the model's is 0.5"),
        (["--vision_select_layer", "-9"], ConfigError, "--vision_select_layer is -9, but the vision tower has 3 layers"),
        (["--use_packed_ds", "True", "--save_strategy", "epoch"], ConfigError, "--use_packed_ds has no common epochs"),
        (["--meta_path", "None"], ConfigError, "--meta_path is missing"),
        (["--do_eval"], ConfigError, "--eval_meta_path is missing"),
        (["--resume_from_checkpoint", str(REFERENCE / "qwen2" / "checkpoint")], CheckpointError, "has no trainer_state.json"),
    ],
)
def test_settings_that_do_not_fit(tmp_path, more, error, message):
    with pytest.raises(error, match=message):
        run(tmp_path, *more)


def test_resuming_with_other_settings_is_refused(tmp_path):
    run(tmp_path, "--save_strategy", "steps", "--save_steps", "3", "--max_steps", "3")
    with pytest.raises(ConfigError, match="2 samples a step, not 4"):
        run(tmp_path, "--gradient_accumulation_steps", "2")
    with pytest.raises(ConfigError, match="has no optimizer state.*vision_model"):
        run(tmp_path, "--freeze_backbone", "False")
    with pytest.raises(ConfigError, match="without --use_packed_ds"):
        run(tmp_path, "--use_packed_ds", "True", "--strict_mode", "False")
    run(tmp_path, "--freeze_backbone", "False", "--ignore_load_lr_and_optim", "True", "--max_steps", "1")
    assert list(losses(tmp_path)) == [1]


def test_bad_records_are_counted_and_too_many_stop_the_run(tmp_path):
    broken = [picture_record(1), "{not json", *({"image": "gone.png", "conversations": talk("<image>\nWhat?")},) * 12]
    with pytest.raises(DataError, match="samples could not be used"):
        run(tmp_path, records=broken)
    listed = [json.loads(line) for line in (tmp_path / "out" / "bad_samples.jsonl").read_text().splitlines()]
    assert {row["line"] for row in listed} <= set(range(2, 15)) and len(listed) > 5


def test_a_damaged_checkpoint_is_named(tmp_path):
    run(tmp_path, "--save_strategy", "steps", "--save_steps", "3", "--max_steps", "3")
    path = tmp_path / "out" / "checkpoint-3" / "optimizer-0.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"optimizer-0\.safetensors is damaged"):
        run(tmp_path)


def test_the_command_says_one_sentence_and_exits_with_1(tmp_path):
    for arguments, message in (
        (["--output_dir", "x"], "error: no model to train"),
        (["--model_name_or_path", "x", "--output_dir", "x", "--sharding", "stage4"], "invalid choice: 'stage4'"),
        (["settings.json"], "error: settings.json cannot be read"),
    ):
        result = subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, cwd=tmp_path)
        assert result.returncode == 1 and message in result.stderr and "Traceback" not in result.stderr


# ---------------------------------------------------------------------- killed


@pytest.mark.slow
def test_a_run_killed_while_saving_goes_on_from_the_last_checkpoint(tmp_path):
    """SIGKILL in the middle of writing checkpoint-4: checkpoint-2 is what counts, and the end is the same."""
    settings = ["--save_strategy", "steps", "--save_steps", "2", "--save_total_limit", "1"]
    run(tmp_path, *settings, output="whole")
    # The process kills itself when the weights of the second checkpoint are half written.
    program = f"""
import os, signal
from paddlemix.checkpoints import safetensors_files
from paddlemix.training import trainer as t
write = safetensors_files._write_file
def dying(path, *rest):
    if "checkpoint-4" in path:
        with open(path, "wb") as file:
            file.write(bytes(1000))
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, *rest)
safetensors_files._write_file = dying
from paddlemix.training.arguments import parse
t.finetune(*parse({flags(tmp_path, *settings)!r}))
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert result.returncode == -signal.SIGKILL, result.stderr
    names = {path.name for path in (tmp_path / "out").glob("*checkpoint*")}
    assert names == {"checkpoint-2", "unfinished-checkpoint-4"}
    run(tmp_path, *settings)
    assert {path.name for path in (tmp_path / "out").glob("*checkpoint*")} == {"checkpoint-6"}
    assert losses(tmp_path) == losses(tmp_path, "whole")


@pytest.mark.slow
def test_sigterm_from_outside_saves_and_exits(tmp_path):
    arguments = flags(tmp_path, "--max_steps", "2000")
    process = subprocess.Popen(
        [sys.executable, SCRIPT, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.monotonic() + 60
    while len(read_log(str(tmp_path / "out" / "train_log.jsonl"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143, output
    (checkpoint,) = (tmp_path / "out").glob("checkpoint-*")
    assert f"{checkpoint.name} is complete" in output
    assert InternVLChatModel.from_pretrained(str(checkpoint), dtype="float32").extract_feature(tiles(1)).shape[0] == len(
        tiles(1)
    )


def test_settings_from_files(tmp_path):
    values = dict(model_name_or_path="m", output_dir="o", freeze_llm=True, learning_rate=4e-5, meta_path=None, max_steps=7)
    json_file, yaml_file = tmp_path / "a.json", tmp_path / "a.yaml"
    json_file.write_text(json.dumps(values))
    yaml_file.write_text("".join(f"{key}: {'null' if value is None else value}\n" for key, value in values.items()))
    as_flags = parse("--model_name_or_path m --output_dir o --freeze_llm --learning_rate 4e-5 --max_steps 7".split())
    assert parse([str(json_file)]) == parse([str(yaml_file)]) == as_flags
    assert parse([str(json_file), "--max_steps", "9"])[2].max_steps == 9
    assert as_flags[0].freeze_llm is True and parse([str(json_file), "--freeze_llm", "False"])[0].freeze_llm is False


def test_loss_that_is_no_number_ends_the_run(tmp_path, monkeypatch):
    original = trainer_module.Trainer.step

    def step(self, number, batches):
        if number == 2:
            self.model.language_model.model.norm.register_forward_post_hook(lambda *given: given[-1] * np.nan)
        return original(self, number, batches)

    monkeypatch.setattr(trainer_module.Trainer, "step", step)
    with pytest.raises(TrainingError, match=r"step 3: the loss is nan; its samples are .*set\.jsonl:\d"):
        run(tmp_path)
    assert list(losses(tmp_path)) == [1, 2]


def test_a_template_that_is_not_the_models_is_warned_of(tmp_path, caplog):
    run(tmp_path, "--max_steps", "1", "--conv_style", "internvl2_5")
    assert "--conv_style is internvl2_5, but the model was trained with Hermes-2" in caplog.text


def test_what_share_may_be_bad_is_an_argument(tmp_path):
    broken = [*RECORDS, *({"image": "gone.png", "conversations": talk("<image>\nWhat?")},) * 12]
    run(tmp_path, "--max_bad_samples", "0.9", records=broken)
    rows = read_log(str(tmp_path / "out" / "train_log.jsonl"))
    assert len(losses(tmp_path)) == 6 and rows[-1]["bad_samples"] > 5
