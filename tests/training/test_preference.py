"""Losses, ids, metrics and three steps of MPO equal the original's (tests/data/reference/mpo)."""

import json
import shutil

import numpy as np
import paddle
import pytest

from paddlemix.datasets.preference import PairCollator, PreferenceEncoder, parse_preference
from paddlemix.errors import ConfigError, DataError
from paddlemix.models.internvl2 import InternVLChatModel, load_tokenizer
from paddlemix.training.log import read_log
from paddlemix.training.preference import PreferenceLoss, PreferenceObjective, Reference, encode_preference
from tests.conftest import REFERENCE, SAME_PILLOW
from tests.datasets.helpers import make_encoder

EXPECTED = json.loads((REFERENCE / "mpo/expected.json").read_text(encoding="utf-8"))
START = np.load(REFERENCE / "mpo/start.npz")
CHECKPOINT = str(REFERENCE / "qwen2/checkpoint")
SAMPLES = [(s, s) for s in EXPECTED["samples"]]


@pytest.mark.parametrize("name", ["sigmoid", "bco_pair", "hinge"])
def test_losses_and_rewards_on_given_arrays(name):
    loss = PreferenceLoss(beta=EXPECTED["beta"], weights={name: 1.0})
    for number, case in enumerate(EXPECTED["array_cases"], start=1):
        arrays = [case[f"{model}_{side}"] for model in ("policy", "reference") for side in ("chosen", "rejected")]
        losses, chosen, rejected = loss(*arrays)
        np.testing.assert_allclose(losses.numpy(), case[name], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose([chosen.numpy(), rejected.numpy()], case[f"{name}_rewards"], rtol=1e-5, atol=1e-6)
        if name == "bco_pair":
            assert loss.running_mean == pytest.approx(case["running_mean"], rel=1e-5)
            assert loss.observations == number


def test_weighted_sum_and_smoothing_and_ipo():
    """By the formulas: written out with NumPy."""
    rng = np.random.default_rng(0)
    pc, pr, rc, rr = rng.normal(size=(4, 6)).astype("float32") * 10
    margin = 0.1 * (pc - pr - rc + rr)
    smooth = 0.9 * np.log1p(np.exp(-margin)) + 0.1 * np.log1p(np.exp(margin))
    hinge = np.maximum(0, 1 - margin)
    losses, chosen, _ = PreferenceLoss(0.1, {"sigmoid": 0.3, "hinge": 0.5}, label_smoothing=0.1)(pc, pr, rc, rr)
    np.testing.assert_allclose(losses.numpy(), 0.3 * smooth + 0.5 * hinge, rtol=1e-5)
    np.testing.assert_allclose(chosen.numpy(), 0.8 * 0.1 * (pc - rc), rtol=1e-5, atol=1e-6)
    lengths = np.array([3, 4, 5, 1, 2, 7]), np.array([1, 9, 2, 2, 2, 3])
    losses, _, _ = PreferenceLoss(0.1, {"ipo": 1.0})(pc, pr, rc, rr, lengths)
    np.testing.assert_allclose(losses.numpy(), ((pc - rc) / lengths[0] - (pr - rr) / lengths[1] - 5) ** 2, rtol=1e-4)


@pytest.mark.parametrize(
    "arguments",
    [dict(weights={"dpo": 1.0}), dict(weights={}), dict(beta=0.0), dict(beta=float("nan")), dict(label_smoothing=0.5)],
)
def test_settings_that_make_no_sense(arguments):
    with pytest.raises(ConfigError):
        PreferenceLoss(**arguments)


def test_state_goes_on():
    first, second = PreferenceLoss(), PreferenceLoss()
    arrays = np.random.default_rng(1).normal(size=(3, 4, 5)).astype("float32")
    first(*arrays[0])
    first(*arrays[1])
    second.load_state(json.loads(json.dumps(first.state())))
    np.testing.assert_array_equal(first(*arrays[2])[0].numpy(), second(*arrays[2])[0].numpy())


def test_ids_and_labels():
    tokenizer = load_tokenizer(CHECKPOINT)
    for record, sample, tiles in zip(EXPECTED["records"], EXPECTED["samples"], EXPECTED["tiles"]):
        pictures = record["image"] if isinstance(record["image"], list) else [record["image"]] * (record["image"] is not None)
        shares = [16 * tiles] * len(pictures)
        if len(pictures) > 1:  # tiles of each: by what the encoder cuts
            pair = encoder().encode(parsed(record))
            ids = pair["input_ids"].tolist(), pair["rejected_input_ids"].tolist()
            labels = pair["labels"].tolist(), pair["rejected_labels"].tolist()
        else:
            (a, x), (b, y) = encode_preference(record, tokenizer, EXPECTED["template"], shares)
            ids, labels = (a, b), (x, y)
        for side, i, label in zip(("chosen", "rejected"), ids, labels):
            assert i == sample[f"{side}_input_ids"]
            assert label == sample[f"{side}_labels"]


def encoder():
    base = make_encoder(max_dynamic_patch=4, use_thumbnail=True, dynamic_image_size=True)
    return PreferenceEncoder(base.tokenizer, EXPECTED["template"], base.options)


def parsed(record):
    return parse_preference(json.dumps(record).encode(), str(REFERENCE / "images"))


def batch():
    encoded, numbers = encoder(), range(4)
    samples = [encoded.encode(parsed(EXPECTED["records"][i])) | {"name": f"r:{i}", "bad": []} for i in numbers]
    assert [len(s["pixel_values"]) or 1 for s in samples] == [EXPECTED["tiles"][i] for i in numbers]
    return samples


def policy():
    """The policy's start as the reference was made: its projector differs from the reference model's, and learns."""
    model = InternVLChatModel.from_pretrained(CHECKPOINT, dtype="float32", engine="eager")
    model.set_tokenizer(load_tokenizer(CHECKPOINT))
    own = dict(model.named_parameters())
    for name, parameter in own.items():
        parameter.stop_gradient = name.startswith("vision_model.")
    reference = Reference(model)
    for name in START.files:
        value = START[name].T if START[name].ndim == 2 else START[name]
        own[name].set_value(paddle.to_tensor(np.ascontiguousarray(value)))
    return model, reference


def objective(reference):
    return PreferenceObjective(PreferenceLoss(EXPECTED["beta"]), reference)


class _One:
    @staticmethod
    def sum(values):
        return np.asarray(values, np.float64)


def steps(packed=False):
    """Loss, metrics and gradient norms of the reference's steps, one pair a row or all packed into one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("paddlemix.training.preference.train_mode", lambda model: model.eval())  # as the reference was made
        model, reference = policy()
        work = objective(reference)
        pairs, collator = batch(), PairCollator()
        data = collator.collate_rows([pairs]) if packed else collator(pairs)
        learned = [p for p in model.parameters() if not p.stop_gradient]
        adamw, found = paddle.optimizer.AdamW(5e-4, parameters=learned, weight_decay=0.0), []
        for _ in EXPECTED["steps"]:
            loss = work.loss(model, data, work.weights(data))
            loss.backward()
            norms = {name: float(p.grad.norm()) for name, p in model.named_parameters() if p.grad is not None}
            found.append({"loss": float(loss), "grad_norms": norms, **work.metrics(_One)})
            adamw.step()
            adamw.clear_grad()
    return found


@pytest.mark.parametrize("packed", [False, True])
def test_three_steps(packed):
    """Losses, metrics and gradient norms."""
    near = 1 if SAME_PILLOW else 10
    for found, step in zip(steps(packed), EXPECTED["steps"], strict=True):
        norms = found.pop("grad_norms")
        assert found["loss"] == pytest.approx(step["loss"], rel=1e-4)
        for name, value in found.items():
            if not name.startswith("logits/"):  # which depend on padding in the original
                assert value == pytest.approx(step[name], rel=2e-4 * near, abs=2e-5 * near), name
        for name in ("mlp1.1.weight", "mlp1.3.weight", "language_model.model.layers.0.mlp.down_proj.weight"):
            if name in step.get("grad_norms", ()):
                assert norms[name] == pytest.approx(step["grad_norms"][name], rel=1e-3), name


def test_reference_is_back_in_its_place():
    model, reference = policy()
    before = {name: p.numpy().copy() for name, p in model.named_parameters()}
    original = dict(InternVLChatModel.from_pretrained(CHECKPOINT, dtype="float32", engine="eager").named_parameters())
    with reference.in_place():
        for name, parameter in model.named_parameters():
            np.testing.assert_array_equal(parameter.numpy(), original[name].numpy())
    for name, parameter in model.named_parameters():
        np.testing.assert_array_equal(parameter.numpy(), before[name])


def test_frozen_tower_looks_once(monkeypatch):
    model, reference = policy()
    looked = []
    forward = type(model.vision_model).forward
    monkeypatch.setattr(type(model.vision_model), "forward", lambda self, x, *a: looked.append(len(x)) or forward(self, x, *a))
    work = objective(reference)
    data = PairCollator()(batch())
    work.loss(model, data, work.weights(data))
    assert sum(looked) == len(data["pixel_values"])


def test_loss_of_a_step_does_not_depend_on_its_batches():
    """Two batches of two pairs give the gradients of one of four, but for bco's running mean."""
    pairs = batch()
    gradients = []
    for parts in ([pairs], [pairs[:2], pairs[2:]]):
        model, reference = policy()
        work = PreferenceObjective(PreferenceLoss(0.1, {"sigmoid": 1.0}), reference)
        batches = [PairCollator()(part) for part in parts]
        totals = np.sum([work.weights(b) for b in batches], axis=0)
        for data in batches:
            work.loss(model, data, totals).backward()
        gradients.append(model.mlp1["1"].weight.grad.numpy())
    np.testing.assert_allclose(gradients[0], gradients[1], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    "row, message",
    [
        ({"question": "a", "chosen": "b", "rejected": "b"}, "two equal answers"),
        ({"question": "a", "chosen": " ", "rejected": "b"}, "no text as 'chosen'"),
        ({"question": "a", "chosen": "b"}, "no text as 'rejected'"),
        ({"chosen": "b", "rejected": "c"}, "no 'question'"),
        ({"messages": "x", "rejected_response": "c"}, "needs 'messages', a list of messages"),
        (
            {"messages": [{"role": r, "content": "q"} for r in ("user", "assistant", "user")], "rejected_response": "c"},
            "does not end with the chosen answer",
        ),
        ({"messages": [{"role": "user", "content": "q"}], "rejected_response": "c"}, "has no answer to learn"),
        ({"prompt": [{"role": "bot", "content": "q"}], "chosen": "a", "rejected": "c"}, "message 1 must have 'role'"),
        ([1], "a JSON object, should be"),
    ],
)
def test_bad_pairs(row, message):
    with pytest.raises(DataError, match=message):
        parse_preference(json.dumps(row).encode())


def test_other_forms_are_the_same_pair():
    rows = [
        {"question": "<image>\nWhat?", "chosen": "A cat.", "rejected": "A dog.", "image": "img0.png"},
        {"prompt": "<image>\nWhat?", "chosen": "A cat.", "rejected": "A dog.", "images": ["img0.png"]},
        {
            "messages": [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "A cat."}],
            "rejected_response": "A dog.",
            "images": ["img0.png"],
        },
        {
            "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "\nWhat?"}]}],
            "chosen": [{"role": "assistant", "content": "A cat."}],
            "rejected": [{"role": "assistant", "content": "A dog."}],
            "images": ["img0.png"],
        },
    ]
    assert len({repr(parse_preference(json.dumps(row).encode(), "r")) for row in rows}) == 1


