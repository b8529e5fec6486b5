"""Pictures from where users have them: a file, a URL, a data URL, standard input; and the way up that a phone noted.

Nothing is fetched that a user did not name: records and meta files never come here.
"""

import base64
import binascii
import sys
import time
import urllib.error
import urllib.request
from urllib.parse import urlsplit

from PIL import Image

from paddlemix.errors import ImageError

MOST_BYTES = 32 << 20
MOST_SECONDS = 10
MOST_REDIRECTS = 5


def is_address(source):
    """Whether a text names a picture somewhere else than in a file."""
    return isinstance(source, str) and source.lower().startswith(("http://", "https://", "data:"))


def read_picture_bytes(source):
    """The bytes of a picture that a user named.

    Args:
        source: ``https://...``, ``http://...``, ``data:...`` or ``-`` for standard input.

    Raises:
        ImageError: it cannot be had within 32 MB, 10 seconds and 5 redirects; or the address makes no sense.
    """
    if source == "-":
        data = sys.stdin.buffer.read(MOST_BYTES + 1)
        return _bounded(data, "standard input")
    if source.lower().startswith("data:"):
        return _decode(source)
    return _fetch(source)


def _decode(source):
    head, comma, body = source.partition(",")
    if not comma or len(body) > MOST_BYTES * 3 // 2:
        raise ImageError("the data: URL has no comma before its data, or is larger than 32 MB: give the picture as a file")
    try:
        if head.lower().endswith(";base64"):
            return base64.b64decode("".join(body.split()), validate=True)
        return urllib.request.unquote_to_bytes(body)
    except (binascii.Error, ValueError) as error:
        raise ImageError(f"the data: URL is not valid base64 ({error}): encode the picture again") from None


class _Redirects(urllib.request.HTTPRedirectHandler):
    max_redirections = MOST_REDIRECTS
    max_repeats = MOST_REDIRECTS

    def redirect_request(self, request, file, code, message, headers, url):
        if not url.lower().startswith(("http://", "https://")):
            raise ImageError(f"{_short(request.full_url)} leads to {_short(url)}, which is no web address: use another")
        return super().redirect_request(request, file, code, message, headers, url)


def _fetch(url):
    name = _short(url)
    try:
        if not urlsplit(url).hostname:
            raise ValueError("it names no host")
        until = time.monotonic() + MOST_SECONDS
        opener = urllib.request.build_opener(_Redirects)
        with opener.open(urllib.request.Request(url, headers={"User-Agent": "paddlemix"}), timeout=MOST_SECONDS) as answer:
            data = bytearray()
            while chunk := answer.read1(1 << 16):
                data += chunk
                if len(data) > MOST_BYTES:
                    break
                if time.monotonic() > until:
                    raise TimeoutError
        return _bounded(bytes(data), name)
    except ImageError:
        raise
    except urllib.error.HTTPError as error:
        endless = "infinite" in str(error.msg).lower()
        reason = f"it redirects more than {MOST_REDIRECTS} times" if endless else f"HTTP {error.code}"
        raise ImageError(f"{name} cannot be fetched ({reason}): check the address") from None
    except TimeoutError:
        raise ImageError(f"{name} did not come within {MOST_SECONDS} seconds: download it and give the file") from None
    # http.client and ssl add exceptions of their own to these.
    except Exception as error:
        cause = getattr(error, "reason", error)
        if isinstance(cause, TimeoutError):
            raise ImageError(f"{name} did not come within {MOST_SECONDS} seconds: download it and give the file") from None
        raise ImageError(f"{name} cannot be fetched ({cause}): check the address, or download it and give the file") from None


def _bounded(data, name):
    if len(data) > MOST_BYTES:
        raise ImageError(f"{name} has more than {MOST_BYTES >> 20} MB: make the picture smaller")
    return data


def _short(url):
    return url if len(url) <= 100 else url[:97] + "..."


def is_transparent(image):
    """Whether a PIL image can have pixels that are not opaque."""
    return image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info


def lay_on(image, background):
    """A picture with transparency laid on a colour, as RGB; others as they are.

    Args:
        image: PIL image.
        background: name of a colour or ``#rrggbb``.

    Raises:
        ImageError: there is no such colour.
    """
    if not is_transparent(image):
        return image
    try:
        ground = Image.new("RGBA", image.size, background)
    except ValueError:
        raise ImageError(f"the background {background!r} is no colour: use a name such as white, or #rrggbb") from None
    if image.mode in ("La", "RGBa"):
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    return Image.alpha_composite(ground, image.convert("RGBA")).convert("RGB")
