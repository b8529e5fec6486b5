"""Names and directories, without a network: the hub is a closed port or a small server on this machine."""

import hashlib
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import urllib.parse
from pathlib import Path

import pytest

from paddlemix.checkpoints.hub import resolve
from paddlemix.errors import CheckpointError
from tests.conftest import REFERENCE

ROOT = Path(__file__).parents[2]
CHECKPOINT = REFERENCE / "internlm2" / "checkpoint"  # in shards
NAME = "OpenGVLab/InternVL2-Tiny"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
CLOSED = "http://127.0.0.1:9"


@pytest.fixture
def environment(tmp_path):
    """Empty home and caches, and an endpoint that nobody listens at."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "PADDLEMIX_", "HUGGING"))}
    return kept | {
        "HOME": str(tmp_path / "home"),
        "HF_HOME": str(tmp_path / "hf"),
        "HF_ENDPOINT": CLOSED,
        "HF_HUB_DISABLE_XET": "1",
    }


def resolve_in(environment, name, cwd=None, **options):
    """``resolve`` in a fresh process, because the hub's library reads its settings when it is imported."""
    program = (
        "import sys\n"
        "from paddlemix.errors import CheckpointError\n"
        "from paddlemix.checkpoints.hub import resolve\n"
        "try: print('FOUND', resolve(sys.argv[1]))\n"
        "except CheckpointError as error: print('ERROR', error)\n"
    )
    path = {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program, name]
    result = subprocess.run(command, capture_output=True, text=True, env=environment | path, cwd=cwd or ROOT, **options)
    assert result.returncode == 0, result.stderr
    kind, _, text = result.stdout.strip().partition(" ")
    return kind, text


def into_hugging_face_cache(environment, files=None):
    """Lay out the reference checkpoint as the hub's library does."""
    folder = Path(environment["HF_HOME"]) / "hub" / f"models--{NAME.replace('/', '--')}"
    snapshot = folder / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    for path in CHECKPOINT.iterdir():
        if files is None or path.name in files:
            shutil.copy(path, snapshot)
    return snapshot


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as a snapshot needs; ``cut`` names a file whose first transfer breaks off in the middle."""

    def log_message(self, *arguments):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        server = self.server
        server.requests.append((self.command, self.path, self.headers.get("Range")))
        if self.path.startswith(f"/api/models/{NAME}"):
            siblings = [{"rfilename": name} for name in server.files]
            body = json.dumps({"id": NAME, "modelId": NAME, "sha": COMMIT, "private": False, "tags": [], "siblings": siblings})
            return self.answer(200, body.encode(), {"Content-Type": "application/json"})
        match = re.fullmatch(rf"/{NAME}/resolve/{COMMIT}/(.+)", self.path)
        if not match or match[1] not in server.files:
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound" if match else "RepoNotFound"})
        body = server.files[match[1]]
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha1(body).hexdigest()}"', "Accept-Ranges": "bytes"}
        cut = len(body)
        if self.command == "GET" and match[1] == server.cut:
            server.cut, cut = None, len(body) // 2
        start = re.match(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if start and int(start[1]):
            first = int(start[1])
            headers["Content-Range"] = f"bytes {first}-{len(body) - 1}/{len(body)}"
            return self.answer(206, body[first:], headers)
        return self.answer(200, body, headers, cut)

    def answer(self, status, body, headers, cut=None):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:cut])
            self.close_connection = True


@pytest.fixture
def hub():
    """A server with the reference checkpoint, and with code and other weights that must not be fetched."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files = {path.name: path.read_bytes() for path in CHECKPOINT.iterdir()}
    server.files |= {
        "modeling_internvl_chat.py": b"raise SystemExit('ran')",
        "pytorch_model.bin": b"x",
        "training_args.bin": b"x",
    }
    server.requests, server.cut = [], None
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_directory_is_itself(tmp_path, monkeypatch):
    assert resolve(CHECKPOINT) == str(CHECKPOINT)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert resolve("~/a") == str(tmp_path / "a")
    monkeypatch.chdir(tmp_path)
    assert resolve("a/b") == "a/b"  # before it is taken for a name
    assert resolve("a/b/../b/") == "a/b/../b/"


