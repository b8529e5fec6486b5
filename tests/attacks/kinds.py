"""Attacks by kind: functions from a working folder to an answer, which the child process runs."""

import json
import math
import os
import shutil
import struct
import sys
from pathlib import Path

REFERENCE = Path(__file__).parents[1] / "data" / "reference"


def checkpoint(folder, name="qwen2"):
    """A copy of a reference checkpoint."""
    return Path(shutil.copytree(REFERENCE / name / "checkpoint", Path(folder, "checkpoint")))


def load(directory):
    from paddlemix.models.internvl2 import InternVLChatModel

    return type(InternVLChatModel.from_pretrained(str(directory), engine="eager")).__name__


def sizes():
    """Values of config.json, one at a time; names are the keys that the message must have."""

    def attack(part, key, value):
        def case(folder):
            directory = checkpoint(folder)
            values = json.loads((directory / "config.json").read_text())
            (values[part] if part else values)[key] = value
            (directory / "config.json").write_text(json.dumps(values))
            return load(directory)

        return case

    wrong = (0, -1, True, 1.5, "7", math.nan, math.inf, None, [], 10**30)
    cases = {}
    for part, key, values in (
        ("llm_config", "num_hidden_layers", (10**6, 1024, *wrong)),
        ("vision_config", "num_hidden_layers", (10**6, 1024, *wrong)),
        ("llm_config", "hidden_size", (2**40, 2**17, *wrong)),
        ("vision_config", "hidden_size", (2**40, 2**17, *wrong)),
        ("llm_config", "intermediate_size", (2**40, 2**17, *wrong)),
        ("llm_config", "vocab_size", (2**40, 2**21, *wrong)),
        ("llm_config", "num_attention_heads", (10**7, 3, *wrong)),
        ("llm_config", "num_key_value_heads", (10**7, 3, *[value for value in wrong if value is not None])),
        ("llm_config", "rms_norm_eps", (-1e-6, 0, "1e-6", math.nan, None)),
        ("llm_config", "rope_theta", (0, -1.0, True, "10000", math.nan, math.inf, None)),
        ("llm_config", "rope_scaling", ({"type": "linear", "factor": math.nan}, {"type": 3}, "linear", [1])),
        ("llm_config", "max_position_embeddings", wrong),
        ("vision_config", "image_size", (10**6, *wrong)),
        ("vision_config", "patch_size", (10**6, *wrong)),
        (None, "force_image_size", (10**6, 100, 0, -28, True, "112", math.nan)),
        (None, "downsample_ratio", (0, -0.5, 0.3, 2, True, "0.5", math.nan, None)),
        (None, "max_dynamic_patch", (10**7, *wrong)),
        (None, "min_dynamic_patch", (10**7, 13, *wrong)),
        (None, "select_layer", (10**6, -9, True, 1.5, "last", math.nan, None)),
        (None, "llm_config", (None, [], "x")),
        (None, "vision_config", (None, [], "x")),
    ):
        for value in values:
            cases[f"{key} = {value!r}"] = attack(part, key, value)
    return cases


def files():
    """Files that are no files, or no JSON, under the names of a checkpoint; names begin with the file's."""

    def attack(name, make):
        def case(folder):
            from paddlemix.models.internvl2 import load_tokenizer

            directory = checkpoint(folder)
            path = directory / name
            path.unlink(missing_ok=True)
            make(path)
            return load(directory) if name in ("config.json", "model.safetensors") else load_tokenizer(str(directory))

        return case

    makes = {
        "a pipe": os.mkfifo,
        "a device": lambda path: path.symlink_to("/dev/zero"),
        "a loop": lambda path: path.symlink_to(path),
        "a folder": lambda path: path.mkdir(),
        "of /proc": lambda path: path.symlink_to("/proc/self/mem"),
        "deep": lambda path: path.write_bytes(b"[" * 60_000),
        "deep objects": lambda path: path.write_bytes(b'{"a":' * 60_000),
        "with a BOM": lambda path: path.write_bytes(b"\xef\xbb\xbf{}"),
        "an array": lambda path: path.write_bytes(b"[]"),
        "null": lambda path: path.write_bytes(b"null"),
        "sparse": lambda path: os.truncate(os.open(path, os.O_CREAT | os.O_WRONLY), 1 << 40),
    }
    cases = {
        f"{name} {what}": attack(name, make)
        for name in ("config.json", "tokenizer_config.json", "model.safetensors")
        for what, make in makes.items()
    }

    def header(entries):
        def make(path):
            encoded = json.dumps(entries).encode()
            path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + b"\0" * 8)

        return attack("model.safetensors", make)

    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    for what, entries in {
        "overlaps": {"a": entry, "b": entry},
        "leaves a hole": {"a": entry | {"shape": [1], "data_offsets": [4, 8]}},
        "points beyond": {"a": entry | {"data_offsets": [0, 1 << 50]}},
        "shape of text": {"a": entry | {"shape": "2"}},
        "huge shape": {"a": entry | {"shape": [1 << 40, 1 << 40]}},
        "unknown dtype": {"a": entry | {"dtype": "F3"}},
    }.items():
        cases[f"model.safetensors {what}"] = header(entries)
    return cases


