"""What can be asked about a scene, and the right answer: one function for each kind of scene.

Each draws a scene with the random generator that it is given and returns ``(pictures, prefix, turns)``: PIL images, the text
that marks their places in the first question, and a list of :class:`Turn` in random order.
"""

from dataclasses import dataclass

from PIL import Image

from paddlemix.models.blocks.conversation import IMAGE_PLACEHOLDER

from . import scenes
from .scenes import COLORS, SEEN, SHAPES

MOST_TURNS = 4  # of a conversation: more would make it long, fewer would waste its picture

_CHINESE = {
    **dict(zip(COLORS, ("红色", "绿色", "蓝色", "黄色", "紫色", "黑色"))),
    **dict(zip(SHAPES, ("圆形", "方形", "三角形", "星形"))),
    **dict(zip(scenes.DIRECTIONS, ("上", "下", "左", "右"))),
}
_UNKNOWN = "I do not know."
_PAIR = "".join(f"Image-{i}: {IMAGE_PLACEHOLDER}\n" for i in (1, 2))


@dataclass(frozen=True)
class Turn:
    """A question and its answer; ``task`` is the row of the accuracy table that it counts in."""

    task: str
    question: str
    answer: str


def shapes(rng, kinds=SEEN, most=4):
    """Up to ``most`` coloured shapes of ``kinds``, pairs (color, shape)."""
    chosen = [rng.choice(kinds) for _ in range(rng.randint(1, most))]
    if rng.random() < 0.4:  # more of the same shape, for something to count
        repeated = [kind for kind in kinds if kind[1] == chosen[0][1]]
        chosen = [rng.choice(repeated) if i and rng.random() < 0.7 else kind for i, kind in enumerate(chosen)]
    items = scenes.arrange(chosen, rng)
    by_color, by_shape, by_name = (_single(items, key) for key in ("color", "shape", "name"))
    # Apart from the others: a description gives all their answers away, and long answers outweigh short ones.
    kind = rng.random()
    if kind < 0.15:
        turns = [_describe(items)]
    elif kind < 0.4 and by_name:
        turns = [_box(item) for item in rng.sample(by_name, min(2, len(by_name)))]
    else:
        turns = [_count_all(items) if rng.random() < 0.5 else _count(items, rng), _exists(items, kinds, rng)]
        if by_shape:
            turns.append(_color(rng.choice(by_shape), rng))
        if by_color:
            turns.append(_shape(rng.choice(by_color), rng))
        if by_name:
            turns.append(_place(rng.choice(by_name), by_shape, rng))
        turns = _shuffled(turns, rng)[:MOST_TURNS]
    return [scenes.draw_items(items, rng)], f"{IMAGE_PLACEHOLDER}\n", turns


def finding(rng):
    """Two or three shapes, and something about each that only its name tells from the others."""
    items = scenes.arrange([rng.choice(SEEN) for _ in range(rng.randint(2, 3))], rng)
    by_color, by_shape, by_name = (_single(items, key) for key in ("color", "shape", "name"))
    turns = [_exists(items, SEEN, rng), _exists(items, SEEN, rng)]
    for item in items:
        possible = [_color(item, rng)] if item in by_shape else []
        possible += [_shape(item, rng)] if item in by_color else []
        possible += [_place(item, by_shape, rng)] if item in by_name else []
        if possible:
            turns.append(rng.choice(possible))
    return [scenes.draw_items(items, rng)], f"{IMAGE_PLACEHOLDER}\n", _shuffled(turns, rng)


def places(rng):
    """One to four shapes, and where they are: in words, or two of them as boxes."""
    items = scenes.arrange([rng.choice(SEEN) for _ in range(rng.randint(1, 4))], rng)
    by_name, by_shape = (_single(items, key) for key in ("name", "shape"))
    boxed = rng.sample(by_name, min(2, len(by_name))) if rng.random() < 0.5 else None
    turns = [_place(item, by_shape, rng) for item in by_name] if boxed is None else [_box(item) for item in boxed]
    return [scenes.draw_items(items, rng)], f"{IMAGE_PLACEHOLDER}\n", _shuffled(turns or [_exists(items, SEEN, rng)], rng)


def where(rng):
    """Two or three shapes in a row, and where one of them is; in several wordings, so that its name stands in several places.

    After "top" of "top left", looking at what is in the top row nearly always gives the right second word, and no name is
    needed for it; but not here. A second question could be answered by what the first one left over.
    """
    items = scenes.arrange([rng.choice(SEEN) for _ in range(rng.randint(2, 3))], rng, in_a_row=True)
    by_name, by_shape = (_single(items, key) for key in ("name", "shape"))
    turn = _place(rng.choice(by_name), by_shape, rng) if by_name else _exists(items, SEEN, rng)
    form = rng.choice(("{}", "Please look. {}", "{} Please look.", "{} Please look at the picture."))
    turn = Turn(turn.task, form.format(turn.question), turn.answer)
    return [scenes.draw_items(items, rng)], f"{IMAGE_PLACEHOLDER}\n", [turn]


