"""Pictures from where users have them."""

import base64
import io
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image, features

from paddlemix.errors import ImageError
from paddlemix.processors.image import load_image, open_image
from paddlemix.processors.media import MOST_BYTES, read_picture_bytes
from tests.conftest import REFERENCE

PICTURE = (REFERENCE / "images" / "img0.png").read_bytes()


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        hops = int(self.path[2:]) if self.path.startswith("/r") else 0
        if hops or self.path == "/file":
            self.send_response(302)
            self.send_header("Location", f"/r{hops - 1}" if hops else "file:///etc/passwd")
            self.end_headers()
            return
        self.send_response(404 if self.path == "/none" else 200)
        self.end_headers()
        self.wfile.write(PICTURE if self.path != "/large" else b"0" * (MOST_BYTES + 1))

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_every_source_is_the_same_picture(server):
    expected = load_image(PICTURE, input_size=56)
    array = np.asarray(Image.open(io.BytesIO(PICTURE)))
    encoded = "data:image/png;base64," + base64.b64encode(PICTURE).decode()
    for source in (f"{server}/a.png", f"{server}/r4", encoded, array, Image.open(io.BytesIO(PICTURE))):
        assert np.array_equal(load_image(source, input_size=56), expected)


@pytest.mark.parametrize(
    "path, told",
    [("/none", "HTTP 404"), ("/large", "more than 32 MB"), ("/r9", "redirects more than 5"), ("/file", "HTTP 302")],
)
def test_addresses_that_give_nothing_are_one_sentence(server, path, told):
    with pytest.raises(ImageError, match=told):
        load_image(server + path)


@pytest.mark.parametrize("source", ["data:image/png;base64", "data:image/png;base64,a", "http://", "http://127.0.0.1:1/a.png"])
def test_addresses_that_are_none_are_one_sentence(source):
    with pytest.raises(ImageError):
        read_picture_bytes(source)


def test_opening_for_data_sets_fetches_nothing(server):
    with pytest.raises(ImageError, match="does not exist"):
        open_image(f"{server}/a.png")


def test_arrays_that_are_no_pictures_are_refused():
    for array in (np.zeros([4, 4, 3]), np.zeros([3, 4, 5], "uint8"), np.zeros([4], "uint8")):
        with pytest.raises(ImageError, match="uint8"):
            open_image(array)


def test_transparent_pictures_are_laid_on_a_colour():
    clear = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    clear.putpixel((1, 0), (0, 0, 255, 255))
    palette = io.BytesIO()
    clear.quantize(4).save(palette, "PNG")
    for source in (clear, palette.getvalue()):
        assert open_image(source).getpixel((0, 0)) == (255, 0, 0) or source is not clear
        assert open_image(source, background="white").getpixel((0, 0)) == (255, 255, 255)
        assert open_image(source, background="#00ff00").getpixel((0, 0)) == (0, 255, 0)
        assert open_image(source, background="white").getpixel((1, 0)) == (0, 0, 255)
    with pytest.raises(ImageError, match="no colour"):
        open_image(clear, background="whitish")


def phone_picture(image, orientation=1):
    """The bytes of a HEIC file, as a phone writes them."""
    heif = pytest.importorskip("pillow_heif")
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.info["exif"] = exif.tobytes()
    buffer = io.BytesIO()
    heif.from_pillow(image).save(buffer, quality=95)
    assert buffer.getvalue()[4:12] == b"ftypheic"
    return buffer.getvalue()


def test_a_phones_picture_is_read_and_stands_upright(tmp_path):
    image = Image.open(io.BytesIO(PICTURE)).convert("RGB")
    (tmp_path / "a.heic").write_bytes(data := phone_picture(image.copy()))
    for source in (data, tmp_path / "a.heic", str(tmp_path / "a.heic")):
        opened = open_image(source)
        assert opened.size == image.size and opened.mode == "RGB"
        assert np.abs(np.asarray(opened, int) - np.asarray(image, int)).mean() < 3  # its compression loses so much
    assert load_image(data, input_size=56).shape == load_image(PICTURE, input_size=56).shape
    clear = image.convert("RGBA")
    clear.putalpha(0)
    assert open_image(phone_picture(clear), background="white").getextrema() == ((255, 255),) * 3


def test_half_a_phones_picture_is_one_sentence():
    data = phone_picture(Image.open(io.BytesIO(PICTURE)).convert("RGB"))
    for length in (20, 100, len(data) // 2, len(data) - 50):
        with pytest.raises(ImageError, match="damaged"):
            open_image(data[:length])


def test_a_phones_format_is_named_where_nothing_reads_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # as where it is not installed
    with pytest.raises(ImageError, match=r"HEIC or HEIF, which needs pillow-heif: pip install 'paddlemix\[heif\]'"):
        open_image(b"\0\0\0\x18ftypheic" + bytes(40))


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
def test_avif_is_read_by_pillow():
    image, buffer = Image.open(io.BytesIO(PICTURE)).convert("RGB"), io.BytesIO()
    image.save(buffer, "AVIF", quality=95)
    opened = open_image(buffer.getvalue())
    assert opened.size == image.size and np.abs(np.asarray(opened, int) - np.asarray(image, int)).mean() < 3
