"""The index of lines: what it finds is what reading the file finds, and a stale or damaged one is never used."""

import os

import numpy as np
import pytest

from paddlemix.datasets import lines
from paddlemix.datasets.lines import LineIndex
from paddlemix.errors import DataError


def write(path, content):
    path.write_bytes(content)
    return str(path)


def plainly(content):
    """[(line number, bytes)] of the lines that are not blank."""
    found = content.split(b"\n")
    return [(number, line) for number, line in enumerate(found, 1) if line.strip()]


def assert_found(index, content):
    wanted = plainly(content)
    assert len(index) == len(wanted)
    for i, (number, line) in enumerate(wanted):
        assert index.where(i)[1] == number
        assert index.read(i).rstrip(b"\n") == line


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n\n \n\t\r\n",
        b"one",
        b"one\n",
        b"one\n\n\ntwo\r\n   \nthree",
        b" leading\n\n \x0b\nlast ",
        b"x" * 50 + b"\n" + b" " * 40 + b"\n" + b"y" * 60,
    ],
)
@pytest.mark.parametrize("chunk", [1, 3, 16, 1 << 19])
def test_lines_are_those_of_the_file(tmp_path, monkeypatch, content, chunk):
    monkeypatch.setattr(lines, "_CHUNK", chunk)
    assert_found(LineIndex(write(tmp_path / "a", content)), content)


@pytest.mark.parametrize("seed", range(4))
def test_lines_of_random_files(tmp_path, monkeypatch, seed):
    rng = np.random.default_rng(seed)
    monkeypatch.setattr(lines, "_CHUNK", int(rng.integers(1, 40)))
    content = bytes(rng.choice(list(b"ab \n\n\r\t"), 3000))
    assert_found(LineIndex(write(tmp_path / "a", content)), content)


@pytest.mark.slow
def test_offsets_beyond_four_gigabytes(tmp_path):
    """In a sparse file, whose second line is five gigabytes of zeros."""
    path = tmp_path / "sparse"
    with open(path, "wb") as file:
        file.write(b"first\n")
        file.seek(5 << 30)
        file.write(b"\nsecond\nthird\n")
    index = LineIndex(str(path), keep=False)
    assert len(index) == 4
    assert [index.offset(i) for i in range(4)] == [0, 6, (5 << 30) + 1, (5 << 30) + 8]
    assert index.read(3) == b"third\n" and index.where(3)[1] == 4
    with pytest.raises(DataError, match="longer than 256 MB"):
        index.read(1)


def test_an_index_is_kept_and_is_used_only_while_the_file_is_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "LARGE", 0)
    scanned = []
    scan = lines._scan
    monkeypatch.setattr(lines, "_scan", lambda path, write: scanned.append(path) or scan(path, write))
    content = b"a\n\nbb\nccc\n"
    path = write(tmp_path / "set.jsonl", content)
    for _ in range(3):
        assert_found(LineIndex(path), content)
    assert len(scanned) == 1 and sorted(os.listdir(tmp_path)) == ["set.jsonl", "set.jsonl.index"]
    content = b"other\nlines\n\n!\n"
    write(tmp_path / "set.jsonl", content)
    assert_found(LineIndex(path), content)
    assert len(scanned) == 2
    stored = (tmp_path / "set.jsonl.index").read_bytes()
    for damaged in (b"", stored[:40], stored[:-1], stored + b"x", b"x" + stored[1:], stored[:24] + b"\xff" * 8 + stored[32:]):
        (tmp_path / "set.jsonl.index").write_bytes(damaged)
        assert_found(LineIndex(path), content)
    assert len(scanned) == 8


def test_where_nothing_can_be_written_beside_the_file_the_users_cache_has_the_index(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "LARGE", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    path = write(tmp_path / "data/set.jsonl", b"a\nb\n")
    (tmp_path / "data/set.jsonl.index").mkdir()  # in the way
    assert_found(LineIndex(path), b"a\nb\n")
    assert len(list((tmp_path / "cache/paddlemix/indices").glob("*.index"))) == 1
    (tmp_path / "blocked").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "blocked"))
    assert_found(LineIndex(path), b"a\nb\n")  # in memory


def test_files_that_are_gone(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        LineIndex(str(tmp_path / "none"))
    index = LineIndex(write(tmp_path / "a", b"x\n"))
    os.unlink(tmp_path / "a")
    with pytest.raises(DataError, match="cannot be read any more"):
        index.read(0)