def test_rounds_system_and_video_in_every_form():
    turns = [("user", "<video>\nWho?"), ("assistant", "A cat."), ("user", "Sure?")]
    messages = [{"role": role, "content": text} for role, text in turns]
    good, bad = ({"role": "assistant", "content": text} for text in ("Yes.", "No."))
    rows = [
        {"messages": [*messages, good], "rejected_response": "No.", "video": "v.mp4", "system": "Be short."},
        {
            "messages": [{"role": "system", "content": "Be short."}, *messages, good],
            "rejected_response": "No.",
            "videos": ["v.mp4"],
        },
        {"prompt": messages, "chosen": "Yes.", "rejected": "No.", "video": "v.mp4", "system": "Be short."},
        {"prompt": messages, "chosen": [good], "rejected": [bad], "videos": ["v.mp4"], "system": "Be short."},
        {"chosen": [*messages, good], "rejected": [*messages, bad], "videos": ["v.mp4"], "system": "Be short."},
    ]
    records = [parse_preference(json.dumps(row).encode(), "r") for row in rows]
    assert len({repr(record) for record in records}) == 1
    record = records[0]
    assert [turn["from"] for turn in record.conversations] == ["system", "human", "gpt", "human", "gpt"]
    assert record.video == "r/v.mp4" and record.side(False)[-1]["value"] == "No." and record.side(False)[2]["value"] == "A cat."
    rows[-1]["rejected"] = [*messages[:-1], bad]
    with pytest.raises(DataError, match="differ before their last answers"):
        parse_preference(json.dumps(rows[-1]).encode())


