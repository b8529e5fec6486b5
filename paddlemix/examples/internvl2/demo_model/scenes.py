"""Draw small scenes that a small model can learn to speak about: shapes, words, bar charts, and shapes that move.

Every picture is one tile of 84 pixels: with patches of 14 pixels that are merged by four, a token for each cell of a grid of
three by three. The same random generator draws the same pixels.

Functions that draw take ``side``, pixels of the picture: more than ``SIDE`` is for people.
"""

import math
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

SIDE = 84
_SCALE = 3  # drawn larger and then reduced, for smooth edges

COLORS = {
    "red": (220, 30, 35),
    "green": (30, 150, 60),
    "blue": (35, 80, 210),
    "yellow": (245, 200, 20),
    "purple": (140, 50, 170),
    "black": (25, 25, 25),
}
SHAPES = ("circle", "square", "triangle", "star")

# In training, no picture shows such a shape and no text names it: what is learned of colours and of shapes must meet here.
UNSEEN = (("yellow", "star"), ("black", "circle"), ("green", "triangle"), ("purple", "square"))
SEEN = tuple((color, shape) for color in COLORS for shape in SHAPES if (color, shape) not in UNSEEN)

# Rows and columns of a grid of three by three.
PLACES = ("top left", "top", "top right", "left", "middle", "right", "bottom left", "bottom", "bottom right")

WORDS = tuple(
    "OPEN STOP EXIT CAFE BANK TAXI FIRE GATE HOTEL SALE PARK BUS SHOP MILK BREAD WATER FISH BOOK MAP DOOR TEA NORTH SOUTH EAST "
    "WEST PUSH PULL FREE COLD HOT".split()
)
DIRECTIONS = {"up": (0, -1), "down": (0, 1), "left": (-1, 0), "right": (1, 0)}
FRAMES = 4


@dataclass(frozen=True)
class Item:
    """A shape in a picture.

    Attributes:
        color: a key of ``COLORS``, or (red, green, blue) of a color without a name.
        shape: one of ``SHAPES``.
        x, y: centre in pixels.
        radius: of the circle around it, in pixels.
    """

    color: str | tuple
    shape: str
    x: float
    y: float
    radius: float

    @property
    def name(self):
        """For example ``red star``."""
        return f"{self.color} {self.shape}"

    @property
    def place(self):
        """One of ``PLACES``."""
        return PLACES[int(self.y * 3 / SIDE) * 3 + int(self.x * 3 / SIDE)]

    @property
    def outline(self):
        """Corners in pixels."""
        angles, reach = {
            "circle": (48, (1.0,)),
            "square": (4, (1.0,)),
            "triangle": (3, (1.0,)),
            "star": (10, (1.0, 0.42)),
        }[self.shape]
        turn = 0.5 / angles if self.shape == "square" else 0.0
        corners = []
        for i in range(angles):
            angle, length = 2 * math.pi * (i / angles + turn), self.radius * reach[i % len(reach)]
            corners.append((self.x + length * math.sin(angle), self.y - length * math.cos(angle)))
        return corners

    @property
    def box(self):
        """(x1, y1, x2, y2) in thousandths of the picture's side, rounded to tens."""
        xs, ys = zip(*self.outline)
        return tuple(round(value / SIDE * 100) * 10 for value in (min(xs), min(ys), max(xs), max(ys)))


