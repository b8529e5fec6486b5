"""Pictures from where users have them: a file, a URL, a data URL, standard input; and the way up that a phone noted.

Two ways lead to the network. :func:`read_picture_bytes` fetches an address that a user typed. What stands in a record, a row or
a request of somebody else is fetched by :func:`fetch_allowed` alone, from hosts that the user or operator named.
"""

import base64
import binascii
import contextlib
import http.client
import ipaddress
import socket
import ssl
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from urllib.parse import urljoin, urlsplit, urlunsplit

from PIL import Image

from paddlemix.errors import ImageError, VideoError

MOST_BYTES = 32 << 20
MOST_SECONDS = 10
CLIP_BYTES, CLIP_SECONDS = 512 << 20, 120
MOST_REDIRECTS = 5


def is_address(source):
    """Whether a text names a picture somewhere else than in a file."""
    return isinstance(source, str) and source.lower().startswith(("http://", "https://", "data:"))


def read_picture_bytes(source, most_bytes=MOST_BYTES, seconds=MOST_SECONDS):
    """The bytes of a picture, or a clip, that a user named.

    Args:
        source: ``https://...``, ``http://...``, ``data:...`` or ``-`` for standard input.
        most_bytes, seconds: that it may have, and take.

    Raises:
        ImageError: it cannot be had within these bounds and 5 redirects; or the address makes no sense.
    """
    if source == "-":
        return _bounded(sys.stdin.buffer.read(most_bytes + 1), "standard input", most_bytes)
    if source.lower().startswith("data:"):
        return _decode(source, most_bytes)
    return _fetch(source, most_bytes, seconds)


def named_sources(paths, clips=False):
    """Sources that a user named for a command: those at addresses and standard input as bytes, files as they are.

    Args:
        paths: list of texts.
        clips: whether they are clips, which may be larger and slower than pictures.
    """
    bounds = (CLIP_BYTES, CLIP_SECONDS) if clips else ()
    return [
        read_picture_bytes(path, *bounds) if is_address(path) or (isinstance(path, str) and path == "-") else path
        for path in paths
    ]


@contextlib.contextmanager
def on_disk(clip):
    """The path of a clip for as long as it is entered: bytes go into a file that nobody else can read, gone afterwards."""
    if not isinstance(clip, bytes):
        yield clip
        return
    with tempfile.NamedTemporaryFile(prefix="paddlemix-clip-") as file:
        file.write(clip)
        file.flush()
        try:
            yield file.name
        except VideoError as error:
            raise VideoError(str(error).replace(f"video {file.name!r}", "the given video")) from None


def _decode(source, most_bytes=MOST_BYTES):
    head, comma, body = source.partition(",")
    if not comma or len(body) > most_bytes * 3 // 2:
        raise ImageError(
            f"the data: URL has no comma before its data, or is larger than {most_bytes >> 20} MB: give it as a file"
        )
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


def _fetch(url, most_bytes, seconds):
    name = _short(url)
    try:
        if not urlsplit(url).hostname:
            raise ValueError("it names no host")
        until = time.monotonic() + seconds
        opener = urllib.request.build_opener(_Redirects)
        with opener.open(urllib.request.Request(url, headers={"User-Agent": "paddlemix"}), timeout=seconds) as answer:
            data = bytearray()
            while chunk := answer.read1(1 << 16):
                data += chunk
                if len(data) > most_bytes:
                    break
                if time.monotonic() > until:
                    raise TimeoutError
        return _bounded(bytes(data), name, most_bytes)
    except ImageError:
        raise
    except urllib.error.HTTPError as error:
        endless = "infinite" in str(error.msg).lower()
        reason = f"it redirects more than {MOST_REDIRECTS} times" if endless else f"HTTP {error.code}"
        raise ImageError(f"{name} cannot be fetched ({reason}): check the address") from None
    except TimeoutError:
        raise ImageError(f"{name} did not come within {seconds} seconds: download it and give the file") from None
    # http.client and ssl add exceptions of their own to these.
    except Exception as error:
        cause = getattr(error, "reason", error)
        if isinstance(cause, TimeoutError):
            raise ImageError(f"{name} did not come within {seconds} seconds: download it and give the file") from None
        raise ImageError(f"{name} cannot be fetched ({cause}): check the address, or download it and give the file") from None


class NotFetched(ImageError):
    """Why an address gave nothing: ``reason`` is a clause without the address."""

    def __init__(self, url, reason):
        self.reason = reason
        super().__init__(f"{_short(url)} is not fetched: {reason}")