def test_labels_of_a_pair_of_several_rounds_are_those_of_its_last_answer_and_of_the_shared_ones():
    """Both sides are encoded as fine-tuning encodes them, so what they share has the same ids and labels."""
    tokenizer = load_tokenizer(CHECKPOINT)
    row = {
        "messages": [
            {"role": r, "content": t} for r, t in (("user", "a?"), ("assistant", "b."), ("user", "c?"), ("assistant", "yes"))
        ]
    }
    (a, x), (b, y) = encode_preference({**row, "rejected_response": "no"}, tokenizer, EXPECTED["template"], [])
    same = next(i for i, (one, other) in enumerate(zip(a, b)) if one != other)
    assert same > 0.6 * len(a) and x[:same] == y[:same]


def write_pairs(folder, count=4):
    """A meta file of pairs about drawn pictures."""
    rows = [dict(EXPECTED["records"][0], chosen=f"It is {i}.", rejected="No.") for i in range(count)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    meta = {"pairs": {"root": str(REFERENCE / "images"), "annotation": str(folder / "pairs.jsonl")}}
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    return folder / "meta.json"


def start(folder, output, *flags):
    import os
    import subprocess
    import sys

    from paddlemix.examples.internvl2 import internvl_chat_mpo as command

    given = f"--model_name_or_path {CHECKPOINT} --conv_style Hermes-2 --force_image_size 112 --device cpu --do_train True "
    given += (
        f"--meta_path {folder / 'meta.json'} --output_dir {output} --freeze_backbone True --report_to none --logging_steps 1 "
    )
    given += (
        "--max_dynamic_patch 4 --dynamic_image_size True --use_thumbnail True --learning_rate 1e-4 --group_by_length False "
    )
    call = [sys.executable, command.__file__, *given.split(), *map(str, flags)]
    return subprocess.Popen(call, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=os.environ)


def run(folder, output, *flags, code=0):
    """Lines of the log, or what a run says that fails."""
    process = start(folder, output, *flags)
    _, told = process.communicate(timeout=300)
    assert process.returncode == code, told[-3000:]
    if code:
        return told
    lines = (output / "train_log.jsonl").read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if "loss" in entry]