def centre(cell):
    """The middle (x, y) of one of ``PLACES``, by number, in pixels."""
    return (cell % 3 + 0.5) * SIDE / 3, (cell // 3 + 0.5) * SIDE / 3


def arrange(kinds, rng, in_a_row=False):
    """Items of ``kinds``, pairs (color, shape), each in a cell of its own; in reading order."""
    cells = range(len(PLACES))
    if in_a_row:
        start = 3 * rng.randrange(3)
        cells = cells[start : start + 3]
    cells = sorted(rng.sample(cells, len(kinds)))
    items = []
    for cell, (color, shape) in zip(cells, kinds):
        x, y = (middle + rng.uniform(-1.5, 1.5) for middle in centre(cell))
        items.append(Item(color, shape, x, y, rng.uniform(9, 12)))
    return items


def any_color(shape, rng):
    """A random color that stands out from the ground, and that nobody would call one in which ``shape`` is ``UNSEEN``."""
    kept = [name for name, kept_shape in UNSEEN if kept_shape == shape]
    while True:
        color = tuple(rng.randbytes(3))
        away = {name: math.dist(color, other) for name, other in COLORS.items()}
        if min(color) < 150 and all(away[name] > max(110, 1.3 * min(away.values())) for name in kept):
            return color


def draw_items(items, rng, side=SIDE):
    """The picture of some items."""
    canvas = _ground(rng)
    pencil = ImageDraw.Draw(canvas)
    for item in items:
        pencil.polygon([(x * _SCALE, y * _SCALE) for x, y in item.outline], fill=_shade(item.color, rng))
    return _reduced(canvas, side)


def draw_text(text, rng, side=SIDE):
    """The picture of a word or number."""
    canvas = _ground(rng)
    pencil = ImageDraw.Draw(canvas)
    size = rng.uniform(24, 30)
    # No wider than the picture.
    size = min(size, size * 76 / pencil.textlength(text, font=ImageFont.load_default(size)))
    font = ImageFont.load_default(size * _SCALE)
    x, y = SIDE / 2 + rng.uniform(-3, 3), SIDE / 2 + rng.uniform(-5, 5)
    pencil.text((x * _SCALE, y * _SCALE), text, fill=_shade(rng.choice(("black", "blue", "red")), rng), font=font, anchor="mm")
    return _reduced(canvas, side)


def draw_chart(heights, rng, side=SIDE):
    """A chart of bars: ``{color: height}``, heights in tenths of the chart."""
    canvas = _ground(rng)
    pencil = ImageDraw.Draw(canvas)
    left, bottom, room = 10, 76, 68
    step = (SIDE - left - 6) / len(heights)
    for i, (color, height) in enumerate(heights.items()):
        x = left + (i + 0.15) * step
        corners = x, bottom - height / 10 * room, x + 0.7 * min(step, 22), bottom
        pencil.rectangle([value * _SCALE for value in corners], fill=_shade(color, rng))
    for line in ((6, bottom, SIDE - 3, bottom), (8, 4, 8, bottom)):
        pencil.line([value * _SCALE for value in line], fill=COLORS["black"], width=_SCALE)
    return _reduced(canvas, side)


def move(kind, direction, rng):
    """An item of ``kind`` at each of ``FRAMES`` moments of its way."""
    dx, dy = DIRECTIONS[direction]
    length, aside, radius = rng.uniform(28, 42), rng.uniform(-14, 14), rng.uniform(9, 13)
    items = []
    for i in range(FRAMES):
        way = (i / (FRAMES - 1) - 0.5) * length
        items.append(Item(*kind, SIDE / 2 + dx * way + dy * aside, SIDE / 2 + dy * way + dx * aside, radius))
    return items


def draw_unknown(rng):
    """A picture of nothing that has a name here: clouds of colour, coarse and fine, with some patches and lines."""
    full = SIDE * _SCALE
    canvas = None
    for cells in (rng.randint(2, 4), rng.randint(5, 9), rng.randint(12, 40)):
        cloud = Image.frombytes("RGB", (cells, cells), rng.randbytes(3 * cells * cells))
        cloud = cloud.resize((full, full), Image.Resampling.BICUBIC)
        canvas = cloud if canvas is None else Image.blend(canvas, cloud, rng.uniform(0.1, 0.5))
    if rng.random() < 0.5:  # photographs are less colourful
        canvas = Image.blend(canvas, canvas.convert("L").convert("RGB"), rng.uniform(0.3, 1.0))
    pencil = ImageDraw.Draw(canvas)
    for _ in range(rng.randint(0, 6)):
        corners = [(rng.uniform(0, full), rng.uniform(0, full)) for _ in range(rng.randint(2, 5))]
        color = tuple(rng.randbytes(3))
        if rng.random() < 0.5:
            pencil.polygon(corners, fill=color)
        else:
            pencil.line(corners, fill=color, width=rng.randint(2, 20))
    return _reduced(canvas, SIDE)


def _ground(rng):
    light = rng.randint(225, 255)
    return Image.new("RGB", (SIDE * _SCALE,) * 2, (light,) * 3)


def _shade(color, rng):
    return tuple(max(0, min(255, value + rng.randint(-20, 20))) for value in COLORS.get(color, color))


def _reduced(canvas, side):
    return canvas.resize((side, side), Image.Resampling.BOX)