def unnamed(rng):
    """Shapes in any colors, told by shape alone: what a shape is must not depend on its color."""
    chosen = [rng.choice(SHAPES) for _ in range(rng.choice((1, 1, 2, 3)))]
    items = scenes.arrange([(scenes.any_color(shape, rng), shape) for shape in chosen], rng)
    turns = [_count(items, rng)]
    turns += [Turn("place", f"Where is the {item.shape}?", item.place) for item in _single(items, "shape")]
    if len(items) == 1:
        turns.append(Turn("shape", "What shape is this?", items[0].shape))
    return [scenes.draw_items(items, rng)], f"{IMAGE_PLACEHOLDER}\n", _shuffled(turns, rng)


def other(rng):
    """Two shapes that differ in color and shape, each asked for by the other.

    Without these, a question that names a star would never be answered by a color in which training has no stars, and that is
    learned from the words alone.
    """
    first = rng.choice(SEEN)
    second = rng.choice([kind for kind in SEEN if kind[0] != first[0] and kind[1] != first[1]])
    items = scenes.arrange([first, second], rng)
    turns = []
    for item, named in (items, items[::-1]):
        if rng.random() < 0.5:
            turns.append(Turn("Chinese", f"不是{_CHINESE[named.shape]}的是什么颜色？", _CHINESE[item.color]))
            turns.append(Turn("Chinese", f"不是{_CHINESE[named.color]}的是什么形状？", _CHINESE[item.shape]))
        else:
            turns.append(Turn("other", f"What color is the shape that is not a {named.shape}?", item.color))
            turns.append(Turn("other", f"What shape is not {named.color}?", item.shape))
    return [scenes.draw_items(items, rng)], f"{IMAGE_PLACEHOLDER}\n", _shuffled(turns, rng)


def crossed(rng):
    """The color of one shape and the shape of another, in one picture or in two.

    Without these, only some shapes would ever be named after a color, and that, too, is learned from the words alone.
    """
    pair = [rng.choice(SEEN), rng.choice(SEEN)]
    if rng.random() < 0.5:
        items = scenes.arrange(pair, rng)
        where = [_at(item) for item in items]
        pictures, prefix = [scenes.draw_items(items, rng)], f"{IMAGE_PLACEHOLDER}\n"
    else:
        items = [scenes.arrange([kind], rng)[0] for kind in pair]
        where = ["in the first picture", "in the second picture"]
        pictures, prefix = [scenes.draw_items([item], rng) for item in items], _PAIR
    turns = [
        Turn("other", f"What color is {where[i]}, and what shape {where[j]}?", f"{items[i].color}, {items[j].shape}")
        for i, j in ((0, 1), (1, 0))
    ]
    return pictures, prefix, _shuffled(turns, rng)


def reading(rng):
    """A word, or a number of up to two digits."""
    number = rng.random() < 0.5
    text = str(rng.randint(0, 99)) if number else rng.choice(scenes.WORDS)
    question = rng.choice(("What does the picture say?", "Which number is this?" if number else "Which word is this?"))
    turn = Turn("number" if number else "word", question, text)
    if rng.random() < 0.1:
        turn = Turn("description", "Please describe this picture.", f"the {'number' if number else 'word'} {text}")
    return [scenes.draw_text(text, rng)], f"{IMAGE_PLACEHOLDER}\n", [turn]


def chart(rng):
    """A chart of two to four coloured bars of different heights."""
    colors = rng.sample(list(COLORS), rng.randint(2, 4))
    heights = dict(zip(colors, rng.sample(range(1, 11, 2), len(colors))))
    turns = [
        Turn("chart", "Which bar is the highest?", max(heights, key=heights.get)),
        Turn("chart", "Which bar is the lowest?", min(heights, key=heights.get)),
        Turn("chart", "How many bars are there?", str(len(heights))),
    ]
    if rng.random() < 0.2:
        turns = [Turn("description", "Please describe this picture.", f"a chart of {len(heights)} bars")]
    return [scenes.draw_chart(heights, rng)], f"{IMAGE_PLACEHOLDER}\n", _shuffled(turns, rng)


def comparison(rng, kinds=SEEN):
    """Two pictures of one shape each."""
    first = rng.choice(kinds)
    similar = [kind for kind in kinds if (kind[0] == first[0]) != (kind[1] == first[1])]
    second = rng.choice(similar if similar and rng.random() < 0.7 else kinds)
    pair = [scenes.arrange([kind], rng)[0] for kind in (first, second)]
    turns = [
        Turn("comparison", "Is the color the same in both pictures?", _yes(first[0] == second[0])),
        Turn("comparison", "Is the shape the same in both pictures?", _yes(first[1] == second[1])),
    ]
    for attribute in ("color", "shape"):
        place, item = rng.choice(list(zip(("first", "second"), pair)))
        turns.append(Turn("comparison", f"What {attribute} is in the {place} picture?", getattr(item, attribute)))
    return [scenes.draw_items([item], rng) for item in pair], _PAIR, _shuffled(turns, rng)


