"""Records and their pictures in tar files: ``KEY.json`` beside ``KEY.jpg``, ``.png``, ``.webp`` or ``.mp4``.

10^8 pictures are too many to be single files. An index of offsets, one JSON line a record, is written once for all shards of a
data set; a record and its pictures are then read from their places, without unpacking anything. What belongs together is told
by its key alone, so that a shard that was cut short loses its last records and never gives one the picture of another.
"""

import dataclasses
import hashlib
import itertools
import json
import os
import re
import tarfile

from paddlemix.errors import DataError
from paddlemix.files import check_regular, open_regular
from paddlemix.processors import media

from .lines import LineIndex, index_places, write_index

PICTURES, CLIPS = ("jpg", "jpeg", "png", "webp"), ("mp4",)
_MOST = 1 << 30  # bytes of a member
_BLOCK = 512  # of a tar file
_SEVERAL = re.compile(r"\{(\d+)\.\.(\d+)\}")


def expand(pattern):
    """Paths that ``p/{000..999}.tar`` stands for; numbers keep their leading zeros, and several braces all combinations.

    Raises:
        DataError: a range runs backwards, or there are more than a million.
    """
    parts = _SEVERAL.split(pattern)  # text, first, last, text, first, last, ..., text
    ranges = []
    for first, last in zip(parts[1::3], parts[2::3]):
        if int(first) > int(last) or int(last) - int(first) >= 10**6:
            raise DataError(f"{{{first}..{last}}} in {pattern} is no range of shards: write the smaller number first")
        ranges.append([str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)])
    texts = parts[::3]
    return [
        "".join(itertools.chain(*itertools.zip_longest(texts, numbers, fillvalue=""))) for numbers in itertools.product(*ranges)
    ]


class Member:
    """A file inside a shard; ``open_image`` takes it as it takes an opened file."""

    def __init__(self, shard, name, offset, size):
        self.shard, self.member, self.offset, self.size = shard, name, offset, size
        self.name = f"{shard}:{name}"

    def read(self):
        """Its bytes.

        Raises:
            DataError: the shard is gone, or shorter than it was.
        """
        try:
            with open_regular(self.shard) as file:
                file.seek(self.offset)
                content = file.read(self.size)
        except OSError as error:
            raise DataError(f"{self.shard} cannot be read any more: {error.strerror}") from None
        if len(content) != self.size:
            raise DataError(f"{self.name} is cut short: copy the shard again")
        return content

    def __str__(self):
        return self.name


def on_disk(source):
    """Path of a file that holds ``source``: itself, or for a :class:`Member` one that is there within the block."""
    return media.on_disk(source.read() if isinstance(source, Member) else source)


class Shards:
    """The records of several tar files, one after the other; ``len()`` of them. What cannot be used counts as one.

    Args:
        paths: of the tar files, in order.

    Raises:
        DataError: a file is missing or no plain tar file.
    """

    def __init__(self, paths):
        self.paths = list(paths)
        self._known = []
        for path in self.paths:
            try:
                status = check_regular(path)
            except (OSError, ValueError) as error:
                reason = getattr(error, "strerror", None) or error
                raise DataError(f"shard {path} cannot be read ({reason}): check the meta file") from None
            self._known.append((os.path.abspath(path), status.st_size, status.st_mtime_ns))
        self._index = LineIndex(self._file())

    def __len__(self):
        return len(self._index)

    def stamp(self):
        """What tells these records from others."""
        return self._known

    def where(self, number):
        """(path of the shard, number of the record in it from 1)."""
        entry = self._entry(number)
        return self.paths[entry[0]], entry[1]

    def record(self, number, parse, root):
        """The record of that number, with :class:`Member` objects for its pictures or its video.

        Args:
            number: counted over all shards.
            parse: makes a record of its bytes and a folder.
            root: unused: pictures are in the shard.

        Raises:
            DataError: it cannot be used; the message names its key.
        """
        shard, _, key, damage, record, media = self._entry(number)
        if damage:
            raise DataError(damage)
        path = self.paths[shard]
        members = {name: Member(path, name, offset, size) for name, offset, size in media}
        try:
            return _attach(Member(path, f"{key}.json", *record).read(), members, parse)
        except DataError as error:
            raise DataError(f"{key}: {error}") from None

    def _entry(self, number):
        return json.loads(self._index.read(number))

    def _file(self):
        """Path of the index, which is written if it is not there: beside the first shard, or in the user's cache folder."""
        stamp = hashlib.sha256(repr(self._known).encode("utf-8", "surrogateescape")).hexdigest()[:16]
        places = index_places(self.paths[0], f"{stamp}.jsonl")
        place = next(filter(os.path.exists, places), None) or write_index(places, self._write)
        if place is None:
            raise DataError(f"the index of shards can be written neither to {places[0]} nor to {places[1]}: make one writable")
        return place

    def _write(self, file):
        for number, path in enumerate(self.paths):
            file.writelines(json.dumps(entry).encode() + b"\n" for entry in _entries(number, path))