def fetch_allowed(url, domains, private=False, seconds=MOST_SECONDS, most_bytes=MOST_BYTES):
    """The bytes at an address that somebody else wrote.

    Args:
        url: ``https://...`` or ``http://...``.
        domains: exact names of the hosts that may be asked, also after a redirect.
        private: whether a host may have a private, loopback or link-local address. A name is resolved once, and that
            address is used.
        seconds: for the whole transfer.
        most_bytes: that it may have.

    Raises:
        NotFetched: the host is not named, its address is private, or it does not answer as it should.
    """
    until, place, domains = time.monotonic() + seconds, url, {domain.lower() for domain in domains}
    try:
        for _ in range(MOST_REDIRECTS + 1):
            data, place = _get(url, place, domains, private, until, most_bytes)
            if data is not None:
                return data
    except NotFetched:
        raise
    except TimeoutError:
        raise NotFetched(url, "it took too long") from None
    except (OSError, http.client.HTTPException, ValueError):
        if time.monotonic() >= until:
            raise NotFetched(url, "it took too long") from None
        raise NotFetched(url, "its host cannot be reached, or does not answer as it should") from None
    raise NotFetched(url, "it redirects too often")


def _get(url, place, domains, private, until, most_bytes):
    """One request: (data, None), or (None, where it is redirected to)."""
    parts = urlsplit(place)
    host = (parts.hostname or "").lower()
    if parts.scheme not in ("http", "https") or host not in domains or parts.username:
        raise NotFetched(url, "its host is not allowed")
    secure = parts.scheme == "https"
    port = parts.port or (443 if secure else 80)
    address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][4][0]
    number = ipaddress.ip_address(address.partition("%")[0])
    number = getattr(number, "ipv4_mapped", None) or number
    if not private and (not number.is_global or number.is_multicast):
        raise NotFetched(url, "its address is a private one")

    def left():
        if (seconds := until - time.monotonic()) <= 0:
            raise TimeoutError
        return seconds

    raw = socket.create_connection((address, port), timeout=left())
    # A host that sends a byte now and then meets no timeout of single reads, which heads are made of.
    end = threading.Timer(left(), lambda: _shut(raw))
    end.daemon = True
    end.start()
    try:
        if secure:
            context = ssl.create_default_context()
            raw = context.wrap_socket(raw, server_hostname=host, do_handshake_on_connect=False)
            raw.do_handshake()
        connection = http.client.HTTPConnection(host, port)
        connection.sock = raw
        raw.settimeout(left())
        path = urlunsplit(("", "", parts.path or "/", parts.query, ""))
        connection.request("GET", path, headers={"Accept": "image/*, video/*", "User-Agent": "paddlemix"})
        response = connection.getresponse()
        if response.status in (301, 302, 303, 307, 308):
            return None, urljoin(place, response.getheader("Location") or "")
        if response.status != 200:
            raise NotFetched(url, f"it answers with status {response.status}")
        data = bytearray()
        while True:
            raw.settimeout(left())
            piece = response.read1(65536)
            if not piece:
                left()  # or it was cut
                return bytes(data), None
            data += piece
            if len(data) > most_bytes:
                raise NotFetched(url, f"it has more than {most_bytes >> 20} MB")
    finally:
        end.cancel()
        raw.close()


def _shut(connection):
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


@dataclass(frozen=True)
class Remote:
    """A picture at an address that a record or a row names: :func:`~.image.open_image` reads it as it reads a file.

    Attributes:
        url: the address.
        domains: hosts that may be asked; none by default, so that it is not fetched.
    """

    url: str
    domains: tuple = ()

    @property
    def name(self):
        """The address, for messages."""
        return _short(self.url)

    def __str__(self):
        return self.url

    def read(self):
        """The picture's bytes.

        Raises:
            ImageError: its host is not among ``domains``, or it cannot be had.
        """
        if self.url.lower().startswith("data:"):
            return _decode(self.url)
        if not self.is_allowed:
            raise ImageError(self.refusal)
        # Who names a host for data of their own may well mean one in their own network.
        return fetch_allowed(self.url, self.domains, private=True)

    @property
    def is_allowed(self):
        """Whether nothing need be fetched, or its host is one of ``domains``."""
        if self.url.lower().startswith("data:"):
            return True
        try:
            return (urlsplit(self.url).hostname or "").lower() in {domain.lower() for domain in self.domains}
        except ValueError:
            return False

    @property
    def refusal(self):
        """What to say where it is not."""
        return (
            f"'{self.name}' is not on this machine, and its host is not one of --allowed_media_domains: download it, give "
            "its path, or name the host there"
        )


def _bounded(data, name, most_bytes):
    if len(data) > most_bytes:
        raise ImageError(f"{name} has more than {most_bytes >> 20} MB: make it smaller")
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
