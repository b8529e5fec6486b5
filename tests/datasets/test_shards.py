"""Records in tar shards: the same samples as from single files; what is damaged is named and counted, and never another's."""

import io
import json
import tarfile

import numpy as np
import pytest

from paddlemix.datasets.internvl2 import InternVLDataset, read_meta
from paddlemix.datasets.preference import parse_preference
from paddlemix.datasets.shards import expand
from paddlemix.errors import DataError
from tests.datasets.helpers import IMAGES, make_dataset, make_encoder, picture_record, talk

CLIP = {"conversations": talk("<video>\nWhat happens?"), "video": "any/name.mp4"}


def pack(path, groups, mode="w"):
    """A shard of ``{name: bytes}`` dictionaries."""
    with tarfile.open(path, mode) as tar:
        for members in groups:
            for name, content in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def group(key, number=None, record=None, name=None):
    """Members of a record about a reference picture."""
    record = record or (picture_record(number, question=f"<image>\nWhat is {key}?") if number is not None else None)
    if record is None:
        record = {"conversations": talk(f"Only {key}?")}
    record = dict(record)
    if number is not None:
        record["image"] = name or f"old/img{number}.png"
    members = {f"{key}.json": json.dumps(record).encode()}
    if number is not None:
        members[f"{key}.png"] = (IMAGES / f"img{number}.png").read_bytes()
    return members


def meta(folder, shards="{0..1}.tar", **entry):
    path = folder / "meta.json"
    path.write_text(json.dumps({"set": {"shards": str(folder / shards), **entry}}))
    return str(path)


@pytest.fixture
def shards(tmp_path):
    pack(tmp_path / "0.tar", [group("a", 0), group("b"), group("c", 1)])
    pack(tmp_path / "1.tar", [group("a", 2), group("d", 3)])
    return tmp_path


def dataset(folder, **entry):
    return InternVLDataset(read_meta(meta(folder, **entry)), make_encoder(), skip=True)


def test_samples_are_those_of_single_files(shards):
    packed = dataset(shards)
    records = [picture_record(n, question=f"<image>\nWhat is {k}?") if n is not None else {"conversations": talk(f"Only {k}?")}
               for k, n in (("a", 0), ("b", None), ("c", 1), ("a", 2), ("d", 3))]  # fmt: skip
    plain = make_dataset(shards, records)
    assert len(packed) == len(plain) == 5
    for one, other in zip((packed[i] for i in range(5)), (plain[i] for i in range(5))):
        for key in ("input_ids", "labels", "pixel_values"):
            assert np.array_equal(one[key], other[key])
    assert [packed[i]["name"].rpartition("/")[2] for i in range(5)] == ["0.tar:1", "0.tar:2", "0.tar:3", "1.tar:1", "1.tar:2"]


def test_pictures_need_not_be_named_and_several_are_told_by_name(tmp_path):
    pictures = [(IMAGES / f"img{i}.png").read_bytes() for i in range(2)]
    two = {"conversations": talk("<image> or <image>?"), "image": ["k.1.png", "k.0.png"]}
    unnamed = {"conversations": talk("<image> or <image>?")}
    messages = {"messages": [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "a"}]}
    groups = [
        {"k.json": json.dumps(two).encode(), "k.0.png": pictures[0], "k.1.png": pictures[1]},
        {"l.json": json.dumps(unnamed).encode(), "l.0.png": pictures[0], "l.1.png": pictures[1]},
        {"m.png": pictures[1], "m.json": json.dumps(messages).encode()},
    ]
    pack(tmp_path / "0.tar", groups)
    (source,) = read_meta(meta(tmp_path, "0.tar"))
    found = [[member.read() for member in source.read(i).images] for i in range(3)]
    assert found == [pictures[::-1], pictures, pictures[1:]]


def test_clips(tmp_path):
    frames = [np.full((32, 48, 3), 40 * i, np.uint8) for i in range(6)]
    from PIL import Image

    stored = io.BytesIO()
    pictures = [Image.fromarray(frame) for frame in frames]
    pictures[0].save(stored, "GIF", save_all=True, append_images=pictures[1:])
    pack(tmp_path / "0.tar", [{"v.json": json.dumps(CLIP).encode(), "v.mp4": stored.getvalue()}])
    sample = dataset(tmp_path, shards="0.tar")[0]
    assert len(sample["pixel_values"]) >= 8  # frames


