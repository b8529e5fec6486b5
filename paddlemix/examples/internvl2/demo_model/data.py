"""Write the demo model's data: pictures, records and meta files as the trainer reads them.

  python -m paddlemix.examples.internvl2.demo_model.data OUTPUT_DIR

makes ``first.json`` (one shape a picture, or a text), ``mixed.json`` (a bit of everything), ``finding.json`` (mostly one shape
among others), ``where.json`` (mostly shapes in a row), ``all.json`` (everything, more of what is hard), ``heldout.json`` (other
seeds) and ``unseen.json`` (colours and shapes that never met in training). The same seed makes the same files.
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

# Kinds of scenes with their share of a part, in 64ths.
_MIXTURE = {
    questions.shapes: 22,
    questions.reading: 10,
    questions.chart: 4,
    questions.comparison: 6,
    questions.video: 7,
    questions.unnamed: 7,
    questions.other: 5,
    questions.unknown: 3,
}
# What is learned last has more of what is learned late: where shapes are, to tenths, and colours and shapes apart from another.
_ALL = {
    questions.places: 9,
    questions.where: 7,
    questions.finding: 3,
    questions.crossed: 6,
    questions.other: 5,
    questions.video: 5,
    questions.comparison: 2,
    questions.reading: 4,
    None: 23,  # the mixture
}


def draw_one_shape(rng):
    """A scene of a single shape, or a word or number, to begin with."""
    return questions.reading(rng) if rng.random() < 0.3 else questions.shapes(rng, most=1)


def draw_mixture(rng):
    """A scene of any kind but those that only teach."""
    return rng.choices(list(_MIXTURE), list(_MIXTURE.values()))[0](rng)


def draw_finding(rng):
    """Mostly scenes that ask to find one shape among others, which is the slowest thing to learn."""
    return draw_mixture(rng) if rng.random() < 0.2 else questions.finding(rng)


def draw_all(rng):
    """A scene of any kind."""
    return (rng.choices(list(_ALL), list(_ALL.values()))[0] or draw_mixture)(rng)


def draw_where(rng):
    """Mostly scenes of shapes in a row, where only its name leads to a shape, and not its row."""
    return (draw_all if rng.random() < 0.3 else questions.where)(rng)


def draw_unseen(rng):
    """A scene of shapes in colors in which training never showed them; half of the time beside seen ones that are like them."""
    kinds = scenes.UNSEEN
    if rng.random() < 0.5:  # of the same color or shape
        color, shape = rng.choice(kinds)
        kinds = ((color, shape),) * 5 + tuple(rng.sample([k for k in scenes.SEEN if k[0] == color or k[1] == shape], 3))
    return rng.choices((questions.shapes, questions.comparison, questions.video), (48, 7, 8))[0](rng, kinds=kinds)


# What draws a part, and how many scenes it has.
PARTS = {
    "first": (draw_one_shape, 6_000),
    "mixed": (draw_mixture, 80_000),
    "finding": (draw_finding, 40_000),
    "where": (draw_where, 40_000),
    "all": (draw_all, 100_000),
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
