"""Small runs of the trainer on the reference checkpoints."""

import numpy as np

from paddlemix.datasets.internvl2 import Collator
from paddlemix.models.internvl2 import InternVLChatModel
from paddlemix.training.arguments import ModelArguments, PreTrainingArguments, parse
from paddlemix.training.building import prepare
from paddlemix.training.processes import Processes
from paddlemix.training.trainer import Trainer, finetune
from tests.conftest import REFERENCE, load_reference, tiles
from tests.datasets.helpers import picture_record, talk, write_meta

LEARNING_RATE = 2e-3

# Samples of all kinds and lengths; the pictures are tiled.
RECORDS = [
    picture_record(0, answer="A red box, I think."),
    picture_record(1),
    {"conversations": talk("Hello.", "Hello, how are you?")},
    {"image": ["img0.png", "img2.png"], "conversations": talk("<image>\n<image>\nWhich one?", "The first.")},
    picture_record(2, question="<image>\nIs it grey?"),
    picture_record(3, question="<image>\nIs this a longer question than the others are, all in all?"),
    {"conversations": talk("What is 2 + 2?", "4")},
    picture_record(1, question="<image>\nAnd this?"),
]
for record, answer in zip(
    RECORDS, ("A red box, I think.", "Yes.", None, None, "Grey it is.", "It is, and so am I.", None, "No.")
):
    if answer is not None:
        record["conversations"][1]["value"] = answer


def flags(folder, *more, family="qwen2", records=RECORDS, output="out"):
    """Flags of a run of a few seconds; ``more`` replace them."""
    return [
        *("--model_name_or_path", str(REFERENCE / family / "checkpoint"), "--do_train", "--device", "cpu"),
        *("--conv_style", load_reference(family).model.config.template, "--force_image_size", "112"),
        *("--meta_path", str(write_meta(folder, records)), "--output_dir", str(folder / output), "--max_seq_length", "1024"),
        *("--dynamic_image_size", "True", "--use_thumbnail", "True", "--max_dynamic_patch", "3", "--freeze_backbone", "True"),
        *(
            "--learning_rate",
            str(LEARNING_RATE),
            "--per_device_train_batch_size",
            "2",
            "--max_steps",
            "6",
            "--save_strategy",
            "no",
        ),
        *("--logging_steps", "1", "--report_to", "none", "--disable_tqdm", "True", "--seed", "3", *more),
    ]


def run(folder, *more, **options):
    """Train with :func:`flags`."""
    finetune(*parse(flags(folder, *more, **options)))


def fresh(family, recompute=False, **model_args):
    """(model, ``{name: parameter}`` that learn) of a reference checkpoint, which may be changed."""
    model = InternVLChatModel.from_pretrained(str(REFERENCE / family / "checkpoint"), dtype="float32", engine="eager")
    model.set_tokenizer(load_reference(family).tokenizer)
    return model, prepare(model, ModelArguments("x", **model_args), recompute)


def trainer(model, parameters, total=100, decays=None, **train_args):
    """A :class:`Trainer` with a constant learning rate."""
    values = dict(output_dir="x", lr_scheduler_type="constant", learning_rate=1e-3, max_grad_norm=0.0)
    return Trainer(model, parameters, PreTrainingArguments(**{**values, **train_args}), Processes(), total, decays)


def train_sample(family, number):
    """A training sample of the reference, as :class:`InternVLDataset` gives it."""
    reference = load_reference(family)
    sample = reference.expected["train_samples"][number]
    ids = np.array(sample["input_ids"])
    has_picture = (ids == reference.model.img_context_token_id).any()
    pixels = tiles(1) if has_picture else tiles(1)[:0]
    assert len(pixels) == (sample["num_tiles"] if has_picture else 0)
    return {
        "input_ids": ids,
        "labels": np.array(sample["labels"]),
        "pixel_values": pixels,
        "image_flags": np.ones(len(pixels), "int64"),
        "min_length": 1,
        "name": f"{family}:{number}",
        "bad": [],
    }


def batch(*samples, packed=False, **options):
    """A batch of samples, a row each or all in one."""
    collator = Collator(**options)
    return collator.collate_rows([list(samples)]) if packed else collator(samples)


def gradients(model, parameters, *batches):
    """(loss, ``{name: gradient}``) of the mean over all labels of ``batches``."""
    counts = [int((b["labels"][:, 1:] >= 0).sum()) for b in batches]
    total = 0.0
    for b, count in zip(batches, counts):
        inputs = {key: value for key, value in b.items() if key not in ("names", "bad")}
        loss = model(**inputs).loss * (count / sum(counts))
        loss.backward()
        total += float(loss)
    found = {name: p.grad.numpy() for name, p in parameters.items() if p.grad is not None}
    for p in parameters.values():
        p.clear_gradient(False)
    return total, found


def assert_same(first, second, tolerance=1e-5):
    """Same losses and gradients, relative to the largest gradient of each parameter's kind."""
    assert abs(first[0] - second[0]) < tolerance * abs(second[0])
    assert first[1].keys() == second[1].keys()
    largest = max(np.abs(g).max() for g in second[1].values())
    for name, gradient in first[1].items():
        assert np.abs(gradient - second[1][name]).max() < tolerance * largest, name
