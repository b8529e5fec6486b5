"""Write the demo model's data: pictures, records and meta files as the trainer reads them.

  python -m paddlemix.examples.internvl2.demo_model.data OUTPUT_DIR

makes ``first.json`` (one shape a picture, or a text), ``finding.json`` (mostly one shape among others), ``train.json``
(everything), ``places.json`` and ``where.json`` (half of them about where shapes are), ``crossed.json`` (colours and shapes of
different things), ``heldout.json`` (other seeds) and ``unseen.json`` (colours and shapes that never met in training). The same
seed makes the same files.
"""

import argparse
import functools
import json
import random
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from tqdm import tqdm

from paddlemix.errors import command_main

from . import questions, scenes

# Kinds of scenes with their share of a part, in 64ths; the rest of the pictures show shapes.
_OTHERS = {
    questions.reading: 10,
    questions.chart: 4,
    questions.comparison: 6,
    questions.video: 7,
    questions.unnamed: 7,
    questions.other: 5,
    questions.unknown: 2,
}


def draw_mixture(rng, most=4):
    """A scene of any kind."""
    kinds = list(_OTHERS) + [functools.partial(questions.shapes, most=most)]
    weights = list(_OTHERS.values()) + [64 - sum(_OTHERS.values())]
    return rng.choices(kinds, weights)[0](rng)


def draw_one_shape(rng):
    """A scene of a single shape, or a word or number, to begin with."""
    return questions.reading(rng) if rng.random() < 0.3 else questions.shapes(rng, most=1)


def draw_finding(rng):
    """Mostly scenes that ask to find one shape among others, which is the slowest thing to learn."""
    return draw_mixture(rng) if rng.random() < 0.2 else questions.finding(rng)


def draw_places(rng):
    """Half of it scenes of all kinds, half about where shapes are, in words and as boxes."""
    return (draw_mixture if rng.random() < 0.5 else questions.places)(rng)


def draw_where(rng):
    """Half of it about where shapes are that stand in a row."""
    kinds = questions.where, questions.places, questions.other, draw_mixture
    return rng.choices(kinds, (48, 10, 12, 30))[0](rng)


def draw_crossed(rng):
    """Mostly scenes that name the color of one thing and the shape of another, or that are several pictures."""
    kinds = questions.crossed, questions.other, questions.comparison, questions.video, questions.where, questions.places
    return rng.choices((*kinds, draw_mixture), (14, 14, 8, 14, 6, 6, 38))[0](rng)


def draw_unseen(rng):
    """A scene of shapes in colours in which training never showed them."""
    kind = rng.choices((questions.shapes, questions.comparison, questions.video), (48, 7, 8))[0]
    return kind(rng, kinds=scenes.UNSEEN)


# What draws a part, and how many scenes it has.
PARTS = {
    "first": (draw_one_shape, 6_000),
    "finding": (draw_finding, 40_000),
    "train": (draw_mixture, 80_000),
    "places": (draw_places, 40_000),
    "where": (draw_where, 20_000),
    "crossed": (draw_crossed, 40_000),
    "heldout": (draw_mixture, 1_000),
    "unseen": (draw_unseen, 500),
}


def write_part(directory, name, scale=1.0, seed=0, processes=None):
    """Draw one of ``PARTS``, ``scale`` times its size, into ``directory``: ``name.json`` names what belongs to it.

    Records also have the task of each turn, and the prefix that marks the pictures, with which each can be asked alone.
    """
    count = max(1, round(PARTS[name][1] * scale))
    folder = Path(directory).resolve() / name
    folder.mkdir(parents=True, exist_ok=True)
    write = functools.partial(_write_scene, folder, name, seed)
    with ProcessPoolExecutor(processes) as pool:
        records = list(tqdm(pool.map(write, range(count), chunksize=50), total=count, desc=name, unit="scene"))
    annotation = folder.with_suffix(".jsonl")
    annotation.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    entry = {"root": str(folder), "annotation": str(annotation), "data_augment": False, "repeat_time": 1, "length": count}
    folder.with_suffix(".json").write_text(json.dumps({name: entry}, indent=2) + "\n", encoding="utf-8")
    return folder.with_suffix(".json")


def _write_scene(folder, name, seed, number):
    """Draw a scene and return its record."""
    rng = random.Random(f"{name} {seed} {number}")
    pictures, prefix, turns = PARTS[name][0](rng)
    # A thousand files a folder.
    places = [f"{number // 1000:03d}/{number % 1000:03d}_{i}.png" for i in range(len(pictures))]
    for picture, place in zip(pictures, places):
        (folder / place).parent.mkdir(exist_ok=True)
        picture.save(folder / place, compress_level=1)
    conversations = []
    for turn in turns:
        conversations.append({"from": "human", "value": turn.question})
        conversations.append({"from": "gpt", "value": turn.answer})
    conversations[0]["value"] = prefix + conversations[0]["value"]
    size = [scenes.SIDE] * len(places)
    return {
        "id": number,
        "image": places,
        "width_list": size,
        "height_list": size,
        "conversations": conversations,
        "prefix": prefix,
        "tasks": [turn.task for turn in turns],
    }


@command_main
def main():
    """Parse the command line and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", help="where to write; is made if it does not exist")
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated; default: %(default)s")
    parser.add_argument("--scale", type=float, default=1.0, help="times the usual number of pictures (default: 1)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    parts = args.parts.split(",")
    if unknown := [name for name in parts if name not in PARTS]:
        parser.error(f"--parts '{unknown[0]}' is not known: use {', '.join(PARTS)}")
    for name in parts:
        write_part(args.directory, name, args.scale, args.seed)


if __name__ == "__main__":
    main()
