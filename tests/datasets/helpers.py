"""Small data sets on disk, and the encoders of the reference checkpoints."""

import functools
import json

from paddlemix.datasets.internvl2 import DataOptions, InternVLDataset, SampleEncoder, read_meta
from paddlemix.models.internvl2 import InternVLChatConfig, load_tokenizer
from tests.conftest import REFERENCE

IMAGES = REFERENCE / "images"


@functools.cache
def checkpoint(family):
    """(tokenizer, config) of a reference checkpoint, without its model."""
    path = str(REFERENCE / family / "checkpoint")
    return load_tokenizer(path), InternVLChatConfig.from_pretrained(path)


def make_encoder(family="qwen2", template=None, **options):
    """Encoder as of a reference checkpoint: tiles of 112 pixels and 16 tokens, at most 6 of them."""
    tokenizer, config = checkpoint(family)
    options = DataOptions.from_config(config, **{"max_seq_length": 4096, "max_dynamic_patch": 6, **options})
    return SampleEncoder(tokenizer, template or config.template, options)


def talk(question="What is it?", answer="A picture."):
    """A conversation of one round."""
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def picture_record(number=1, question="<image>\nWhat is it?", **more):
    """A record about a reference picture."""
    return {"image": f"img{number}.png", "conversations": talk(question), **more}


def write_meta(folder, records, name="set", **entry):
    """Write a meta file of one data set; records are dictionaries or, to be broken, strings. Returns its path."""
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    annotation = folder / f"{name}.jsonl"
    annotation.write_text("\n".join(lines) + "\n", encoding="utf-8")
    meta = folder / f"{name}.json"
    meta.write_text(json.dumps({name: {"root": str(IMAGES), "annotation": str(annotation), **entry}}), encoding="utf-8")
    return meta


def make_dataset(folder, records, encoder=None, seed=0, **entry):
    """Data set of such records."""
    return InternVLDataset(read_meta(write_meta(folder, records, **entry)), encoder or make_encoder(), seed)


def labelled_text(sample, encoder):
    """What a sample teaches."""
    return encoder.tokenizer.decode([int(label) for label in sample["labels"] if label >= 0])