@pytest.mark.parametrize("name", ["./x", "/x/y", "../a/b", "a/b/c", "~/x", "x", "", "a/b/", "a\\b", "a b/c", "/", "a/.."])
def test_what_looks_like_a_path_is_never_fetched(name, environment, hub, tmp_path):
    if name in ("/",):
        assert resolve(name) == name
        return
    (tmp_path / "empty").mkdir()
    kind, text = resolve_in(environment | {"HF_ENDPOINT": hub.url}, name, cwd=tmp_path / "empty")
    assert kind == "ERROR" and "does not exist" in text and "OpenGVLab/InternVL2-1B" in text
    assert not hub.requests


def test_a_path_below_an_existing_directory_is_never_fetched(environment, hub, tmp_path):
    (tmp_path / "OpenGVLab").mkdir()
    kind, text = resolve_in(environment | {"HF_ENDPOINT": hub.url}, NAME, cwd=tmp_path)
    assert kind == "ERROR" and "nothing was downloaded" in text and not hub.requests


def test_a_file_is_refused():
    with pytest.raises(CheckpointError, match="is a file"):
        resolve(CHECKPOINT / "config.json")


@pytest.mark.parametrize("offline", [False, True])
def test_without_network_the_error_says_which_files_to_put_where(offline, environment):
    extra = {"HF_HUB_OFFLINE": "1"} if offline else {}
    kind, text = resolve_in(environment | extra, NAME)
    assert kind == "ERROR" and "\n" not in text
    place = f"{environment['HOME']}/.cache/paddlemix/{NAME}"
    assert all(words in text for words in (NAME, "*.safetensors", "*.json", "tokenizer.model", place))
    shutil.copytree(CHECKPOINT, place)
    assert resolve_in(environment | extra, NAME) == ("FOUND", place)


def test_own_cache_is_used_where_it_is_complete(environment, tmp_path):
    environment["PADDLEMIX_HOME"] = str(tmp_path / "models")
    place = shutil.copytree(CHECKPOINT, tmp_path / "models" / NAME)
    assert resolve_in(environment, NAME) == ("FOUND", str(place))
    (place / "model-00002-of-00002.safetensors").unlink()
    kind, text = resolve_in(environment, NAME)
    assert kind == "ERROR" and str(place) in text


def test_cache_of_hugging_face_is_used_where_it_is_complete(environment):
    snapshot = into_hugging_face_cache(environment)
    assert resolve_in(environment, NAME) == ("FOUND", str(snapshot))
    assert resolve_in(environment | {"HF_HUB_OFFLINE": "1"}, NAME) == ("FOUND", str(snapshot))
    (snapshot / "model-00001-of-00002.safetensors").unlink()
    assert resolve_in(environment, NAME)[0] == "ERROR"


@pytest.mark.parametrize("own", [False, True])
def test_download_takes_weights_and_tokenizer_but_no_code(own, environment, hub, tmp_path):
    online = environment | {"HF_ENDPOINT": hub.url} | ({"PADDLEMIX_HOME": str(tmp_path / "models")} if own else {})
    kind, directory = resolve_in(online, NAME)
    assert kind == "FOUND", directory
    assert directory.startswith(str(tmp_path / "models" / NAME) if own else environment["HF_HOME"])
    fetched = {path.name: path.read_bytes() for path in Path(directory).iterdir() if path.is_file()}
    assert fetched == {path.name: path.read_bytes() for path in CHECKPOINT.iterdir()}
    assert not any(re.search(r"\.py|\.bin", path) for _, path, _ in hub.requests)
    hub.requests.clear()
    assert resolve_in(online, NAME) == ("FOUND", directory) and not hub.requests


def test_an_interrupted_download_is_resumed(environment, hub):
    online = environment | {"HF_ENDPOINT": hub.url}
    hub.cut = shard = "model-00002-of-00002.safetensors"
    hub.files[shard] = os.urandom(24 << 20)  # the library keeps what it has in steps of 10 MiB
    kind, directory = resolve_in(online, NAME)
    if kind == "ERROR":  # the library may resume by itself, or leave it to the next call
        kind, directory = resolve_in(online, NAME)
    assert kind == "FOUND" and (Path(directory) / shard).read_bytes() == hub.files[shard]
    spans = [span for command, path, span in hub.requests if command == "GET" and path.endswith(shard)]
    assert len(spans) == 2 and spans[0] is None and int(re.match(r"bytes=(\d+)-", spans[1])[1]) > 0


