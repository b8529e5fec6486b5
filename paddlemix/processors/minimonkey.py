"""Mini-Monkey's tiles: a picture is cut at two scales, so that what one grid cuts through is whole in the other.

Multi-scale adaptive cropping of arXiv 2408.02034, as its code has it. Group A is cut by InternVL's rule; group B by the same
rule over fewer tiles, among the grids that do not cut where A's does.
"""

from paddlemix.errors import ImageError

from .image import cut_into_tiles, find_closest_aspect_ratio, open_image, target_grids, to_pixels

RULES = ("chat", "training")
# (fewest, most) tiles of groups A and B. The published demo and the published training code differ.
_RANGES = {"chat": ((4, 12), (3, 7)), "training": ((1, 12), (1, 4))}


def multi_scale_tiles(picture, input_size=448, rule="chat", max_num=None, ranges=None):
    """Tiles of a picture at both scales.

    Args:
        picture: anything that :func:`~.image.open_image` takes.
        input_size: side of a tile in pixels.
        rule: ``chat`` or ``training``, which differ in the grids of group B, its thumbnail, and the order.
        max_num: most tiles of group A, 12 by default.
        ranges: ``((fewest, most) of A, (fewest, most) of B)`` in place of the rule's own.

    Returns:
        ``(pixels, grid, counts)``: float32 ``[tiles, 3, input_size, input_size]``; tiles (across, down) of A; tiles of B and of
        A with their thumbnails, of which chat drops one.

    Raises:
        ImageError: the picture cannot be read, or an argument makes no sense.
    """
    image = open_image(picture)
    tiles, grid, counts = cut(image, input_size, rule, max_num, ranges)
    return to_pixels(tiles), grid, counts


def cut(image, input_size, rule="chat", max_num=None, ranges=None):
    """:func:`multi_scale_tiles` of an RGB PIL image, as a list of PIL images instead of pixels."""
    grid, other = grids(image.size, input_size, rule, max_num, ranges)
    coarse = cut_into_tiles(image, other, input_size, use_thumbnail=rule == "chat")
    fine = cut_into_tiles(image, grid, input_size, use_thumbnail=True)
    # In chat the two thumbnails are equal, and one is enough.
    tiles = [*coarse[:-1], *fine[:-1], coarse[-1]] if rule == "chat" else [*fine[:-1], *coarse, fine[-1]]
    return tiles, grid, (len(coarse), len(fine))


def count_tiles(size, input_size, rule="chat", max_num=None, ranges=None):
    """How many tiles a picture of ``size`` (width, height) becomes."""
    (a, b), (i, j) = grids(size, input_size, rule, max_num, ranges)
    fine, coarse = a * b + (a * b > 1), i * j
    return fine + coarse if rule == "training" else fine + coarse + (coarse > 1) - 1


def grids(size, input_size, rule="chat", max_num=None, ranges=None):
    """The grids of A and of B, each (tiles across, tiles down), for a picture of ``size`` (width, height).

    Raises:
        ImageError: the rule is not known, bounds make no sense, or the picture has no pixels.
    """
    if rule not in RULES:
        raise ImageError(f"rule is '{rule}': Mini-Monkey's tiles follow {' or '.join(RULES)}")
    width, height = size
    if not width or not height:
        raise ImageError(f"the picture has no pixels ({width}x{height}); give a larger one")
    (fewest, most), of_b = ranges or _RANGES[rule]
    if max_num is not None:
        fewest, most = min(fewest, max_num), max_num

    def closest(candidates):
        return find_closest_aspect_ratio(width / height, candidates, width, height, input_size)

    a, b = closest(target_grids(fewest, most))
    apart = any if rule == "chat" else all
    return (a, b), closest([(i, j) for i, j in target_grids(*of_b) if apart([a % i, b % j])])