def _entries(number, path):
    """Lines of the index for a shard: [shard, number in it, key, what is wrong or None, place of the record, pictures]."""
    groups, wrong = {}, {}
    size = os.path.getsize(path)
    last, end = None, 0
    cut = None
    try:
        with open_regular(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            while member := tar.next():
                tar.members = []  # which would grow with the shard
                end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
                if not member.isfile():
                    continue
                folder, name = os.path.split(member.name)
                stem, _, ending = name.partition(".")
                last = os.path.join(folder, stem)
                if member.issparse() or member.size > _MOST:
                    wrong[last] = f"{member.name} is sparse or larger than {_MOST >> 30} GB: pack it as a plain file"
                groups.setdefault(last, {})[ending.lower()] = (member.name, member.offset_data, member.size)
                if member.offset_data + member.size > size:
                    cut = f"{path} is cut short within {member.name}: copy it again"
                    break
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
        if last is None:
            raise DataError(f"shard {path} is no plain tar file ({error}): it must not be compressed") from None
        cut = f"{path} is damaged behind {last} ({error}): copy it again"
    if cut is None and not _ends(path, end):
        cut = f"{path} ends without the mark of an end, behind {last}: it may be cut short, so pack or copy it again"
    if cut:
        if last is None:
            groups[""] = {}
        wrong[last or ""] = cut
    for position, (key, members) in enumerate(groups.items(), start=1):
        record = members.pop("json", None)
        damage = wrong.get(key)
        if damage is None and record is None:
            damage = f"{key} has no {key}.json in {path}: it is no record"
        media = [value for ending, value in members.items() if ending.rpartition(".")[2] in PICTURES + CLIPS]
        yield [number, position, key, damage, record and record[1:], media]


def _ends(path, end):
    """Whether a block of zeros follows the last member."""
    with open_regular(path) as file:
        file.seek(end)
        block = file.read(_BLOCK)
    return len(block) == _BLOCK and not any(block)


def _attach(content, members, parse):
    """The record in ``content`` whose pictures are ``members``."""
    try:
        values = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        values = None  # parse says what is wrong
    if isinstance(values, dict):
        content = json.dumps(_with_names(values, members)).encode()
    record = parse(content, "")
    changes = {"images": tuple(_find(name, record.images, members, PICTURES) for name in record.images)}
    if record.video:
        changes["video"] = _find(record.video, (record.video,), members, CLIPS)
    return dataclasses.replace(record, **changes)


def _with_names(values, members):
    """``values`` that name pictures or a video: their own, or else all that are there."""
    if any(values.get(key) for key in ("image", "images", "video", "videos")) or not members:
        return values
    pictures = [name for name in members if name.lower().endswith(PICTURES)]
    clips = [name for name in members if name.lower().endswith(CLIPS)]
    several = "messages" in values or "prompt" in values
    if pictures:
        return {**values, "images": pictures} if several else {**values, "image": pictures}
    return {**values, "videos": clips} if several else {**values, "video": clips[0]}


def _find(name, named, members, endings):
    """The member that a record calls ``name``; with one name and one member of the kind, they need not be alike."""
    own = {os.path.basename(member): value for member, value in members.items() if member.lower().endswith(endings)}
    found = own.get(os.path.basename(name))
    if found is None and len(named) == len(own) == 1:
        (found,) = own.values()
    if found is None:
        raise DataError(f"names '{name}', which is not beside it in the shard; there is {', '.join(own) or 'nothing'}")
    return found
