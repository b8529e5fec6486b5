"""Drawn scenes as LLaVA's training has its data: texts alone, captions of pictures, and conversations about pictures.

  python -m paddlemix.examples.internvl_llava.demo.scenes OUTPUT_DIR

writes ``texts.json``, ``captions.json``, ``talk.json`` and ``heldout.json`` with the pictures of the last three in folders of
their names. Pictures are those of the demo model: one or two coloured shapes, each in a cell of a grid of three by three. The
same seed draws the same pixels, and the four parts have no seed in common.
"""

import argparse
import json
import random
from pathlib import Path

from paddlemix.errors import command_main
from paddlemix.examples.internvl2.demo_model import scenes
from paddlemix.models.blocks.conversation import IMAGE_PLACEHOLDER

SIDE = scenes.SIDE
PARTS = ("texts", "captions", "talk", "heldout")


def draw(rng):
    """One item, or in a quarter of the scenes two, not of one name."""
    kinds = rng.sample(scenes.SEEN, rng.choice((1, 1, 1, 2)))
    return scenes.arrange(kinds, rng)


def _at(item):
    return f"{'in' if item.place == 'middle' else 'at'} the {item.place}"


def describe(items):
    """What a picture shows, from the top left to the bottom right."""
    return " and ".join(f"a {item.name} {_at(item)}" for item in items)


def ask(items, rng):
    """(question, answer) pairs in random order: what colour, what shape, where, how many."""

    def alone(attribute):
        values = [getattr(item, attribute) for item in items]
        return [item for item, value in zip(items, values) if values.count(value) == 1]

    pairs = [(f"What color is the {item.shape}?", item.color) for item in alone("shape")]
    pairs += [(f"What shape is {item.color}?", item.shape) for item in alone("color")]
    pairs += [(f"Where is the {item.name}?", item.place) for item in items]
    pairs.append(("How many shapes are there?", str(len(items))))
    return rng.sample(pairs, len(pairs))


def _turns(first, pairs):
    turns = []
    for question, answer in pairs:
        turns += [{"from": "human", "value": first + question}, {"from": "gpt", "value": answer}]
        first = ""
    return turns


def record(part, number, seed=0):
    """(record, picture or None) of one scene of a part."""
    rng = random.Random(f"llava {part} {seed} {number}")
    items = draw(rng)
    if part == "texts":  # the scene in words: what is learned about colours, shapes and places needs no picture
        pairs = [("Describe it.", describe(items)), *ask(items, rng)]
        text = ", ".join(f"{item.place}: {item.name}" for item in items)
        return {"id": number, "conversations": _turns(f"{text}\n", rng.sample(pairs, len(pairs)))}, None
    if part == "captions":
        turns = _turns(IMAGE_PLACEHOLDER, [("", describe(items))])
    else:
        turns = _turns(f"{IMAGE_PLACEHOLDER}\n", ask(items, rng)[: 1 if part == "heldout" else None])
    return {"id": number, "image": f"{number:05d}.png", "conversations": turns}, scenes.draw_items(items, rng)


def write_part(directory, part, count, seed=0):
    """Write a part of so many scenes; returns (path of the records, folder of the pictures)."""
    directory = Path(directory)
    folder = directory / part
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for number in range(count):
        found, picture = record(part, number, seed)
        if picture is not None:
            picture.save(folder / found["image"], compress_level=1)
        records.append(found)
    path = directory / f"{part}.json"
    path.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    return path, folder


@command_main
def main():
    """Parse the command line and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir")
    parser.add_argument("--count", type=int, default=100, help="scenes of each part (default: %(default)s)")
    args = parser.parse_args()
    for part in PARTS:
        print(*write_part(args.output_dir, part, args.count))


if __name__ == "__main__":
    main()