def media():
    """Paths that are no pictures and no clips."""
    from paddlemix.processors.image import load_image
    from paddlemix.processors.video import load_video

    def at(make, read):
        def case(folder):
            path = Path(folder, "media.png")
            make(path)
            return read(str(path)).shape

        return case

    makes = {
        "a pipe": os.mkfifo,
        "a device": lambda path: path.symlink_to("/dev/zero"),
        "a loop": lambda path: path.symlink_to(path),
        "of /proc": lambda path: path.symlink_to("/proc/self/mem"),
        "the kernel's log": lambda path: path.symlink_to("/proc/kmsg"),
        "sparse": lambda path: os.truncate(os.open(path, os.O_CREAT | os.O_WRONLY), 1 << 42),
        "a folder": lambda path: path.mkdir(),
    }
    cases = {f"picture, {what}": at(make, load_image) for what, make in makes.items()}
    cases |= {f"clip, {what}": at(make, lambda path: load_video(path)[0]) for what, make in makes.items()}
    picture = str(REFERENCE / "images" / "img0.png")
    for value in (0, -1, 10**7, 10**30, 1.5, True, "12", math.nan, None, []):
        cases[f"max_num = {value!r}"] = lambda folder, value=value: load_image(picture, max_num=value).shape
    for value in (0, -448, 10**6, True, "448", math.nan):
        cases[f"tile size = {value!r}"] = lambda folder, value=value: load_image(picture, input_size=value).shape
    return cases


def flags():
    """Flags of the two chat commands; names begin with the flag."""
    from paddlemix.examples.internvl2 import chat_demo, chat_demo_video

    def run(module, *words):
        def case(folder):
            sys.argv = ["chat", *words]
            return module.main()

        return case

    cases = {}
    for flag, values in {
        "--seed": ("-1", str(2**63), str(10**30)),
        "--max_num": ("0", "-1", "10000000", str(10**30)),
        "--temperature": ("nan", "inf", "-1", "0"),
        "--top_p": ("nan", "inf", "0", "2"),
        "--top_k": ("-1",),
        "--repetition_penalty": ("nan", "inf", "0", "-1"),
        "--max_new_tokens": ("0", "-5", str(10**30)),
    }.items():
        for value in values:
            cases[f"{flag} {value}"] = run(chat_demo, "--do_sample", flag, value)
    for flag, values in {
        "--num_segments": ("0", "-1", "10000000", str(10**30)),
        "--start": ("nan", "inf", "-1", "1e9", "1e308"),
        "--end": ("nan", "-1", "0"),
    }.items():
        for value in values:
            cases[f"{flag} {value}"] = run(chat_demo_video, flag, value)
    return cases


def mutations():
    """Pictures and clips of every form with bytes changed, cut out, doubled and swapped, by a fixed seed."""
    import io
    import random

    from PIL import Image

    from paddlemix.processors.image import load_image
    from paddlemix.processors.video import load_video

    demo = Path(__file__).parents[2] / "paddlemix" / "demo_images"
    scene = Image.open(demo / "scene_2.png").convert("RGB").resize((120, 90))
    sources = {}
    for form, settings in {
        "PNG": {}, "JPEG": {"quality": 80}, "WEBP": {}, "GIF": {}, "BMP": {}, "TIFF": {"compression": "tiff_lzw"}, "PPM": {},
    }.items():  # fmt: skip
        written = io.BytesIO()
        scene.save(written, form, **settings)
        sources[form.lower()] = written.getvalue()
    frames = [scene.rotate(10 * turn) for turn in range(6)]
    for form in ("GIF", "WEBP", "PNG"):
        written = io.BytesIO()
        frames[0].save(written, form, save_all=True, append_images=frames[1:], duration=100)
        sources[f"moving.{form.lower()}"] = written.getvalue()
    sources["clip.mp4"] = (demo / "clip.mp4").read_bytes()

    def mutated(content, rng):
        data = bytearray(content)
        for _ in range(rng.choice((1, 1, 2, 8, 40))):
            at = rng.randrange(len(data)) if rng.random() < 0.5 else rng.randrange(min(len(data), 64))
            length = rng.choice((1, 2, 4, 16, 300))
            how = rng.randrange(5)
            if how == 0:
                data[at] ^= 1 << rng.randrange(8)
            elif how == 1:
                data[at : at + length] = rng.choice((b"\x00", b"\xff", b"\x7f", b"\x80")) * length
            elif how == 2 and len(data) > 400:
                del data[at : at + length]
            elif how == 3:
                data[at:at] = data[at : at + length]
            else:
                data[at : at + length] = rng.randbytes(length)
        return bytes(data[: rng.randrange(len(data))] if rng.random() < 0.1 else data)

    def attack(name, content, read):
        def case(folder):
            path = Path(folder, name)
            path.write_bytes(content)
            return read(str(path)).shape

        return case

    rng, cases = random.Random(0), {}
    for source, content in sources.items():
        moving = source.startswith(("moving", "clip"))
        for number in range(40 if source == "clip.mp4" else 80):
            name = source if moving else f"picture.{source}"
            read = (lambda path: load_video(path, num_segments=4, max_num=1)[0]) if moving else load_image
            cases[f"{number} {source}"] = attack(name, mutated(content, rng), read)
    return cases
