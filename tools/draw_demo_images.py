"""Draw the scenes and the clip of paddlemix/demo_images again.

  python tools/draw_demo_images.py [OUTPUT_DIR]

They are of the kind that the bundled demo model was trained on (paddlemix/examples/internvl2/demo_model), only larger.
Photographs and ``bunny.mp4`` are not drawn: see ATTRIBUTION.md.
"""

import argparse
import random
from pathlib import Path

import av

from paddlemix.examples.internvl2.demo_model import scenes

DEMO_IMAGES = Path(__file__).resolve().parents[1] / "paddlemix" / "demo_images"
SIDE = 2 * scenes.SIDE


def shapes(*kinds):
    """Each of ``kinds``: (color, shape, place)."""
    items = []
    for color, shape, place in kinds:
        items.append(scenes.Item(color, shape, *scenes.centre(scenes.PLACES.index(place)), radius=11))
    return scenes.draw_items(items, random.Random(0), SIDE)


def falling(num_frames=16):
    """A blue square on its way down."""
    for number in range(num_frames):
        y = scenes.SIDE / 2 + (number / (num_frames - 1) - 0.5) * 40
        yield scenes.draw_items([scenes.Item("blue", "square", scenes.SIDE / 2, y, radius=11)], random.Random(0), SIDE)


def write_clip(path, frames, rate=8):
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx264", rate=rate, options={"crf": "23"})
        stream.pix_fmt = "yuv420p"
        for image in frames:
            stream.width, stream.height = image.size
            output.mux(stream.encode(av.VideoFrame.from_image(image)))
        output.mux(stream.encode(None))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, nargs="?", default=DEMO_IMAGES)
    output = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    pictures = [
        shapes(("blue", "star", "middle")),
        shapes(("red", "star", "top left"), ("blue", "square", "top right"), ("yellow", "circle", "bottom")),
        shapes(("red", "star", "top right"), ("red", "star", "bottom right")),
        scenes.draw_text("OPEN", random.Random(0), SIDE),
        scenes.draw_chart({"red": 9, "blue": 5}, random.Random(0), SIDE),
    ]
    for number, picture in enumerate(pictures, start=1):
        picture.save(output / f"scene_{number}.png", optimize=True)
    write_clip(output / "clip.mp4", falling())


if __name__ == "__main__":
    main()