@pytest.mark.slow
def test_command_and_resume(tmp_path):
    """A run of four steps equals two and two after a resume; the reference stays the start."""
    write_pairs(tmp_path)
    flags = ["--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 1, "--save_steps", 2]
    whole = run(tmp_path, tmp_path / "whole", *flags, "--max_steps", 4)
    assert {"rewards/margins", "logps/chosen", "logits/chosen", "nll_loss", "running_mean"} <= whole[0].keys()
    assert whole[0]["rewards/chosen"] == whole[0]["rewards/margins"] == 0  # the policy is the reference
    assert whole[-1]["rewards/margins"] > 0
    (tmp_path / "cut").mkdir()

    shutil.copytree(tmp_path / "whole/checkpoint-2", tmp_path / "cut/checkpoint-2")
    rest = run(tmp_path, tmp_path / "cut", *flags, "--max_steps", 4)
    for a, b in zip(whole[2:], rest, strict=True):
        for name in ("loss", "rewards/chosen", "rewards/margins", "logps/rejected", "nll_loss", "running_mean"):
            assert a[name] == pytest.approx(b[name], rel=1e-5, abs=1e-7), name


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    write_pairs(tmp_path)
    one = run(tmp_path, tmp_path / "one", "--per_device_train_batch_size", 4, "--max_steps", 2)
    two = run(tmp_path, tmp_path / "two", "--per_device_train_batch_size", 2, "--max_steps", 2, "--devices", 2)
    for a, b in zip(one, two, strict=True):
        for name in ("loss", "rewards/margins", "logps/chosen", "nll_loss", "running_mean"):
            assert a[name] == pytest.approx(b[name], rel=2e-5, abs=1e-6), name


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags", [["--use_packed_ds", "True", "--max_packed_tokens", 700], ["--use_llm_lora", 4, "--freeze_llm", "True"]]
)
def test_packed_and_lora(tmp_path, flags):
    """The first step is at the reference whatever learns; packing changes no number of a step of all pairs."""
    write_pairs(tmp_path)
    told = run(tmp_path, tmp_path / "out", "--per_device_train_batch_size", 1, "--max_steps", 3, *flags)
    assert told[0]["rewards/chosen"] == pytest.approx(0, abs=1e-5)
    assert told[0]["loss"] == pytest.approx(0.8 * np.log(2) + 0.2 * 2 * np.log(2) + told[0]["nll_loss"], rel=1e-4)
    assert told[-1]["rewards/margins"] > 0