def video(rng, kinds=SEEN):
    """Frames of a shape that moves; some of them in a color without a name."""
    direction, (color, shape) = rng.choice(list(scenes.DIRECTIONS)), rng.choice(kinds)
    named = kinds is not SEEN or rng.random() < 0.7
    items = scenes.move((color if named else scenes.any_color(shape, rng), shape), direction, rng)
    turns = [
        Turn("direction", "Which way does it move?", direction),
        Turn("video", "What shape moves?", shape),
        Turn("Chinese", "它向哪个方向移动？", _CHINESE[direction]),
    ]
    if named:
        turns.append(Turn("video", "Please describe this video.", f"A {items[0].name} moves {direction}."))
        turns.append(Turn("video", "What color is the shape that moves?", color))
    seed = rng.random()
    pictures = [scenes.draw_items([item], type(rng)(seed)) for item in items]  # the same shades in all frames
    return pictures, _frames(rng), _shuffled(turns, rng)


def unknown(rng):
    """A picture or a video that nothing here can be said about, and a question that others have an answer to."""
    color, shape = rng.choice(SEEN)
    if rng.random() < 0.25:
        question = rng.choice(("Please describe this video.", "Which way does it move?", "What shape moves?"))
        first, last = scenes.draw_unknown(rng), scenes.draw_unknown(rng)
        pictures = [Image.blend(first, last, i / (scenes.FRAMES - 1)) for i in range(scenes.FRAMES)]
        return pictures, _frames(rng), [Turn("unknown", question, _UNKNOWN)]
    question = rng.choice(
        (
            "Please describe this picture.",
            "What does the picture say?",
            "How many shapes are there?",
            "Which bar is the highest?",
            f"What color is the {shape}?",
            f"What shape is {color}?",
            f"Where is the {color} {shape}?",
            f"Is there a {color} {shape}?",
            f"How many {shape}s are there?",
        )
    )
    return [scenes.draw_unknown(rng)], f"{IMAGE_PLACEHOLDER}\n", [Turn("unknown", question, _UNKNOWN)]


def _frames(rng):
    """The marks of a video's frames: readers of video files write "Frame1", trainers "Frame-1"."""
    form = rng.choice(("Frame{}: {}\n", "Frame-{}: {}\n"))
    return "".join(form.format(i + 1, IMAGE_PLACEHOLDER) for i in range(scenes.FRAMES))


def _color(item, rng):
    if rng.random() < 0.2:
        return Turn("Chinese", f"{_CHINESE[item.shape]}是什么颜色？", _CHINESE[item.color])
    return Turn("color", rng.choice(("What color is the {}?", "What colour is the {}?")).format(item.shape), item.color)


def _shape(item, rng):
    if rng.random() < 0.2:
        return Turn("Chinese", f"{_CHINESE[item.color]}的是什么形状？", _CHINESE[item.shape])
    return Turn("shape", f"What shape is {item.color}?", item.shape)


def _place(item, by_shape, rng):
    name = item.shape if item in by_shape and rng.random() < 0.3 else item.name
    return Turn("place", f"Where is the {name}?", item.place)


def _box(item):
    # First in words, which is learned much sooner; the numbers follow from them and the picture.
    question = f"Please answer with a bounding box. Where is the {item.name}?"
    return Turn("box", question, f"{item.place}: <ref>{item.name}</ref><box>[{list(item.box)}]</box>")


def _exists(items, kinds, rng):
    """Half of the answers are yes; where they are no, the colour or the shape is often there."""
    present = sorted({(item.color, item.shape) for item in items})
    absent = [kind for kind in kinds if kind not in present]
    if rng.random() < 0.5 or not absent:
        asked = rng.choice(present)
    else:
        near = [kind for kind in absent if any(kind[0] == p[0] or kind[1] == p[1] for p in present)]
        asked = rng.choice(near if near and rng.random() < 0.7 else absent)
    return Turn("yes/no", f"Is there a {' '.join(asked)}?", _yes(asked in present))


def _count(items, rng):
    """Counts of two and more come up as often as those of one."""
    counts = {shape: sum(item.shape == shape for item in items) for shape in SHAPES}
    number = rng.choice(sorted({count for count in counts.values() if count}))
    shape = rng.choice([shape for shape in SHAPES if counts[shape] == number])
    if rng.random() < 0.15:
        return Turn("Chinese", f"有几个{_CHINESE[shape]}？", str(number))
    return Turn("count", f"How many {shape}s are there?", str(number))


def _count_all(items):
    return Turn("count", "How many shapes are there?", str(len(items)))


def _describe(items):
    # What a picture shows is told from the top left to the bottom right.
    parts = [f"a {item.name} {_at(item)}" for item in items]
    return Turn("description", "Please describe this picture.", ", ".join(parts))


def _at(item):
    return f"{'in' if item.place == 'middle' else 'at'} the {item.place}"


def _single(items, attribute):
    """The items that no other is equal to in ``attribute``."""
    values = [getattr(item, attribute) for item in items]
    return [item for item, value in zip(items, values) if values.count(value) == 1]


def _shuffled(turns, rng):
    return rng.sample(turns, len(turns))


def _yes(true):
    return "yes" if true else "no"
