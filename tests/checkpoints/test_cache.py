"""The cache of rounded weights: the second load maps what the first wrote, and nothing damaged is ever used."""

import os

import numpy as np
import pytest

from paddlemix.checkpoints import cache
from paddlemix.models.blocks import quantising
from paddlemix.models.internvl2 import InternVLChatModel
from tests.conftest import REFERENCE

SOURCE = str(REFERENCE / "qwen2" / "checkpoint")
IDS = np.arange(30)[None]


@pytest.fixture
def roundings(monkeypatch, tmp_path):
    """A cache of its own in which all is worthwhile; the list gets one entry for each weight that is rounded."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cache, "WORTHWHILE", 0)
    store, found = cache.store_later, []
    monkeypatch.setattr(cache, "store_later", lambda *args: (thread := store(*args)) and thread.join())
    plain = quantising.rounded

    def noted(weight, bits, *more):
        if isinstance(weight, np.ndarray):
            found.append(bits)
        return plain(weight, bits, *more)

    monkeypatch.setattr(quantising, "rounded", noted)
    return found


def logits(**options):
    model = InternVLChatModel.from_pretrained(SOURCE, dtype="float32", engine="eager", **{"weight_dtype": "int4", **options})
    return model(input_ids=IDS).logits.numpy()


def test_the_second_load_rounds_nothing_and_answers_the_same(roundings):
    first = logits()
    count = len(roundings)
    assert count > 0 and len(cache.entries()) == 1
    np.testing.assert_array_equal(logits(), first)
    assert len(roundings) == count
    logits(weight_dtype="int8")  # another entry
    logits(quantize_parts="vision")
    assert len(cache.entries()) == 3


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "json", "swapped", "folder"])
def test_damaged_entries_are_made_anew(roundings, damage):
    first = logits()
    ((_, _, entry),) = cache.entries()
    path = entry / "model.safetensors"
    content = path.read_bytes()
    if damage == "cut":
        path.write_bytes(content[:-100])
    elif damage == "flipped":
        path.write_bytes(content[:200] + bytes([content[200] ^ 255]) + content[201:])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "json":
        (entry / "entry.json").write_text("[")
    elif damage == "swapped":
        logits(weight_dtype="int8")
        other = next(found for _, _, found in cache.entries() if found != entry)
        for name in ("model.safetensors", "entry.json"):
            (entry / name).write_bytes((other / name).read_bytes())
    else:
        path.unlink()
        path.mkdir()
    count = len(roundings)
    np.testing.assert_array_equal(logits(), first)
    assert len(roundings) > count
    count = len(roundings)
    np.testing.assert_array_equal(logits(), first)
    assert len(roundings) == count  # it is whole again


def test_it_can_be_off_and_is_left_out_for_small_models(roundings, monkeypatch):
    monkeypatch.setenv("PADDLEMIX_CACHE", "off")
    logits()
    assert cache.entries() == []
    monkeypatch.delenv("PADDLEMIX_CACHE")
    monkeypatch.setattr(cache, "WORTHWHILE", 1 << 30)
    logits()
    assert cache.entries() == []


def test_a_changed_checkpoint_is_another_entry(roundings, tmp_path, monkeypatch):
    import shutil

    shutil.copytree(SOURCE, tmp_path / "copy")
    monkeypatch.setitem(globals(), "SOURCE", str(tmp_path / "copy"))
    logits()
    path = tmp_path / "copy" / "model.safetensors"
    path = path if path.exists() else next((tmp_path / "copy").glob("*.safetensors"))
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    logits()
    assert len(cache.entries()) == 2


def test_what_a_killed_program_left_goes_and_what_is_being_written_stays(roundings):
    left, written = (cache.folder() / f".writing-{name}" for name in ("left", "now"))
    for path in (left, written):
        path.mkdir(parents=True)
        (path / "part").write_bytes(b"x" * 1000)
    os.utime(left, (1, 1))
    logits()
    assert not left.exists() and (written / "part").exists()
    assert len([path for _, _, path in cache.entries() if not path.name.startswith(".")]) == 1


def test_the_longest_unused_goes_first(roundings, monkeypatch, capsys):
    logits()
    ((_, size, first),) = cache.entries()
    os.utime(first, (1, 1))
    logits(quantize_parts="projector")
    second = next(path for _, _, path in cache.entries() if path != first)
    os.utime(second, (2, 2))
    logits()  # uses the first again
    monkeypatch.setattr(cache, "MOST_BYTES", int(1.9 * size))
    logits(quantize_parts="language")
    assert first.exists() != second.exists() or not second.exists()
    assert not second.exists()
    cache.main([])
    assert first.name in capsys.readouterr().out or not first.exists()
    cache.main(["--clear"])
    assert "removed" in capsys.readouterr().out and cache.entries() == []