def test_pairs(tmp_path):
    pair = {"question": "<image>\nWhat?", "chosen": "A cat.", "rejected": "A dog."}
    pack(tmp_path / "0.tar", [{"p.json": json.dumps(pair).encode(), "p.webp": b"x"}])
    (source,) = read_meta(meta(tmp_path, "0.tar"), parse_preference)
    record = source.read(0)
    assert record.rejected == "A dog." and record.images[0].read() == b"x"


@pytest.mark.parametrize("cut", ["in a picture", "in a header", "at a member", "behind the last"])
def test_a_shard_that_was_cut_short_loses_its_last_record_alone(tmp_path, cut):
    path = pack(tmp_path / "0.tar", [group("a", 0), group("b", 1), group("c", 2)])
    pack(tmp_path / "1.tar", [group("d", 3)])
    with tarfile.open(path) as tar:
        last = tar.getmember("c.png")
    at = {"in a picture": last.offset_data + 700, "in a header": last.offset + 100, "at a member": last.offset}
    content = path.read_bytes()
    path.write_bytes(content[: at.get(cut, last.offset_data + -(-last.size // 512) * 512)])
    found = [dataset(tmp_path)[i] for i in range(4)]
    assert ["input_ids" in sample for sample in found] == [True, True, False, True]
    (bad,) = found[2]["bad"]
    assert bad["file"] == str(path) and bad["line"] == 3 and bad["dataset"] == "set"
    assert "copy it again" in bad["reason"] and "0.tar" in bad["reason"] and "c" in bad["reason"]
    whole = make_dataset(tmp_path, [picture_record(3, question="<image>\nWhat is d?")])[0]
    assert np.array_equal(found[3]["pixel_values"], whole["pixel_values"])


def test_records_that_cannot_be_used_are_named_by_their_key(tmp_path):
    alone = {"x.png": (IMAGES / "img0.png").read_bytes()}
    broken = {"y.json": b"{broken", "y.png": b"x"}
    other = group("z", 0, name="q.png") | {"z.2.png": b"x"}
    pack(tmp_path / "0.tar", [alone, broken, other, group("ok", 1)])
    found = [dataset(tmp_path, shards="0.tar")[i] for i in range(4)]
    reasons = [sample["bad"][0]["reason"] if sample["bad"] else None for sample in found]
    assert "x has no x.json" in reasons[0] and reasons[1].startswith("y: is not valid JSON")
    assert reasons[2].startswith("z: names 'q.png', which is not beside it") and reasons[3] is None


def test_members_that_are_no_files_are_left_out(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        link = tarfile.TarInfo("a.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        content = json.dumps(picture_record(0)).encode()
        info = tarfile.TarInfo("a.json")
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
    (bad,) = dataset(tmp_path, shards="0.tar")[0]["bad"]
    assert "not beside it in the shard; there is nothing" in bad["reason"]


def test_shards_that_are_none(tmp_path):
    with pytest.raises(DataError, match="0.tar cannot be read"):
        read_meta(meta(tmp_path))
    pack(tmp_path / "0.tar", [group("a")], "w:gz")
    with pytest.raises(DataError, match="no plain tar file .*: it must not be compressed"):
        read_meta(meta(tmp_path, "0.tar"))
    with pytest.raises(DataError, match="both 'shards' and 'annotation'"):
        read_meta(meta(tmp_path, "0.tar", annotation="x.jsonl"))
    with pytest.raises(DataError, match="a pattern of 'shards' that ends in .tar"):
        read_meta(meta(tmp_path, "0.zip"))


def test_patterns():
    assert expand("p/{098..101}.tar") == ["p/098.tar", "p/099.tar", "p/100.tar", "p/101.tar"]
    assert expand("{0..1}/{8..9}.tar") == ["0/8.tar", "0/9.tar", "1/8.tar", "1/9.tar"]
    assert expand("a{b}.tar") == ["a{b}.tar"]
    for wrong in ("{5..2}.tar", "{0..99999999}.tar"):
        with pytest.raises(DataError, match="no range of shards"):
            expand(wrong)


def test_the_index_is_written_once_and_anew_for_other_shards(shards):
    first = dataset(shards)
    (index,) = shards.glob("*.jsonl")
    written = index.stat().st_mtime_ns
    assert len(dataset(shards)) == len(first) == 5 and index.stat().st_mtime_ns == written
    pack(shards / "1.tar", [group("e")])
    assert len(dataset(shards)) == 4
