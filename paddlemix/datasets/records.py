"""Meta files and records: what a user's training data looks like on disk, and what may be wrong with it.

A meta file names data sets; each has a folder of pictures and a JSON-lines file of records (docs/data.md). Records are found
by their place in the file and parsed when they are asked for, so a million of them cost a few megabytes.
"""

import dataclasses
import functools
import io
import json
import os
import re
from dataclasses import dataclass

import numpy as np
from PIL import Image

from paddlemix.errors import DataError
from paddlemix.models.blocks.conversation import IMAGE_PLACEHOLDER, IMG_CONTEXT
from paddlemix.processors.image import picture_formats
from paddlemix.processors.media import Remote, is_address
from paddlemix.validation import shown

from .lines import LineIndex
from .shards import Shards, expand
from .shuffling import shuffled

VIDEO_PLACEHOLDER = "<video>"
_KEYS = ("root", "annotation", "shards", "data_augment", "repeat_time", "length", "max_dynamic_patch")
_ROLES = ("system", "human", "gpt")
_MESSAGE_ROLES = {"system": "system", "user": "human", "assistant": "gpt"}


@dataclass(frozen=True)
class Record:
    """One conversation and the pictures or the video that it is about.

    Attributes:
        conversations: ``[{"from": ..., "value": ...}, ...]``.
        images: paths of the pictures, possibly none; a :class:`~paddlemix.processors.media.Remote` for one at an address.
        video: path of a video file or a folder of frames, or None.
        clip: (start, end) of the video in seconds, or None for all of it.
        sizes: (width, height) of each picture in pixels where the record states them, else None.
        length: tokens of the whole sample where the record states them, else None; only ever an estimate.
    """

    conversations: list
    images: tuple = ()
    video: str | None = None
    clip: tuple | None = None
    sizes: tuple | None = None
    length: int | None = None


class Source:
    """One data set of a meta file: its records, in order, as often as ``repeat_time`` says.

    Args:
        name: of the data set.
        root: folder that the paths of pictures and videos are relative to.
        annotation: path of the JSON-lines file, of a ``.json`` file that holds one list of records, or the path or pattern of
            tar shards (see :mod:`~.shards`).
        data_augment: whether pictures are re-encoded as JPEG of random quality.
        repeat_time: below 1, the share of the records that is used, counted from the first; else a whole number of times
            that each is used in an epoch.
        length: how many records the meta file claims; informative.
        max_dynamic_patch: bound on the tiles of a sample's pictures in place of the training's own; None for that.
        parse: as :func:`parse_record`, for records of another form.
        draw: seed by which a share of the records is drawn at random; None for the first ones.

    Raises:
        DataError: the file cannot be read or has no record.
    """

    domains = ()  # hosts that pictures may be fetched from

    def __init__(
        self,
        name,
        root,
        annotation,
        data_augment=False,
        repeat_time=1,
        length=None,
        max_dynamic_patch=None,
        parse=None,
        draw=None,
    ):
        self.parse = parse or parse_record
        self.name, self.root, self.annotation = name, root, annotation
        self.data_augment, self.max_dynamic_patch = data_augment, max_dynamic_patch
        self.repeat_time, self.length = repeat_time, length
        self._rows = _rows(annotation)
        self.num_records = int(len(self._rows) * min(1, repeat_time))
        if not self.num_records:
            share = f" of which repeat_time {repeat_time} leaves none" if repeat_time < 1 else ""
            raise DataError(f"data set '{name}': {annotation} has too few records{share}: add some, or remove the data set")
        self._draw = None if draw is None or repeat_time >= 1 else [draw, *name.encode()]

    def __len__(self):
        return self.num_records * max(1, int(self.repeat_time))

    def _row(self, index):
        place = index % self.num_records
        return place if self._draw is None else int(shuffled(place, len(self._rows), self._draw))

    def where(self, index):
        """Where a record stands: (path of the file, number of its line, or of the record in a list or a shard, from 1)."""
        return self._rows.where(self._row(index))

    def line(self, index):
        """Line number of a record in the file, from 1."""
        return self.where(index)[1]

    def place(self, index):
        """Where a record stands, ``file:line``."""
        return "{}:{}".format(*self.where(index))

    def stamp(self):
        """What tells the records from those of other files, or of the same file at another time; for keys of caches."""
        return [self._rows.stamp(), os.path.abspath(self.root), self.num_records, self._draw]

    def read(self, index):
        """The :class:`Record` of that index.

        Raises:
            DataError: it is not valid JSON or not a usable record; the message says why, but not where: see :meth:`place`.
        """
        return _allowed(self._rows.record(self._row(index), self.parse, self.root), self.domains)


