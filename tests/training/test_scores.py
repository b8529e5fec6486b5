"""Benchmarks that are scored while a model trains, and the best model by them."""

import json
import shutil

import numpy as np
import pytest

from paddlemix.errors import ConfigError, DataError
from paddlemix.evaluation.answers import read_answers
from paddlemix.evaluation.local import load_model
from paddlemix.evaluation.runner import Settings, run_task
from paddlemix.evaluation.tasks import TASKS
from paddlemix.examples.internvl2.internvl_chat_finetune import main
from paddlemix.models.internvl2 import InternVLChatModel
from paddlemix.training.arguments import parse
from paddlemix.training.log import read_log
from paddlemix.training.trainer import finetune
from tests.conftest import REFERENCE
from tests.datasets.helpers import IMAGES, write_meta
from tests.training.helpers import RECORDS, flags
from tests.training.test_distributed import run_two

TASK = "vqa-ai2d-test"


@pytest.fixture
def data(tmp_path):
    """A data folder: the pictures that training sees, with a question each."""
    root = tmp_path / "data"
    (root / "pictures").mkdir(parents=True)
    for i in range(3):
        shutil.copy(IMAGES / f"img{i}.png", root / "pictures")
    rows = [{"image": f"data/pictures/img{i}.png", "question": f"What is {i}?", "answer": "Yes"} for i in range(3)]
    rows += [{"image": f"data/pictures/img{i}.png", "question": "Is it grey?", "answer": "Yes"} for i in range(3)]
    (root / "ai2diagram").mkdir()
    (root / "ai2diagram" / "test_vlmevalkit.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def evaluated(data, *more):
    return ("--eval_tasks", TASK, "--eval_data_root", str(data), "--evaluation_strategy", "steps", *more)


def answers(folder, step):
    return [row["answer"] for row in read_answers(folder / "evaluations" / str(step) / TASK / "answers.jsonl")]


def checkpoint_answers(data, checkpoint, out):
    settings = Settings(
        str(checkpoint), str(data), dynamic=True, max_num=3, device="cpu", dtype="float32", limit=5, shuffle_seed=0
    )
    run_task(TASKS[TASK], settings, out, model=load_model(settings), progress=False, report=False)
    return [row["answer"] for row in read_answers(out / TASK / "answers.jsonl")]


def test_the_model_in_training_answers_as_its_checkpoint_does(tmp_path, data):
    saved = ("--save_strategy", "steps", "--save_steps", "2", "--max_steps", "4", "--eval_steps", "2")
    main(flags(tmp_path, *saved, *evaluated(data, "--eval_limit", "5")))
    out = tmp_path / "out"
    found = {row["step"]: row[f"eval_{TASK}"] for row in read_log(str(out / "train_log.jsonl")) if f"eval_{TASK}" in row}
    assert set(found) == {2, 4} and all(0 <= value <= 1 for value in found.values())
    for step in (2, 4):
        expected = checkpoint_answers(data, out / f"checkpoint-{step}", tmp_path / str(step))
        assert len(expected) == 5 and answers(out, step) == expected
        score = json.loads((out / "evaluations" / str(step) / TASK / "score.json").read_text())
        assert score["score"]["accuracy"] == found[step]
    start = checkpoint_answers(data, REFERENCE / "qwen2" / "checkpoint", tmp_path / "start")
    assert answers(out, 4) != start, "it has learned by then"


class Scripted:
    """A scorer that knows what it will find."""

    names = ["quiz"]

    def __init__(self, *values):
        self.values = dict(enumerate(values, 1))

    def __call__(self, model, tokenizer, processes, together, step):
        assert not model.training
        return {"quiz": self.values[step]}


def weights(folder):
    model = InternVLChatModel.from_pretrained(str(folder), dtype="float32")
    return {name: value.numpy() for name, value in model.state_dict().items()}


def test_the_best_model_is_kept_and_is_left_at_the_end(tmp_path):
    best = ("--metric_for_best_model", "quiz", "--load_best_model_at_end", "True", "--evaluation_strategy", "steps")
    saved = ("--save_strategy", "steps", "--save_steps", "1", "--max_steps", "4", "--save_total_limit", "1")
    finetune(*parse(flags(tmp_path, *best, *saved)), scorer=Scripted(0.25, 0.5, 0.5, 0.125))
    out = tmp_path / "out"
    assert json.loads((out / "best" / "best.json").read_text()) == {"metric": "quiz", "value": 0.5, "step": 2}
    final, kept, last = weights(out), weights(out / "best"), weights(out / "checkpoint-4")
    assert all(np.array_equal(value, kept[name]) for name, value in final.items())
    assert any(not np.array_equal(value, last[name]) for name, value in final.items())
    assert not list(out.glob(".*.tmp")) and not list(out.glob("unfinished*"))
    # Going on: what was best before is known.
    more = ("--max_steps", "5")
    finetune(*parse(flags(tmp_path, *best, *saved, *more)), scorer=Scripted(0, 0, 0, 0, 0.375))
    assert json.loads((out / "best" / "best.json").read_text())["step"] == 2
    # Anew: it is forgotten.
    anew = ("--overwrite_output_dir", "True", "--max_steps", "1")
    finetune(*parse(flags(tmp_path, *best, *saved, *anew)), scorer=Scripted(0.125))
    assert json.loads((out / "best" / "best.json").read_text()) == {"metric": "quiz", "value": 0.125, "step": 1}


def test_of_losses_the_smallest_is_best(tmp_path, monkeypatch):
    from paddlemix.training.trainer import Trainer

    values = iter([3.0, 2.0, 4.0])
    monkeypatch.setattr(Trainer, "evaluate", lambda self, batches: next(values))
    meta = str(write_meta(tmp_path, RECORDS[:2], "heldout"))
    more = ("--load_best_model_at_end", "True", "--evaluation_strategy", "steps", "--eval_meta_path", meta, "--max_steps", "3")
    finetune(*parse(flags(tmp_path, *more)))
    assert json.loads((tmp_path / "out" / "best" / "best.json").read_text()) == {"metric": "loss", "value": 2.0, "step": 2}


@pytest.mark.parametrize(
    "more, error, told",
    [
        (("--evaluation_strategy", "steps"), ConfigError, "--eval_tasks"),
        (("--eval_tasks", "vqa-docvqa-test"), ConfigError, "vqa-docvqa-test is scored by its server"),
        (("--eval_tasks", "mmvet"), ConfigError, "mmvet is scored by a judge"),
        (("--eval_tasks", "nothing"), ConfigError, "'nothing' is not known"),
        (("--eval_tasks", "seed"), DataError, "SEED-Bench.json is missing"),
        (("--metric_for_best_model", "pope"), ConfigError, "--metric_for_best_model pope is not evaluated"),
        (("--eval_limit", "0"), ConfigError, "--eval_limit is 0"),
    ],
)
def test_what_cannot_be_scored_is_told_before_the_first_step(tmp_path, more, error, told):
    from paddlemix.examples.internvl2.internvl_chat_finetune import run

    with pytest.raises(error, match=told):
        run(flags(tmp_path, *more, "--eval_data_root", str(tmp_path)), __file__)
    assert not (tmp_path / "out" / "train_log.jsonl").exists()


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--sharding", "stage3"), ("--tensor_parallel_degree", "2")])
def test_two_processes_answer_as_one_does(tmp_path, data, more):
    """With stage 3 every block has its weights only while it runs; where layers are divided, both ask everything."""
    common = evaluated(data, "--learning_rate", "0", "--max_steps", "1", "--eval_steps", "1", "--eval_limit", "3")
    run_two(tmp_path, *common, *more)
    main(flags(tmp_path, *common, output="one"))
    expected = answers(tmp_path / "one", 1)
    assert len(expected) == 3 and answers(tmp_path / "out", 1) == expected
