"""Pictures at addresses: fetched only from hosts that the user named, also after redirects."""

import base64
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from paddlemix.datasets.internvl2 import InternVLDataset, check, read_meta
from paddlemix.datasets.records import picture_size
from paddlemix.errors import DataError, ImageError
from paddlemix.processors.media import NotFetched, Remote, fetch_allowed
from tests.conftest import REFERENCE
from tests.datasets.helpers import make_encoder, talk, write_meta

PICTURE = (REFERENCE / "images" / "img1.png").read_bytes()
asked = []


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        asked.append(self.path)
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path[4:])
            self.end_headers()
            return
        self.send_response(200 if self.path == "/a.png" else 404)
        self.end_headers()
        self.wfile.write(PICTURE)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def port():
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running.server_port
        running.shutdown()


def records(*images):
    return [{"image": image, "conversations": talk("<image>\nWhat is it?")} for image in images]


def test_nothing_is_fetched_unless_its_host_is_named(port, tmp_path):
    asked.clear()
    meta = write_meta(tmp_path, records(f"http://127.0.0.1:{port}/a.png"))
    for domains in (None, (), ("localhost",), ("127.0.0.10",), ("0.0.1",)):
        (source,) = read_meta(meta, domains=domains)
        with pytest.raises(DataError, match="is not on this machine, and its host is not one of --allowed_media_domains"):
            source.read(0)
    with pytest.raises(ImageError, match="allowed_media_domains"):
        Remote(f"http://127.0.0.1:{port}/a.png").read()
    assert not asked


@pytest.mark.parametrize("by_root", [False, True])
def test_a_named_host_gives_the_sample_of_the_file(port, tmp_path, by_root):
    host = f"http://127.0.0.1:{port}/"
    there = write_meta(tmp_path, records("a.png" if by_root else host + "a.png"), "there", root=host if by_root else "")
    encoder = make_encoder()
    here = InternVLDataset(read_meta(write_meta(tmp_path, records("img1.png"))), encoder, 0)[0]
    sources = read_meta(there, domains=["127.0.0.1"])
    sample = InternVLDataset(sources, encoder, 0)[0]
    assert np.array_equal(sample["pixel_values"], here["pixel_values"]) and np.array_equal(sample["labels"], here["labels"])
    (image,) = sources[0].read(0).images
    assert picture_size(image) == picture_size(str(REFERENCE / "images" / "img1.png"))


def test_a_picture_in_the_record_itself_needs_no_host(tmp_path):
    data = "data:image/png;base64," + base64.b64encode(PICTURE).decode()
    sample = InternVLDataset(read_meta(write_meta(tmp_path, records(data))), make_encoder(), 0)[0]
    assert len(sample["pixel_values"])


def test_redirects_are_checked_like_addresses(port):
    url = f"http://127.0.0.1:{port}"
    assert fetch_allowed(f"{url}/to//a.png", ["127.0.0.1"], private=True) == PICTURE
    asked.clear()
    for place in (f"http://localhost:{port}/a.png", "file:///etc/hostname", f"http://a@127.0.0.1:{port}/a.png"):
        with pytest.raises(NotFetched, match="host is not allowed"):
            fetch_allowed(f"{url}/to/{place}", ["127.0.0.1"], private=True)
    assert all(path.startswith("/to/") for path in asked)
    with pytest.raises(NotFetched, match="redirects too often"):
        fetch_allowed(url + "/to/" * 9 + "/a.png", ["127.0.0.1"], private=True)


def test_private_addresses_and_other_answers_are_refused(port):
    asked.clear()
    with pytest.raises(NotFetched, match="private"):
        fetch_allowed(f"http://localhost:{port}/a.png", ["localhost"])
    assert not asked
    with pytest.raises(NotFetched, match="status 404"):
        fetch_allowed(f"http://127.0.0.1:{port}/none", ["127.0.0.1"], private=True)
    with pytest.raises(NotFetched, match="more than 0 MB"):
        fetch_allowed(f"http://127.0.0.1:{port}/a.png", ["127.0.0.1"], private=True, most_bytes=100)
    with pytest.raises(NotFetched, match="cannot be reached"):
        fetch_allowed("http://127.0.0.1:1/a.png", ["127.0.0.1"], private=True)


def test_the_checker_takes_hosts(port, tmp_path, capsys):
    meta = write_meta(tmp_path, records(f"http://127.0.0.1:{port}/a.png"))
    checkpoint = str(REFERENCE / "qwen2" / "checkpoint")
    command = [str(meta), "--model_name_or_path", checkpoint, "--output", str(tmp_path / "report"), "--workers", "1"]
    check.main([*command, "--allowed-media-domains", "127.0.0.1"])
    with pytest.raises(SystemExit):
        check.main(command)
    assert "set.jsonl:1: 'http://127.0.0.1" in capsys.readouterr().out


def test_a_video_at_an_address_is_one_sentence(tmp_path):
    (source,) = read_meta(write_meta(tmp_path, [{"video": "https://example.org/v.mp4", "conversations": talk()}]))
    with pytest.raises(DataError, match="'https://example.org/v.mp4' is not on this machine: download it"):
        source.read(0)