NAMES = ("loss", "rewards/chosen", "rewards/margins", "logps/chosen", "nll_loss", "running_mean")


def assert_same(one, other, tolerance=1e-5):
    for a, b in zip(one, other, strict=True):
        for name in NAMES:
            assert a[name] == pytest.approx(b[name], rel=tolerance, abs=1e-6), name


@pytest.mark.slow
def test_precomputed_reference_equals_the_live_one(tmp_path):
    """Of one and of two processes, over two epochs; half of what was computed is taken over, and after a kill all of it."""
    write_pairs(tmp_path)
    flags = ["--per_device_train_batch_size", 2, "--max_steps", 4, "--save_steps", 2]
    live = run(tmp_path, tmp_path / "live", *flags)
    assert_same(run(tmp_path, tmp_path / "before", *flags, "--precompute_reference"), live)
    (stored,) = (tmp_path / "before").glob("reference-*.npy")
    known = np.load(stored)
    assert known.shape == (4, 2) and np.isfinite(known).all()
    np.testing.assert_allclose(known[:, 0].mean(), live[0]["logps/chosen"], atol=12)  # of two of the four
    marked = known.copy()
    marked[:2], marked[2:] = np.nan, known[2:] - 5  # the first half is computed again, the second taken as it is
    (tmp_path / "half").mkdir()
    np.save(tmp_path / "half" / stored.name, marked)
    run(tmp_path, tmp_path / "half", *flags, "--precompute_reference")
    again = np.load(tmp_path / "half" / stored.name)
    np.testing.assert_allclose(again[:2], known[:2], rtol=1e-5)
    np.testing.assert_array_equal(again[2:], marked[2:])
    two = ["--per_device_train_batch_size", 1, "--max_steps", 4, "--devices", 2]
    assert_same(run(tmp_path, tmp_path / "two", *two, "--precompute_reference"), live, 5e-5)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--precompute_reference"]])
