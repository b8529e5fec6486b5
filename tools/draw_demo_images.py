"""Draw the scenes and the clip of paddlemix/demo_images again.

  python tools/draw_demo_images.py [OUTPUT_DIR]

The scenes are of the kind that the bundled demo model was trained on: coloured shapes on a plain ground, a short text, a bar
chart, a shape that moves. Photographs and ``bunny.mp4`` are not drawn: see ATTRIBUTION.md.
"""

import argparse
import math
from pathlib import Path

import av
from PIL import Image, ImageDraw, ImageFont

DEMO_IMAGES = Path(__file__).resolve().parents[1] / "paddlemix" / "demo_images"
SIDE = 224
COLORS = {"red": (255, 0, 0), "blue": (0, 0, 255), "yellow": (255, 255, 0), "black": (0, 0, 0), "white": (255, 255, 255)}


def canvas(side=SIDE):
    image = Image.new("RGB", (side, side), COLORS["white"])
    return image, ImageDraw.Draw(image)


def draw_shape(draw, color, kind, x, y, radius):
    if kind == "square":
        draw.rectangle((x - radius, y - radius, x + radius, y + radius), fill=COLORS[color])
    elif kind == "circle":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=COLORS[color])
    else:
        reach = [radius if corner % 2 == 0 else 0.45 * radius for corner in range(10)]
        turns = [math.pi * corner / 5 for corner in range(10)]
        draw.polygon([(x + r * math.sin(t), y - r * math.cos(t)) for r, t in zip(reach, turns)], fill=COLORS[color])


def shapes(*items, radius=30):
    """Each item: (color, kind, x, y), in pixels."""
    image, draw = canvas()
    for item in items:
        draw_shape(draw, *item, radius)
    return image


def text(words, size=56):
    image, draw = canvas()
    draw.text((SIDE / 2, SIDE / 2), words, fill=COLORS["black"], font=ImageFont.load_default(size), anchor="mm")
    return image


def bar_chart(side=336, **heights):
    """Bars of the given colors; heights in tenths of the chart."""
    image, draw = canvas(side)
    bottom, step = side - 30, (side - 60) / len(heights)
    for number, (color, height) in enumerate(heights.items()):
        left = 40 + number * step
        draw.rectangle((left, bottom - height / 10 * (side - 70), left + 0.7 * step, bottom), fill=COLORS[color])
    draw.line((30, bottom, side - 10, bottom), fill=COLORS["black"], width=2)
    draw.line((30, 10, 30, bottom), fill=COLORS["black"], width=2)
    return image


def falling(num_frames=16, radius=28):
    """A blue square on its way down."""
    for number in range(num_frames):
        y = SIDE / 2 + (number / (num_frames - 1) - 0.5) * 0.6 * SIDE
        yield shapes(("blue", "square", SIDE / 2, y), radius=radius)


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
    scenes = [
        shapes(("blue", "star", 112, 112)),
        shapes(("red", "star", 56, 56), ("blue", "square", 168, 56), ("yellow", "circle", 112, 168)),
        shapes(("red", "star", 168, 56), ("red", "star", 168, 168), radius=26),
        text("OPEN"),
        bar_chart(red=9, blue=4),
    ]
    for number, scene in enumerate(scenes, start=1):
        scene.save(output / f"scene_{number}.png", optimize=True)
    write_clip(output / "clip.mp4", falling())


if __name__ == "__main__":
    main()