def test_repositories_with_other_weights(environment, hub):
    online = environment | {"HF_ENDPOINT": hub.url}
    for name in [name for name in hub.files if name.endswith((".safetensors", ".index.json"))]:
        del hub.files[name]
    kind, directory = resolve_in(online, NAME)
    names = {path.name for path in Path(directory).iterdir()}
    assert kind == "FOUND" and "pytorch_model.bin" in names and "training_args.bin" not in names
    shutil.rmtree(environment["HF_HOME"])
    del hub.files["pytorch_model.bin"]
    kind, text = resolve_in(online, NAME)
    assert kind == "ERROR" and "no complete set of weights" in text


# ---------------------------------------------------------------------- ModelScope


class Scope(Hub):
    """As much of ModelScope as a snapshot needs."""

    def do_GET(self):
        server = self.server
        path, _, query = self.path.partition("?")
        query = urllib.parse.parse_qs(query)
        server.requests.append((self.command, self.path, self.headers.get("Range")))
        if path == f"/api/v1/models/{NAME}/repo/files":
            files = [
                {"Path": name, "Name": name, "Type": "blob", "Size": len(data), "Sha256": hashlib.sha256(data).hexdigest()}
                for name, data in server.files.items()
            ]
            body = json.dumps({"Code": 200, "Success": True, "Data": {"Files": files}}).encode()
            return self.answer(200, body, {"Content-Type": "application/json"})
        name = query.get("FilePath", [None])[0]
        if path != f"/api/v1/models/{NAME}/repo" or name not in server.files:
            return self.answer(404, b"", {})
        body = server.files[name]
        body = server.altered.get(name, body)
        cut = len(body)
        if self.command == "GET" and name == server.cut:
            server.cut, cut = None, len(body) // 2
        start = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if start and (int(start[1]) or start[2]):
            first, last = int(start[1]), int(start[2] or len(body) - 1)
            return self.answer(206, body[first : last + 1], {"Content-Range": f"bytes {first}-{last}/{len(body)}"})
        return self.answer(200, body, {"Accept-Ranges": "bytes"}, cut)