def test_stage3_equals_one_process(tmp_path, flags):
    """Weights divided over two processes, the reference's copies with them; held-out pairs, of which one process has more."""
    meta = write_pairs(tmp_path)
    (tmp_path / "held").mkdir()
    held = write_pairs(tmp_path / "held", 3)
    flags = [*flags, "--max_steps", 3, "--eval_meta_path", held, "--per_device_eval_batch_size", 1, "--meta_path", meta]
    flags += ["--evaluation_strategy", "steps", "--eval_steps", 2]
    one = run(tmp_path, tmp_path / "one", "--per_device_train_batch_size", 2, *flags)
    divided = ["--per_device_train_batch_size", 1, "--devices", 2, "--sharding", "stage3"]
    assert_same(run(tmp_path, tmp_path / "two", *divided, *flags), one, 5e-5)
    evaluated = [read_log(tmp_path / name / "train_log.jsonl") for name in ("one", "two")]
    (first, *_), (other, *_) = ([row for row in rows if "eval_loss" in row] for rows in evaluated)
    for name in ("eval_loss", "eval_rewards/margins", "eval_logps/chosen", "eval_nll_loss"):
        assert other[name] == pytest.approx(first[name], rel=5e-5, abs=1e-6), name


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags", [[], ["--precompute_reference"], ["--use_llm_lora", 4, "--freeze_llm", "True", "--lora_dropout", 0]]
)
def test_layers_divided_over_two_processes_equal_one(tmp_path, flags):
    """Those of policy and reference, which a resumed run reads again as the start."""
    write_pairs(tmp_path)
    flags = ["--per_device_train_batch_size", 2, "--max_steps", 4, "--save_steps", 2, *flags]
    one = run(tmp_path, tmp_path / "one", *flags)
    two = run(tmp_path, tmp_path / "two", "--devices", 2, "--tensor_parallel_degree", 2, *flags)
    assert_same(two, one, 5e-5)
    shutil.rmtree(tmp_path / "two" / "checkpoint-4")
    again = run(tmp_path, tmp_path / "two", "--devices", 2, "--tensor_parallel_degree", 2, *flags)
    assert_same(again[-2:], one[2:], 5e-5)


@pytest.mark.slow
def test_killed_and_resumed(tmp_path):
    """After kill -9 the same command goes on, with the losses and the running mean of a run that was left alone."""
    import signal
    import time

    write_pairs(tmp_path)
    flags = ["--per_device_train_batch_size", 1, "--max_steps", 8, "--save_steps", 2]
    whole = run(tmp_path, tmp_path / "whole", *flags)
    process = start(tmp_path, tmp_path / "killed", *flags)
    log = tmp_path / "killed/train_log.jsonl"
    while process.poll() is None:
        time.sleep(0.05)
        if (tmp_path / "killed/checkpoint-4").exists() and log.read_text().count("\n") >= 5:
            process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "killed/config.json").exists()  # it was not done
    assert_same(run(tmp_path, tmp_path / "killed", *flags), whole)


def test_command_refuses_in_one_sentence(tmp_path):
    write_pairs(tmp_path)
    told = run(tmp_path, tmp_path / "out", "--loss_type", "dpo", code=1)
    said = [line for line in told.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and said[0].startswith("error: --loss_type is 'dpo'") and "Traceback" not in told
