"""Draw a small training set: road signs, each alone on a plain ground, and the question what it means.

  python -m paddlemix.examples.internvl2.demo_finetune.signs OUTPUT_DIR

writes ``train.json`` and ``heldout.json`` (meta files as the trainer reads them), their ``.jsonl`` records and the pictures.
The same seed draws the same pixels; held-out pictures come from another seed. The demo model has seen coloured shapes but
never a sign, so it gets practically none of them right before it is trained.
"""

import argparse
import cmath
import json
import math
import random
from pathlib import Path

from PIL import Image, ImageDraw

QUESTION = "What does this sign mean?"
SIDE = 84  # one tile
_SCALE = 4  # drawn larger and then reduced, for smooth edges

RED, BLUE, YELLOW, GREEN, WHITE, BLACK = (
    (200, 30, 40),
    (30, 80, 180),
    (240, 190, 30),
    (20, 130, 70),
    (250, 250, 250),
    (25, 25, 25),
)


def _polygon(corners, turn, size=1.0):
    """A regular polygon in the square from -1 to 1; ``turn`` is a fraction of a full turn."""
    angles = [2 * math.pi * (i / corners + turn) for i in range(corners)]
    return [(size * math.cos(a), size * math.sin(a)) for a in angles]


def _box(width, height):
    return [(-width, -height), (width, -height), (width, height), (-width, height)]


_ARROW = [(-0.8, -0.15), (0.1, -0.15), (0.1, -0.45), (0.8, 0), (0.1, 0.45), (0.1, 0.15), (-0.8, 0.15)]
_P = [(-0.4, -0.6), (0.4, -0.6), (0.4, 0.15), (-0.1, 0.15), (-0.1, 0.6), (-0.4, 0.6)]
_DOWN = 1 / 4

# What a sign means, and the polygons it is made of, from back to front.
SIGNS = {
    "stop": [(RED, _polygon(8, 1 / 16)), (WHITE, _box(0.6, 0.14))],
    "give way": [(RED, _polygon(3, _DOWN)), (WHITE, _polygon(3, _DOWN, 0.55))],
    "no traffic": [(RED, _polygon(48, 0)), (WHITE, _polygon(48, 0, 0.7))],
    "main road": [(WHITE, _polygon(4, 0)), (YELLOW, _polygon(4, 0, 0.85))],
    "parking": [(BLUE, _box(0.85, 0.85)), (WHITE, _P)],
    "one way": [(BLACK, _box(1, 0.6)), (WHITE, _ARROW)],
    "go": [(GREEN, _polygon(48, 0)), (WHITE, _polygon(48, 0, 0.35))],
    "hospital": [(WHITE, _box(0.85, 0.85)), (RED, _box(0.6, 0.2)), (RED, _box(0.2, 0.6))],
}


def draw(meaning, rng):
    """A picture of a sign, of random size, place, slant, brightness and ground: PIL image of ``SIDE`` pixels."""
    ground = tuple(rng.randint(100, 180) for _ in range(3))
    canvas = Image.new("RGB", (SIDE * _SCALE,) * 2, ground)
    pencil = ImageDraw.Draw(canvas)
    radius = rng.uniform(0.34, 0.46)
    x, y = (rng.uniform(radius, 1 - radius) for _ in range(2))
    slant, light = rng.uniform(-0.12, 0.12), rng.uniform(0.85, 1.0)
    for colour, outline in SIGNS[meaning]:
        turned = [complex(*point) * cmath.rect(radius, slant) + complex(x, y) for point in outline]
        points = [(place.real * canvas.width, place.imag * canvas.height) for place in turned]
        pencil.polygon(points, fill=tuple(round(light * c) for c in colour))
    return canvas.resize((SIDE, SIDE), Image.Resampling.BOX)


def write_set(directory, name, count, seed):
    """Draw ``count`` pictures, as many of each sign, and write ``name.jsonl`` and its meta file ``name.json``."""
    rng = random.Random(seed)
    meanings = [list(SIGNS)[i % len(SIGNS)] for i in range(count)]
    rng.shuffle(meanings)
    (directory / name).mkdir(parents=True, exist_ok=True)
    with open(directory / f"{name}.jsonl", "w", encoding="utf-8") as file:
        for i, meaning in enumerate(meanings):
            picture = f"{i:04d}.png"
            draw(meaning, rng).save(directory / name / picture)
            conversations = [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": meaning}]
            record = {"id": i, "image": picture, "width": SIDE, "height": SIDE, "conversations": conversations}
            file.write(json.dumps(record) + "\n")
    entry = {
        "root": str(directory / name),
        "annotation": str(directory / f"{name}.jsonl"),
        "data_augment": False,
        "repeat_time": 1,
        "length": count,
    }
    (directory / f"{name}.json").write_text(json.dumps({"signs": entry}, indent=2) + "\n", encoding="utf-8")


def write_data(directory, train=600, heldout=200, seed=0):
    """Draw both parts into ``directory``."""
    directory = Path(directory).resolve()
    write_set(directory, "train", train, seed)
    write_set(directory, "heldout", heldout, f"heldout {seed}")


def main():
    """Parse the command line and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", help="where to write; is made if it does not exist")
    parser.add_argument("--train", type=int, default=600, help="pictures to learn from (default: 600)")
    parser.add_argument("--heldout", type=int, default=200, help="pictures to measure with (default: 200)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write_data(args.directory, args.train, args.heldout, args.seed)


if __name__ == "__main__":
    main()