@pytest.fixture
def scope(environment):
    """A server with the reference checkpoint that ModelScope's library is told to use."""
    pytest.importorskip("modelscope")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Scope)
    server.files = {path.name: path.read_bytes() for path in CHECKPOINT.iterdir()}
    server.files |= {"modeling_internvl_chat.py": b"raise SystemExit('ran')", "pytorch_model.bin": b"x"}
    server.requests, server.cut, server.altered = [], None, {}
    environment["MODELSCOPE_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def found_in(result):
    """The directory that was found; the library may have written before it."""
    kind, text = result
    assert "FOUND " in f"{kind} {text}", text
    return Path(f"{kind} {text}".rpartition("FOUND ")[2])


def test_names_at_modelscope(environment, scope):
    directory = found_in(resolve_in(environment, f"modelscope:{NAME}"))
    assert {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file() and path.name[0] != "."} == {
        path.name: path.read_bytes() for path in CHECKPOINT.iterdir()
    }
    assert str(directory).startswith(f"{environment['HOME']}/.cache/modelscope")
    assert not any(re.search(r"\.py|\.bin", path) for _, path, _ in scope.requests)
    scope.requests.clear()  # what is there is used without a request, by either way of naming it
    assert found_in(resolve_in(environment, f"modelscope:{NAME}")) == directory
    assert found_in(resolve_in(environment | {"FD_MODEL_SOURCE": "MODELSCOPE"}, NAME)) == directory
    assert not scope.requests
    kind, text = resolve_in(environment, NAME)  # without either, all is as it was
    assert kind == "ERROR" and "Hugging Face" in text and not scope.requests


@pytest.mark.parametrize("own", [False, True])
def test_folders_of_names_with_a_source(environment, scope, tmp_path, own):
    environment |= {"FD_MODEL_SOURCE": "MODELSCOPE", "FD_MODEL_CACHE": str(tmp_path / "fd")}
    environment |= {"PADDLEMIX_HOME": str(tmp_path / "home")} if own else {}
    target = tmp_path / ("home" if own else "fd") / NAME
    assert found_in(resolve_in(environment, NAME)) == target
    scope.requests.clear()
    assert found_in(resolve_in(environment, NAME)) == target and not scope.requests
    if own:  # FastDeploy's folder is looked at after the own one
        shutil.move(tmp_path / "home", tmp_path / "fd")
        assert found_in(resolve_in(environment, NAME)) == tmp_path / "fd" / NAME and not scope.requests
        (tmp_path / "home").mkdir()
        shutil.copytree(CHECKPOINT, target)
        assert found_in(resolve_in(environment, NAME)) == target and not scope.requests
    kind, _ = resolve_in({k: v for k, v in environment.items() if k not in ("FD_MODEL_SOURCE", "PADDLEMIX_HOME")}, NAME)
    assert kind == "ERROR"  # without a source, FastDeploy's folder is not looked at


def test_an_interrupted_download_from_modelscope_is_resumed(environment, scope):
    scope.cut = shard = "model-00002-of-00002.safetensors"
    scope.files[shard] = os.urandom(6 << 20)
    directory = found_in(resolve_in(environment, f"modelscope:{NAME}"))
    assert (directory / shard).read_bytes() == scope.files[shard]
    spans = [span for _, path, span in scope.requests if path.endswith(shard)]
    assert any(span and int(re.match(r"bytes=(\d+)-", span)[1]) > 0 for span in spans)


def test_what_differs_from_its_checksum_is_refused(environment, scope):
    shard = "model-00002-of-00002.safetensors"
    scope.altered[shard] = bytes(len(scope.files[shard]))
    kind, text = resolve_in(environment, f"modelscope:{NAME}")
    text = f"{kind} {text}".rpartition("ERROR ")[2]
    assert "cannot be downloaded from ModelScope" in text and "1 of" in text
    scope.altered.clear()
    directory = found_in(resolve_in(environment, f"modelscope:{NAME}"))
    assert (directory / shard).read_bytes() == scope.files[shard]


def test_places_are_named_where_nothing_is_found(environment, tmp_path):
    pytest.importorskip("modelscope")
    environment |= {"MODELSCOPE_ENDPOINT": CLOSED, "PADDLEMIX_HOME": str(tmp_path / "own"), "HF_HUB_OFFLINE": "1"}
    environment |= {"FD_MODEL_CACHE": str(tmp_path / "fd"), "MODELSCOPE_CACHE": str(tmp_path / "ms")}
    kind, text = resolve_in(environment, f"modelscope:{NAME}")
    assert kind == "ERROR" and text.count("\n") == 0
    for place in (tmp_path / "own" / NAME, tmp_path / "fd" / NAME, tmp_path / "ms", "ModelScope", "HF_HUB_OFFLINE"):
        assert str(place) in text
    kind, text = resolve_in(environment, f"huggingface:{NAME}")
    assert kind == "ERROR" and environment["HF_HOME"] in text and "from Hugging Face" in text
    kind, text = resolve_in(environment | {"FD_MODEL_SOURCE": "AISTUDIO"}, NAME)
    assert kind == "ERROR" and "FD_MODEL_SOURCE is 'AISTUDIO': only HUGGINGFACE and MODELSCOPE" in text


def test_a_library_that_is_not_there_is_named(environment, tmp_path):
    (tmp_path / "modelscope.py").write_text("raise ModuleNotFoundError(\"No module named 'modelscope'\", name='modelscope')")
    program = (
        "import sys; sys.path.insert(0, sys.argv[2])\n"
        "from paddlemix.checkpoints.hub import resolve\n"
        "try: resolve(sys.argv[1])\n"
        "except Exception as error: print(error)"
    )
    command = [sys.executable, "-c", program, f"modelscope:{NAME}", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment | {"PYTHONPATH": str(ROOT)}, cwd=ROOT)
    assert "modelscope is not installed" in done.stdout and "pip install" in done.stdout
