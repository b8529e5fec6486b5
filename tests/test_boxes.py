"""Boxes in answers."""

import numpy as np
import pytest
from PIL import Image

from paddlemix.boxes import Box, draw_boxes, parse_boxes


@pytest.mark.parametrize(
    "text, expected",
    [
        ("<ref>the panda</ref><box>[[100, 200, 300, 400]]</box>", [Box("the panda", 20, 20, 60, 40)]),
        (
            "<ref>cat</ref><box>[[0, 0, 500, 500], [500, 500, 1000, 1000]]</box> and <ref>dog</ref><box>[[1, 2, 3, 4]]</box>",
            [Box("cat", 0, 0, 100, 50), Box("cat", 100, 50, 200, 100), Box("dog", 0.2, 0.2, 0.6, 0.4)],
        ),
        ("the panda[[100, 200, 300, 400]]", [Box("the panda", 20, 20, 60, 40)]),  # decoded without special tokens
        ("A cat[[0,0,500,500]], a dog[[500,500,1000,1000]].", [Box("A cat", 0, 0, 100, 50), Box("a dog", 100, 50, 200, 100)]),
        ("[0.1, 0.2, 0.3, 0.4]", [Box("", 20, 20, 60, 40)]),
        ("<ref>熊猫</ref><box>[[300, 400, 100, 200]]</box>", [Box("熊猫", 20, 20, 60, 40)]),  # corners the wrong way round
        ("<ref>x</ref><box>[[-50, 0, 1200, 1000]]</box>", [Box("x", 0, 0, 200, 100)]),  # clipped to the picture
        (
            "<ref>a</ref><box>[[0, 0, 1, 1], [500, 500, 1000, 1000]]</box>",
            [Box("a", 0, 0, 0.2, 0.1), Box("a", 100, 50, 200, 100)],
        ),
        ("<ref>one</ref> and <ref>two</ref><box>[[0, 0, 500, 500]]</box>", [Box("two", 0, 0, 100, 50)]),
        ("<box>[[0, 0, 500, 500], [5, 6, 7]]</box>", [Box("", 0, 0, 100, 50)]),  # the second is not whole
        ("<ref>x</ref><box>[[100 200 300 400]]</box>, <box>[[1, 2, 3]]</box>, [[nan, 1, 2, 3]]", []),
        ("<ref>no box</ref>", []),
        ("There is nothing of the kind in [this] picture.", []),
        ('[{"bbox_2d": [100, 200, 300, 400], "label": "truck"}]', [Box("truck", 20, 20, 60, 40)]),
        (
            'Here:\n```json\n[{"label": "truck", "bbox_2d": [100, 200, 300, 400]},'
            ' {"bbox": [0, 0, 500, 500], "label": "a, b"}]\n```',
            [Box("truck", 20, 20, 60, 40), Box("a, b", 0, 0, 100, 50)],
        ),
        ('{"bbox_2d": [0.1, 0.2, 0.3, 0.4]}', [Box("", 20, 20, 60, 40)]),
        ('{"objects": [{"label": "x", "bbox_2d": [[100, 200, 300, 400]]}]} done', [Box("x", 20, 20, 60, 40)]),
        ('[{"bbox_2d": [100, 200, 300, 400], "label": "x"}, {"bbox_2d": [1, 2', [Box("x", 20, 20, 60, 40)]),  # cut off
        ('[{"bbox_2d": [1, 2, 3], "label": "x"}, {"bbox_2d": "all", "label": 5}]', []),
        ("The four numbers are [1, 2, 3, 4].", []),
        ("Between [100, 200, 300, 400] and the end", []),
        ("<ref>cut off</ref><box>[[100, 200, 300", []),
        ("", []),
    ],
)
def test_boxes_are_read(text, expected):
    found = parse_boxes(text, 200, 100)
    assert [box.name for box in found] == [box.name for box in expected]
    for box, wanted in zip(found, expected):
        assert (box.x1, box.y1, box.x2, box.y2) == pytest.approx((wanted.x1, wanted.y1, wanted.x2, wanted.y2))


def test_boxes_are_drawn_where_they_are():
    image = Image.new("L", (200, 100), 255)
    drawn = np.asarray(draw_boxes(image, [Box("a", 50, 40, 150, 90)]))
    assert drawn.shape == (100, 200, 3)
    assert np.asarray(image).min() == 255  # the original is untouched
    changed = (drawn != 255).any(-1)
    assert changed[90, 50:151].all() and changed[40:91, 50].all()  # lower and left edge
    assert not changed[60:80, 70:130].any()  # inside
    assert not changed[95:, :].any()


def test_chinese_names_are_drawn_where_the_system_has_a_font_for_them():
    from paddlemix import boxes

    if boxes._wide_font() is None:
        pytest.skip("no font with Chinese characters is installed")
    image = Image.new("RGB", (400, 200), "white")
    one, two = (np.asarray(draw_boxes(image, [Box(name, 50, 60, 150, 90)])) for name in ("猫", "狗"))
    assert (one != two).any()  # one glyph for all that is missing would be the same