def _allowed(record, domains):
    """The record, whose pictures at addresses may be fetched from ``domains``.

    Raises:
        DataError: one is from elsewhere.
    """
    if not any(isinstance(image, Remote) for image in record.images):
        return record
    images = [Remote(image.url, domains) if isinstance(image, Remote) else image for image in record.images]
    for image in images:
        if isinstance(image, Remote) and not image.is_allowed:
            raise DataError(image.refusal)
    return dataclasses.replace(record, images=tuple(images))


def _rows(annotation):
    """The records of a file or of shards: ``len()`` of them, ``where(row)``, ``record(row, parse, root)`` and ``stamp()``."""
    path = os.fspath(annotation)
    if path.endswith(".tar"):
        return Shards(expand(path))
    return _List(path) if path.endswith(".json") else LineIndex(path)


def read_meta(path, parse=None, domains=(), draw=None):
    """The data sets of a meta file: ``{name: {"root": ..., "annotation": ..., ...}, ...}``.

    Relative paths are taken from the working directory, as in the original, and where nothing is there, from the folder of
    the meta file.

    Args:
        path: of the meta file.
        parse, draw: see :class:`Source`.
        domains: hosts that pictures of records may be fetched from (``--allowed_media_domains``).

    Returns:
        List of :class:`Source`.

    Raises:
        DataError: the file is missing, is not JSON, or an entry of it is wrong.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            meta = json.load(file, object_pairs_hook=functools.partial(_unique_keys, path))
    except OSError as error:
        raise DataError(f"meta file {path} cannot be read ({error.strerror}): check the path") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"meta file {path} is not valid JSON ({error})") from None
    if not isinstance(meta, dict) or not meta:
        raise DataError(f"meta file {path} must hold an object that names at least one data set")
    sources = [_source(name, entry, path, parse, draw) for name, entry in meta.items()]
    for source in sources:
        source.domains = tuple(domains or ())
    return sources


def parse_record(line, root=""):
    """Read one line of a JSON-lines file.

    Args:
        line: bytes.
        root: folder that the record's paths are relative to.

    Raises:
        DataError: what is wrong, without saying where.
    """
    return read_record(load_object(line), root)


def read_record(record, root=""):
    """The :class:`Record` of a JSON object, in the form of conversations or of messages; see :func:`parse_record`."""
    if "messages" in record:
        record = _from_messages(record)
    conversations = _conversations(record.get("conversations"))
    images, video = _images(record.get("image")), record.get("video") or None
    if video is not None and not isinstance(video, str):
        raise DataError(f"'video' must be one path, not {_describe(video)}: a sample can hold one video")
    if images and video:
        raise DataError("has both 'image' and 'video': a sample can hold one kind, so make two records of it")
    _check_marks(conversations, len(images), video is not None)
    if isinstance(video := video and _path(root, video), Remote):
        raise DataError(f"'{video.name}' is not on this machine: download it and give its path")
    return Record(
        conversations=conversations,
        images=tuple(_path(root, image) for image in images),
        video=video,
        clip=_clip(record.get("clip")) if video else None,
        sizes=_sizes(record, len(images)),
        length=record.get("length") if _is_count(record.get("length")) else None,
    )


def load_object(line):
    """The JSON object in one line.

    Raises:
        DataError: there is none, without saying where.
    """
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"is not UTF-8 text ({error.reason} at byte {error.start}): save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise DataError(f"is not valid JSON ({error.msg} at column {error.colno}): write one object in each line") from None
    except RecursionError:
        raise DataError("is nested too deeply to be a record") from None
    if b"\\ud" in line.lower():  # escapes of surrogates, which should come in pairs
        try:
            json.dumps(record, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise DataError("has half a surrogate pair, so that its text is not valid Unicode: repair it") from None
    if not isinstance(record, dict):
        raise DataError(f"holds {_describe(record)} where a record, a JSON object, should be: write one object in each line")
    return record


def picture_size(path):
    """(width, height) of a picture in pixels from its header alone, or None where that cannot be read."""
    try:
        source = io.BytesIO(path.read()) if hasattr(path, "read") else path  # at an address, or in a shard
        with Image.open(source, formats=picture_formats()) as image:
            return image.size
    # A damaged header may raise anything; whoever loads the whole picture says what is wrong.
    except Exception:
        return None


class _List:
    """The records of a file that holds one list of them."""

    def __init__(self, path):
        self.path = path
        self._spans = _index_list(path)

    def __len__(self):
        return len(self._spans)

    def where(self, number):
        """(path, number of the record from 1)."""
        return self.path, number + 1

    def record(self, number, parse, root):
        """The record of that number."""
        offset, length = map(int, self._spans[number])
        with open(self.path, "rb") as file:
            file.seek(offset)
            return parse(file.read(length), root)

    def stamp(self):
        """What tells this file from others, and from itself at another time."""
        status = os.stat(self.path)
        return [os.path.abspath(self.path), status.st_size, status.st_mtime_ns]


def _index_list(path):
    """Offsets and lengths of the records of a file that holds one list of them, int64 ``[N, 2]``."""
    try:
        with open(path, "rb") as file:
            content = file.read()
    except OSError as error:
        raise DataError(f"annotation file {path} cannot be read ({error.strerror}): check the path") from None
    # Every byte as one character, so that a place in the text is one in the file; nothing outside of ASCII has a meaning in
    # JSON but to be part of a text.
    text, decoder = content.decode("latin-1"), json.JSONDecoder()
    blank = re.compile(r"[ \t\r\n]*")
    at = blank.match(text, 3 if content.startswith(b"\xef\xbb\xbf") else 0).end()
    if text[at : at + 1] != "[":
        raise DataError(f"annotation file {path} holds no list: it must be [record, ...], or end in .jsonl with one a line")
    spans, at = [], blank.match(text, at + 1).end()
    while text[at : at + 1] not in ("]", ""):
        try:
            _, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise DataError(f"annotation file {path} is not valid JSON in record {len(spans) + 1} ({error})") from None
        spans.append((at, end - at))
        at = blank.match(text, end).end()
        if text[at : at + 1] == ",":
            at = blank.match(text, at + 1).end()
        elif text[at : at + 1] != "]":
            raise DataError(f"annotation file {path} is cut short or not valid JSON behind record {len(spans)}: copy it again")
    if not text[at:]:
        raise DataError(f"annotation file {path} is cut short behind record {len(spans)}: copy it again")
    return np.array(spans, dtype=np.int64).reshape([-1, 2])


def _unique_keys(path, pairs):
    keys = [key for key, _ in pairs]
    repeated = sorted({key for key in keys if keys.count(key) > 1})
    if repeated:
        raise DataError(f"meta file {path} has {shown(repeated[0])} twice: the first one would be lost, so rename it")
    return dict(pairs)


def _source(name, entry, path, parse=None, draw=None):
    where = f"data set {shown(name)} of meta file {path}"
    if not isinstance(entry, dict):
        raise DataError(f"{where} must be an object with 'root' and 'annotation', not {_describe(entry)}")
    unknown = sorted(set(entry) - set(_KEYS))
    if unknown:
        raise DataError(f"{where} has an unknown key {shown(unknown[0])}: the keys are {', '.join(_KEYS)}")
    if "shards" in entry and "annotation" in entry:
        raise DataError(f"{where} has both 'shards' and 'annotation': name one of them")
    annotation, root = entry.get("annotation", entry.get("shards")), entry.get("root", "")
    key, endings = "annotation", (".jsonl", ".json") if parse else (".jsonl",)
    if "shards" in entry:
        key, endings = "shards", (".tar",)
    if not isinstance(annotation, str) or not annotation.endswith(endings):
        raise DataError(f"{where} needs {_a(key)} that ends in {' or '.join(endings)}, not {_describe(annotation)}")
    if not isinstance(root, str):
        raise DataError(f"{where}: 'root' must be the path of a folder, not {_describe(root)}")
    augment = entry.get("data_augment", False)
    if not isinstance(augment, bool):
        raise DataError(f"{where}: 'data_augment' must be true or false, not {_describe(augment)}")
    repeat = entry.get("repeat_time", 1)
    if isinstance(repeat, bool) or not isinstance(repeat, (int, float)) or not repeat > 0 or (repeat > 1 and repeat % 1):
        raise DataError(
            f"{where}: 'repeat_time' must be a whole number, or between 0 and 1 for a part of the records, "
            f"not {_describe(repeat)}"
        )
    patches = entry.get("max_dynamic_patch")
    if patches is not None and not _is_count(patches):
        raise DataError(f"{where}: 'max_dynamic_patch' must be a positive whole number, not {_describe(patches)}")
    folder = os.path.dirname(os.path.abspath(path))
    annotation = _resolve(annotation, folder, expand(annotation)[0] if key == "shards" else annotation)
    return Source(name, _resolve(root, folder), annotation, augment, repeat, entry.get("length"), patches, parse, draw)


def _a(key):
    return f"{'an' if key == 'annotation' else 'a pattern of'} '{key}'"


def _resolve(path, folder, example=None):
    """``path``, or the same in ``folder`` where only that exists; an ``example`` may stand for it."""
    example = example or path
    there = not os.path.exists(example) and os.path.exists(os.path.join(folder, example))
    return os.path.join(folder, path) if there else path


def _from_messages(record):
    """A record in messages form, as other trainers read it, in the form of conversations."""
    extra = next((key for key in ("conversations", "image", "video") if key in record), None)
    if extra:
        raise DataError(f"has both 'messages' and '{extra}': with messages, pictures are 'images' and a video is in 'videos'")
    messages = record["messages"]
    if not isinstance(messages, list) or not messages:
        raise DataError("needs 'messages', a list of messages with 'role' and 'content'")
    named = {"image": [], "video": []}
    turns = []
    for i, message in enumerate(messages):
        role = message.get("role") if isinstance(message, dict) else None
        if not isinstance(role, str) or role not in _MESSAGE_ROLES:
            raise DataError(f"message {i + 1} must have 'role' (one of {', '.join(_MESSAGE_ROLES)}) and 'content'")
        turns.append({"from": _MESSAGE_ROLES[role], "value": _content(message.get("content"), i, named)})
    for kind, key in (("image", "images"), ("video", "videos")):
        paths = _paths(record.get(key), key)
        if paths and named[kind]:
            raise DataError(f"names {kind}s both in '{key}' and in its messages: name each once")
        named[kind] = paths or named[kind]
    if len(named["video"]) > 1:
        raise DataError(f"has {len(named['video'])} videos: a sample can hold one video")
    return {**record, "conversations": turns, "image": named["image"], "video": (named["video"] or [None])[0]}


def _content(content, number, named):
    """The text of a message with marks for its pictures; paths that its parts name join those ``named``."""
    parts = [content] if isinstance(content, str) else content
    if not isinstance(parts, list):
        raise DataError(f"message {number + 1} needs 'content', a text or a list of parts")
    texts = []
    for part in parts:
        kind = "text" if isinstance(part, str) else part.get("type") if isinstance(part, dict) else None
        text = part if isinstance(part, str) else part.get("text") if kind == "text" else None
        if isinstance(text, str):
            texts.append(text)
        elif kind in list(named):  # also where it is no text
            texts.append({"image": IMAGE_PLACEHOLDER, "video": VIDEO_PLACEHOLDER}[kind])
            path = next((part[key] for key in (kind, "path") if part.get(key)), None)
            if path is not None:
                named[kind] += _paths([path], f"message {number + 1}")
        else:
            raise DataError(f"message {number + 1} has a part that is not of type text, image or video: {_describe(part)}")
    return "".join(texts)


def _paths(values, key):
    values = [values] if isinstance(values, str) else values or []
    if not isinstance(values, list) or not all(isinstance(value, str) and value for value in values):
        raise DataError(f"'{key}' must be a list of paths")
    return values


def _conversations(turns):
    if not isinstance(turns, list) or not turns:
        raise DataError("needs 'conversations', a list of turns with 'from' and 'value'")
    for i, turn in enumerate(turns):
        if not isinstance(turn, dict) or turn.get("from") not in _ROLES or not isinstance(turn.get("value"), str):
            raise DataError(f"turn {i + 1} must have 'from' (one of {', '.join(_ROLES)}) and 'value', a text")
        if IMG_CONTEXT in turn["value"]:
            raise DataError(f"turn {i + 1} contains the reserved token {IMG_CONTEXT}: write <image> where a picture goes")
    if not any(turn["from"] == "gpt" and turn["value"].strip() for turn in turns):
        raise DataError("has no answer to learn: every 'gpt' turn is missing or empty")
    return turns


def image_paths(record, root):
    """Paths of the pictures that a record names, a tuple; ``root`` is the folder that they are relative to."""
    return tuple(_path(root, image) for image in _images(record.get("image")))


def _images(images):
    images = [images] if isinstance(images, str) and images else images or []
    if not isinstance(images, list) or not all(isinstance(image, str) and image for image in images):
        raise DataError("'image' must be a path or a list of paths")
    return images


def _check_marks(turns, images, video):
    marks = sum(turn["value"].count(IMAGE_PLACEHOLDER) for turn in turns if turn["from"] == "human")
    if video:
        if marks:
            raise DataError(f"has {IMAGE_PLACEHOLDER} but a video: mark the place of the video with {VIDEO_PLACEHOLDER}")
        if sum(turn["value"].count(VIDEO_PLACEHOLDER) for turn in turns if turn["from"] == "human") > 1:
            raise DataError(f"has {VIDEO_PLACEHOLDER} more than once: a sample can hold one video")
    elif marks != images and not (images == 1 and marks == 0):
        raise DataError(
            f"has {marks} {IMAGE_PLACEHOLDER} mark(s) but {images} picture(s): write one {IMAGE_PLACEHOLDER} for each picture"
        )


def _path(root, path):
    path = path if is_address(path) else os.path.join(root, path)
    return Remote(path) if is_address(path) else path


def _clip(clip):
    if clip is None:
        return None
    numbers = isinstance(clip, list) and len(clip) == 2 and all(type(x) in (int, float) for x in clip)
    if not numbers or not 0 <= clip[0] < clip[1]:
        raise DataError(f"'clip' must be [start, end] in seconds with 0 <= start < end, not {_describe(clip)}")
    return tuple(clip)


def _sizes(record, images):
    """Sizes where they are stated for every picture; they only save reading headers, so other forms are passed over."""
    widths, heights = (record.get(key + "_list", record.get(key)) for key in ("width", "height"))
    widths, heights = (x if isinstance(x, list) else [x] for x in (widths, heights))
    if not len(widths) == len(heights) == images or not all(map(_is_count, widths + heights)):
        return None
    return tuple(zip(widths, heights))


def _is_count(value):
    return type(value) is int and value > 0


def _describe(value):
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
