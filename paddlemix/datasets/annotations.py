"""Pictures with captions, pictures or clips in folders of classes: the forms in which the public data sets come."""

import json
import os
import re
import sys

from paddlemix.errors import DataError
from paddlemix.files import read_regular

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".avif", ".jp2")
_MOST = 1 << 30  # bytes of a file of annotations
CLIPS = (".mp4", ".avi", ".mkv", ".webm", ".mov", ".gif")


def find_files(folder, endings=PICTURES):
    """Paths of all files below ``folder`` with one of ``endings``, sorted; links to folders are not followed.

    Raises:
        DataError: the folder is missing, or there are none.
    """
    if not os.path.isdir(folder):
        raise DataError(f"{folder} is not a folder: name the one with the pictures")
    found = []
    for place, _, names in os.walk(folder):
        found += [os.path.join(place, name) for name in names if name.lower().endswith(endings)]
    if not found:
        raise DataError(f"{folder} holds no file that ends in {', '.join(endings)}")
    return sorted(found)


def read_classes(folder, endings=PICTURES):
    """A folder of class folders, as ImageNet's.

    Returns:
        (paths, labels, names of the class folders in order).

    Raises:
        DataError: there are no class folders, or one is empty.
    """
    if not os.path.isdir(folder):
        raise DataError(f"{folder} is not a folder: name the one with a folder for each class")
    names = sorted(name for name in os.listdir(folder) if os.path.isdir(os.path.join(folder, name)))
    if not names:
        raise DataError(f"{folder} has no folders in it: a data set for classification has one for each class")
    paths, labels = [], []
    for label, name in enumerate(names):
        own = find_files(os.path.join(folder, name), endings)
        paths += own
        labels += [label] * len(own)
    return paths, labels, names


def read_captions(path, root, names=None):
    """Pictures and their captions.

    Args:
        path: ``.json`` or ``.jsonl`` of ``{"image": name, "caption": text or list}`` (COCO's Karpathy form); COCO's own
            ``{"images": [...], "annotations": [...]}``; a text of lines ``name#n<tab>caption`` (Flickr30K-CN, COCO-CN) or
            ``name,caption`` behind such a header (Flickr30K); with ``names``, a caption a line (XTD).
        root: folder that the names are relative to.
        names: text with a picture's name a line, for captions that come without.

    Returns:
        (paths of pictures, captions, number of the picture of each caption).

    Raises:
        DataError: the file cannot be read, or a line of it cannot be used.
    """
    lines = read_lines(path)
    if names is not None:
        pictures = read_lines(names)
        if len(pictures) != len(lines):
            raise DataError(f"{names} has {len(pictures)} names but {path} {len(lines)} captions: they must be of one data set")
        pairs = list(zip(pictures, lines))
    elif path.endswith(".jsonl"):
        pairs = [pair for number, line in enumerate(lines, 1) for pair in _record(_json(line, f"{path}, line {number}"), path)]
    elif path.endswith(".json"):
        pairs = _json_pairs(_json("\n".join(lines), path), path)
    elif lines and "\t" in lines[0]:
        pairs = [_tabbed(line, path, number) for number, line in enumerate(lines, 1)]
    else:
        pairs = _comma_pairs(lines, path)
    if not pairs:
        raise DataError(f"{path} holds no caption")
    number, owner = {}, []
    for name, _ in pairs:
        owner.append(number.setdefault(name, len(number)))
    return [os.path.join(root, name) for name in number], [caption for _, caption in pairs], owner


def read_lines(path):
    """The lines of a text file that are not empty; ``-`` is the standard input.

    Raises:
        DataError: the file cannot be read, or is not UTF-8.
    """
    try:
        content = sys.stdin.buffer.read() if path == "-" else read_regular(path, _MOST)
        return [line for line in content.decode("utf-8-sig").splitlines() if line.strip()]
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error.reason} at byte {error.start})") from None


def _json(text, where):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not valid JSON ({str(error)[:100]})") from None


def _json_pairs(values, path):
    if isinstance(values, dict) and isinstance(values.get("images"), list) and isinstance(values.get("annotations"), list):
        try:
            files = {image["id"]: image["file_name"] for image in values["images"]}
            return [(files[note["image_id"]], _text(note["caption"], path)) for note in values["annotations"]]
        except (KeyError, TypeError) as error:
            raise DataError(f"{path}: an image or annotation lacks {error}: it must be in COCO's form") from None
    if not isinstance(values, list):
        raise DataError(f"{path} must hold a list of records with image and caption")
    return [pair for value in values for pair in _record(value, path)]


def _record(value, path):
    if not isinstance(value, dict) or not isinstance(value.get("image", value.get("video")), str) or "caption" not in value:
        raise DataError(f"{path}: a record needs image and caption, not {str(value)[:80]}")
    captions = value["caption"] if isinstance(value["caption"], list) else [value["caption"]]
    return [(value.get("image", value.get("video")), _text(caption, path)) for caption in captions]


def _text(value, path):
    if not isinstance(value, str):
        raise DataError(f"{path}: a caption must be a text, not {str(value)[:80]}")
    return value


def _tabbed(line, path, number):
    name, tab, caption = line.partition("\t")
    if not tab or not caption.strip():
        raise DataError(f"{path}, line {number}: expected name#n, a tab and a caption, found '{line[:80]}'")
    return re.sub(r"(#[\w:]*)+$", "", name.strip()), caption.strip()


def _comma_pairs(lines, path):
    if not lines or lines[0].replace(" ", "").lower() not in ("image,caption", "image_name,comment"):
        raise DataError(f"{path}, line 1: expected the header image,caption (or name#n, a tab and a caption)")
    pairs = []
    for number, line in enumerate(lines[1:], 2):
        name, comma, caption = line.partition(",")  # captions have commas of their own, and not always quotes
        if not comma or not caption.strip():
            raise DataError(f"{path}, line {number}: expected name,caption, found '{line[:80]}'")
        caption = caption.strip()
        if len(caption) > 1 and caption[0] == caption[-1] == '"':
            caption = caption[1:-1].replace('""', '"').strip()
        pairs.append((name.strip(), caption))
    return pairs
