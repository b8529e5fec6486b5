"""Pretraining: the same steps by one process and by two, packed, with the square reduction; resumed with another number; bad rows."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from paddlemix.examples.internvl2 import internvl_chat_pretrain as command
from tests.datasets.helpers import picture_record, talk, write_meta
from tests.datasets.test_shards import group, pack
from tests.training.helpers import flags

RECORDS = [picture_record(i % 4, question=f"<image>\nWhat is number {i}?") for i in range(8)]
RECORDS += [{"conversations": talk(f"number {i}?", "ab " * (3 * i % 17 + 1))} for i in range(24)]
PACKED = "--use_packed_ds True --num_images_expected 8 --max_packed_tokens 512 --max_seq_length 512 --strict_mode False".split()
PACKED += (
    "--loss_reduction square --loss_reduction_all_gather True --log_freq 1000 --max_buffer_size 3 --replacement False".split()
)
PACKED += (
    "--allow_overflow False --remove_unused_columns False --learning_rate 1e-3 --save_strategy steps --save_steps 2".split()
)


def start(folder, *more, records=RECORDS, output="out"):
    given = flags(folder, *PACKED, *more, records=records, output=output)
    return subprocess.Popen(
        [sys.executable, command.__file__, *map(str, given)], stderr=subprocess.PIPE, text=True, env=os.environ
    )


def run(folder, *more, code=0, output="out", **options):
    """Rows of the log by step, or what was said by a run that fails."""
    process = start(folder, *more, output=output, **options)
    _, told = process.communicate(timeout=500)
    assert process.returncode == code, told[-3000:]
    if code:
        return told
    lines = (folder / output / "train_log.jsonl").read_text().splitlines()
    return {row["step"]: row for row in map(json.loads, lines) if "loss" in row}


def assert_same(one, other, steps):
    for step in steps:
        assert one[step]["loss"] == pytest.approx(other[step]["loss"], rel=2e-5), step
        assert one[step]["grad_norm"] == pytest.approx(other[step]["grad_norm"], rel=2e-4), step


@pytest.mark.slow
def test_processes_and_resuming_change_no_step(tmp_path):
    """Two rows a step: of one process, of two; two stop after two steps and one goes on, and the other way round."""
    one_process = ("--per_device_train_batch_size", 1, "--gradient_accumulation_steps", 2)
    two_processes = ("--per_device_train_batch_size", 1, "--gradient_accumulation_steps", 1, "--devices", 2)
    one = run(tmp_path, *one_process, "--max_steps", 5, output="one")
    two = run(tmp_path, *two_processes, "--max_steps", 5, "--dataloader_num_workers", 1, output="two")
    assert_same(one, two, range(1, 6))
    for stopped, name, again in (("two", "then_one", one_process), ("one", "then_two", two_processes)):
        (tmp_path / name).mkdir()
        shutil.copytree(tmp_path / stopped / "checkpoint-2", tmp_path / name / "checkpoint-2")
        assert_same(run(tmp_path, *again, "--max_steps", 5, output=name), one, range(3, 6))
    told = run(tmp_path, "--per_device_train_batch_size", 1, "--max_steps", 6, output="then_one", code=1)
    assert "keep --per_device_train_batch_size times" in told and told.count("\n") <= 3


@pytest.mark.slow
def test_killed_and_resumed(tmp_path):
    options = ("--per_device_train_batch_size", 1, "--max_steps", 8)
    whole = run(tmp_path, *options, output="whole")
    process = start(tmp_path, *options, output="killed")
    log = tmp_path / "killed/train_log.jsonl"
    for _ in range(3000):
        time.sleep(0.05)
        if (tmp_path / "killed/checkpoint-4").exists() and log.read_text().count("\n") >= 5 or process.poll() is not None:
            break
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "killed/config.json").exists()  # it was not done
    assert_same(run(tmp_path, *options, output="killed"), whole, range(1, 9))


@pytest.mark.slow
def test_bad_rows_are_skipped_up_to_the_set_share(tmp_path):
    records = list(RECORDS)
    records[3], records[20] = "{broken", {"conversations": []}
    options = ("--per_device_train_batch_size", 1, "--max_steps", 6)
    run(tmp_path, *options, "--max_bad_samples", 0.5, records=records)
    bad = [json.loads(line) for line in (tmp_path / "out/bad_samples.jsonl").read_text().splitlines()]
    assert {entry["line"] for entry in bad} <= {4, 21} and bad and all(entry["file"].endswith("set.jsonl") for entry in bad)
    many = [record if i % 3 else "{broken" for i, record in enumerate(RECORDS)]
    told = run(tmp_path, *options, records=many, output="many", code=1)
    assert "could not be used, more than 1.0%" in told


@pytest.mark.slow
def test_shards_train_as_single_files_do(tmp_path):
    """The same losses from tar shards as from the files; one shard is cut short."""
    texts = [{"conversations": talk(f"number {i}?", "ab " * (3 * i % 17 + 1))} for i in range(10)]
    pack(tmp_path / "0.tar", [group(f"a{i}", i % 4) for i in range(4)])
    pack(tmp_path / "1.tar", [group(f"t{i}", record=record) for i, record in enumerate(texts)])
    entry = {"set": {"shards": str(tmp_path / "{0..1}.tar")}}
    (tmp_path / "shards.json").write_text(json.dumps(entry))
    records = [picture_record(i % 4, question=f"<image>\nWhat is a{i}?") for i in range(4)] + texts
    options = ("--per_device_train_batch_size", 1, "--max_steps", 3)
    plain = run(tmp_path, *options, records=records, output="plain")
    packed = run(tmp_path, *options, "--meta_path", tmp_path / "shards.json", output="shards")
    assert_same(plain, packed, range(1, 4))


@pytest.mark.slow
def test_resuming_within_shards_with_another_number_of_processes(tmp_path):
    """Two processes stop after two steps, one goes on; the steps are those of one that was never stopped."""
    texts = [{"conversations": talk(f"number {i}?", "ab " * (3 * i % 17 + 1))} for i in range(20)]
    pack(tmp_path / "0.tar", [group(f"a{i}", i % 4) for i in range(6)])
    for number in (1, 2):
        pack(tmp_path / f"{number}.tar", [group(f"t{i}", record=texts[i]) for i in range(number - 1, 20, 2)])
    (tmp_path / "shards.json").write_text(json.dumps({"set": {"shards": str(tmp_path / "{0..2}.tar")}}))
    meta = ("--meta_path", tmp_path / "shards.json", "--per_device_train_batch_size", 1, "--max_steps", 4)
    one = run(tmp_path, *meta, "--gradient_accumulation_steps", 2, output="one")
    two = run(tmp_path, *meta, "--gradient_accumulation_steps", 1, "--devices", 2, output="two")
    assert_same(one, two, range(1, 5))
    (tmp_path / "then_one").mkdir()
    shutil.copytree(tmp_path / "two" / "checkpoint-2", tmp_path / "then_one" / "checkpoint-2")
    assert_same(run(tmp_path, *meta, "--gradient_accumulation_steps", 2, output="then_one"), one, range(3, 5))


def test_plan(tmp_path, capsys):
    write_meta(tmp_path, RECORDS)
    command.main([*map(str, flags(tmp_path, *PACKED)), "--dry_run"])
    assert "for batches of 2 x 512 tokens and 16 tiles" in capsys.readouterr().out
