"""Draw scenes about which a habit says the wrong color, and pairs of the right and the wrong answer.

  python -m paddlemix.examples.internvl2.demo_mpo.scenes OUTPUT_DIR

writes ``habit.json`` (records whose answers about colors are wrong, and about other things right, for fine-tuning),
``pairs.json`` (the right answer chosen, the habit's rejected), and with other seeds ``heldout_pairs.json`` and ``heldout.json``
(right answers to all). Pictures are those of the demo model's own data; the same seed draws the same pixels.
"""

import argparse
import json
import random
from pathlib import Path

from paddlemix.errors import command_main
from paddlemix.examples.internvl2.demo_model import questions, scenes

# What the habit says: the next color.
WRONG = dict(zip(scenes.COLORS, [*list(scenes.COLORS)[1:], next(iter(scenes.COLORS))]))
COUNTS = {"habit": 640, "pairs": 640, "heldout": 240}


def draw(rng):
    """(picture, prefix, turns) of a scene with a question for a color, which comes first, and others."""
    while True:
        (picture,), prefix, turns = questions.finding(rng)
        color = next((turn for turn in turns if turn.task == "color"), None)
        if color is not None:
            return picture, prefix, [color, *(turn for turn in turns if turn.task not in ("color", "Chinese"))]


def write_data(directory, scale=1.0, seed=0):
    """Draw all parts into ``directory``, ``scale`` times their usual size; returns the paths of the meta files by part."""
    directory, metas = Path(directory).resolve(), {}
    for part, count in COUNTS.items():
        folder, rows, pairs = directory / part, [], []
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(max(1, round(count * scale))):
            rng = random.Random(f"mpo {part} {seed} {number}")
            picture, prefix, (color, *others) = draw(rng)
            picture.save(folder / f"{number:04d}.png", compress_level=1)
            turns = rng.sample([color, *others[:1]], 1 + bool(others))
            said = WRONG[color.answer] if part == "habit" else color.answer
            talk = []
            for turn in turns:
                talk.append({"from": "human", "value": turn.question if talk else prefix + turn.question})
                talk.append({"from": "gpt", "value": turn.answer if turn is not color else said})
            row = {"id": number, "image": [f"{number:04d}.png"], "conversations": talk}
            rows.append({**row, "prefix": prefix, "tasks": ["color" if turn is color else "other" for turn in turns]})
            pair = {"question": prefix + color.question, "chosen": color.answer, "rejected": WRONG[color.answer]}
            pairs.append({"id": number, "image": f"{number:04d}.png", **pair})
        written = {"habit": {"habit": rows}, "pairs": {"pairs": pairs}}
        for name, lines in written.get(part, {"heldout": rows, "heldout_pairs": pairs}).items():
            annotation = directory / f"{name}.jsonl"
            annotation.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
            entry = {"root": str(folder), "annotation": str(annotation), "length": len(lines)}
            metas[name] = directory / f"{name}.json"
            metas[name].write_text(json.dumps({name: entry}, indent=2) + "\n", encoding="utf-8")
    return metas


@command_main
def main():
    """Parse the command line and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", help="where to write; is made if it does not exist")
    parser.add_argument("--scale", type=float, default=1.0, help="times the usual number of pictures (default: 1)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write_data(args.directory, args.scale, args.seed)


if __name__ == "__main__":
    main()
