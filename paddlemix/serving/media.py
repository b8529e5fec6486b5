"""Pictures and clips from outside: data URLs always, other places only as far as the operator allows."""

import base64
import binascii
import hashlib
import io
import os
import re
import stat
import tempfile
import threading
import urllib.parse
from dataclasses import dataclass

import numpy as np

from paddlemix.errors import ImageError, VideoError
from paddlemix.processors.kept import Kept
from paddlemix.processors.media import NotFetched, fetch_allowed

from .protocol import RequestError

__all__ = ["Media", "MediaRules"]

_DATA = re.compile(r"data:(image|video)/[\w.+-]*((?:;[\w.+=-]*)*),", re.A | re.I)
_MAX_PIXELS = 64_000_000  # of a picture from outside: more than any tiling uses, and 200 MB decoded
_KEPT = 32 << 20  # bytes of tiles: a conversation sends its pictures again with every question
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "MPO")


@dataclass(frozen=True)
class MediaRules:
    """What the operator allows."""

    domains: tuple = ()
    private: bool = False
    local: str | None = None
    timeout: float = 10
    max_bytes: int = 32 << 20
    max_num: int | None = None


class Media:
    """Reads media as a checkpoint wants them.

    Args:
        family: how its pictures are read, such as :class:`~.families.InternVL2`.
        rules: :class:`MediaRules`.
    """

    def __init__(self, family, rules):
        self.family, self.rules = family, rules
        self._read_before, self._lock = Kept(_KEPT), threading.Lock()

    def picture(self, url, detail=None, max_num=None):
        """(digest, tiles ``[T, 3, H, W]``, what else the family needs of it) of a picture.

        Raises:
            RequestError: it is not allowed, cannot be had, or is no picture.
        """
        data, limit = self._read(url, "image"), self.rules.max_num or self.family.most_tiles
        most, low = min(max_num or limit, limit), detail == "low"
        key = hashlib.blake2b(data, digest_size=16).digest(), most, low
        with self._lock:
            found = self._read_before.get(key)
        if found is not None:
            return found
        try:
            self._check(data)
            tiles, extra = self.family.read(data, most, low)
        except ImageError as error:
            raise RequestError(f"the picture cannot be used: {_without_inside(error)}", param="messages") from None
        found = _digest(tiles), tiles, extra
        with self._lock:
            self._read_before.put(key, found, tiles.nbytes)
        return found

    def frames(self, url):
        """The same for each frame of a clip, a list."""
        data, path = self._read(url, "video"), None
        try:
            with tempfile.NamedTemporaryFile(prefix="paddlemix-clip-", delete=False) as file:  # readable by us alone
                path = file.name
                file.write(data)
            pixels, counts = self.family.read_clip(path)
        except (VideoError, ImageError) as error:
            text = _without_inside(error).replace(path or "", "the clip")
            raise RequestError(f"the clip cannot be used: {text}", param="messages") from None
        finally:
            if path:
                os.unlink(path)
        edges = np.cumsum([0, *counts])
        return [(_digest(pixels[a:b]), pixels[a:b], None) for a, b in zip(edges, edges[1:])]

    def _check(self, data):
        """Format and size from the header, before anything is decoded."""
        from PIL import Image

        try:
            with Image.open(io.BytesIO(data), formats=_FORMATS) as opened:
                width, height = opened.size
        except Image.DecompressionBombError:
            raise ImageError(f"it has more than {_MAX_PIXELS} pixels; make it smaller") from None
        except Exception:  # a damaged header may raise anything
            raise ImageError("it is not a PNG, JPEG, WebP, GIF, BMP or TIFF") from None
        if width * height > _MAX_PIXELS:
            raise ImageError(f"it has {width}x{height} pixels, more than {_MAX_PIXELS}; make it smaller")

    def _read(self, url, kind):
        if url[:5].lower() == "data:":
            return self._decode(url, kind)
        scheme = url.partition(":")[0].lower()
        if scheme == "file":
            return self._local(url)
        if scheme in ("http", "https"):
            return self._fetch(url)
        raise RequestError(
            f"a {kind}'s url must be a data URL, or http(s) or file where the server allows it", param="messages"
        )

    def _decode(self, url, kind):
        match = _DATA.match(url[:200])
        if not match or match[1].lower() != kind or ";base64" not in match[2].lower():
            raise RequestError(f"a data URL of a {kind} must begin with data:{kind}/...;base64,", param="messages")
        if (len(url) - match.end()) * 3 // 4 > self.rules.max_bytes:
            raise RequestError(f"the {kind} is larger than {self.rules.max_bytes >> 20} MB", param="messages")
        try:
            return base64.b64decode(url[match.end() :].encode("ascii"), validate=True)
        except (binascii.Error, ValueError):
            raise RequestError(f"the data URL of a {kind} is not valid base64", param="messages") from None

    def _local(self, url):
        refused = RequestError("this server reads no such local file", param="messages")
        if self.rules.local is None:
            raise RequestError("this server reads no local files: send a data URL", param="messages")
        parts = urllib.parse.urlsplit(url)
        path = os.path.realpath(urllib.parse.unquote(parts.path).replace("\0", ""))
        root = os.path.realpath(self.rules.local)
        if parts.netloc not in ("", "localhost") or os.path.commonpath([root, path]) != root:
            raise refused
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
        except OSError:
            raise refused from None
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            os.close(descriptor)
            raise refused
        with os.fdopen(descriptor, "rb") as file:
            if status.st_size > self.rules.max_bytes:
                raise RequestError(f"the file is larger than {self.rules.max_bytes >> 20} MB", param="messages")
            return file.read(self.rules.max_bytes + 1)

    def _fetch(self, url):
        rules = self.rules
        if not rules.domains:
            raise RequestError("this server fetches nothing: send a data URL", param="messages")
        try:
            return fetch_allowed(url, rules.domains, rules.private, rules.timeout, rules.max_bytes)
        except NotFetched as error:
            raise RequestError(f"the url is not fetched: {error.reason}", param="messages") from None


def _digest(tiles):
    return hashlib.blake2b(np.ascontiguousarray(tiles), digest_size=16).digest()


def _without_inside(error):
    """The sentence without what Pillow says of objects in memory."""
    return re.sub(r"<[^>]*object at [^>]*>|BytesIO\S*", "it", str(error))[:200]
