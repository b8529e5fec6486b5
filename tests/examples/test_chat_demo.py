"""The chat commands as a user types them, on good days and bad ones."""

import json
import os
import re
import shutil
import struct
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from paddlemix.errors import UserError
from paddlemix.examples.internvl2 import chat_demo, chat_demo_video, cli
from paddlemix.models.internvl2 import load_tokenizer
from paddlemix.processors.video import get_index
from tests.conftest import load_reference, tiles

SCENE = str(chat_demo.DEMO_IMAGE)


def command(monkeypatch, module, *arguments):
    """Run a command in this process; return its exit code."""
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    try:
        module.main()
    except SystemExit as stop:
        return stop.code
    return 0


def test_the_command_without_flags_answers_quickly():
    started = time.monotonic()
    done = subprocess.run([sys.executable, chat_demo.__file__], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "blue\n"
    assert "Traceback" not in done.stderr
    # The promise is 15 s; other work on the machine is allowed for.
    assert time.monotonic() - started < 60


def test_help_does_not_wait_for_the_framework():
    code = "import sys; sys.argv = ['x', '--help']; from paddlemix.examples.internvl2 import chat_demo; chat_demo.main()"
    check = "import atexit, sys; atexit.register(lambda: sys.stderr.write(str('paddle' in sys.modules)));" + code
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert "--image_path" in done.stdout
    assert done.stderr == "False"


def test_answers_are_those_of_the_model(monkeypatch, capsys):
    reference = load_reference("qwen2")
    chat = reference.expected["chats"][0]
    path = reference.path.parents[1] / "images" / "img0.png"
    flags = ["--model_name_or_path", reference.path, "--image_path", path, "--max_num", 6, "--max_new_tokens", 24]
    flags += ["--text", chat["question"].removeprefix("<image>\n")]
    assert command(monkeypatch, chat_demo, *flags) == 0
    assert capsys.readouterr().out == chat["response"] + "\n"
    assert command(monkeypatch, chat_demo, *flags, "--stream") == 0
    assert capsys.readouterr().out == chat["response"] + "\n"


def test_several_pictures_are_numbered(monkeypatch, capsys):
    reference = load_reference("internlm2")
    chat = next(c for c in reference.expected["chats"] if c["label"] == "two_images")
    paths = [reference.path.parents[1] / "images" / f"img{i}.png" for i in range(2)]
    text = chat["question"].split("\n")[-1]
    flags = ["--model_name_or_path", reference.path, "--image_path", *paths, "--max_num", 6, "--max_new_tokens", 24]
    assert command(monkeypatch, chat_demo, *flags, "--text", text) == 0
    assert capsys.readouterr().out == chat["response"] + "\n"
    pixels = np.concatenate([tiles(0), tiles(1)])
    assert reference.model.chat(reference.tokenizer, pixels, chat["question"], {"max_new_tokens": 24}, None, False, [7, 7])


def test_interactive_rounds_share_one_conversation(monkeypatch, capsys):
    reference = load_reference("qwen2")
    first, second = reference.expected["chats"][:2]
    path = reference.path.parents[1] / "images" / "img0.png"
    lines = iter(["/add no_such_file.png", "what?", second["question"], ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    flags = ["--model_name_or_path", reference.path, "--image_path", path, "--max_num", 6, "--max_new_tokens", 24]
    text = first["question"].removeprefix("<image>\n")
    assert command(monkeypatch, chat_demo, *flags, "--text", text, "--interactive") == 0
    out, err = capsys.readouterr()
    assert out == first["response"] + "\n" + second["response"] + "\n"
    assert "no_such_file.png" in err  # and the conversation went on


def test_text_alone_needs_no_picture(monkeypatch, capsys):
    reference = load_reference("phi3")
    chat = reference.expected["chats"][-1]
    for none in ([], ["--image_path", "None"]):
        flags = ["--model_name_or_path", reference.path, "--text", chat["question"], "--max_new_tokens", 24]
        assert command(monkeypatch, chat_demo, *flags, *none) == 0
        assert capsys.readouterr().out == chat["response"] + "\n"


def test_boxes_are_drawn(monkeypatch, capsys, tmp_path):
    """Around the red star at the top left of the bundled scene of three shapes."""
    scene, out = chat_demo.DEMO_IMAGE.with_name("scene_2.png"), tmp_path / "out.png"
    question = "Please answer with a bounding box. Where is the red star?"
    assert command(monkeypatch, chat_demo, "--image_path", scene, "--text", question, "--draw_boxes", out) == 0
    said = capsys.readouterr().out
    assert "red star" in said and "1 box(es) drawn" in said
    before, after = (Image.open(path).convert("RGB") for path in (scene, out))
    assert before.size == after.size
    pixels = np.asarray(before).astype(int)
    rows, columns = np.nonzero(pixels[..., 0] - pixels[..., 1:].max(-1) > 100)
    true = np.array([columns.min(), rows.min(), columns.max(), rows.max()])
    found = np.array([int(number) for number in re.findall(r"\d+", said.split("box(es)")[0])[:4]]) / 1000 * before.width
    assert np.abs(found - true).max() < 0.04 * before.width
    x, y = round(found[0]), round((found[1] + found[3]) / 2)  # on its left side
    assert before.getpixel((x, y)) != after.getpixel((x, y)) == (0xE6, 0x19, 0x4B)


def copied_model(tmp_path, **changes):
    """A copy of a reference checkpoint to be damaged."""
    target = tmp_path / "model"
    shutil.copytree(load_reference("qwen2").path, target)
    os.chmod(target, 0o755)
    for path in target.iterdir():
        os.chmod(path, 0o644)
    return target


def no_config(path):
    (path / "config.json").unlink()


def no_tokenizer(path):
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        (path / name).unlink()


def no_weights(path):
    (path / "model.safetensors").unlink()


def cut_weights(path):
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[: len(data) // 2])


def edit_config(**llm):
    def edit(path):
        values = json.loads((path / "config.json").read_text())
        values["llm_config"].update(llm)
        (path / "config.json").write_text(json.dumps(values))

    return edit


def pickle_that_runs(path):
    import pickle
    import zipfile

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {path}/executed",)

    (path / "model.safetensors").unlink()
    with zipfile.ZipFile(path / "pytorch_model.bin", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"weight": Evil()}))
        archive.writestr("archive/version", "3\n")


@pytest.mark.parametrize(
    "damage, words",
    [
        (no_config, ["config.json"]),
        (no_tokenizer, ["tokenizer"]),
        (no_weights, ["safetensors"]),
        (cut_weights, ["model.safetensors"]),
        (edit_config(hidden_size=128), ["shape"]),
        (edit_config(num_hidden_layers=5), ["layers.3"]),
        (edit_config(architectures=["MixtralForCausalLM"]), ["MixtralForCausalLM", "supported"]),
        (pickle_that_runs, ["pytorch_model.bin", "system"]),
    ],
)
def test_damaged_checkpoints_end_in_one_sentence(monkeypatch, capsys, tmp_path, damage, words):
    path = copied_model(tmp_path)
    damage(path)
    assert command(monkeypatch, chat_demo, "--model_name_or_path", path, "--text", "hi") == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and "\n" not in error
    assert all(word in error for word in words), error
    assert not (path / "executed").exists()


def write(path, data):
    path.write_bytes(data)
    return path


def bad_pictures(tmp_path):
    whole = chat_demo.DEMO_IMAGE.read_bytes()
    yield tmp_path / "missing.png", "missing.png"
    yield write(tmp_path / "empty.png", b""), "empty"
    yield write(tmp_path / "cut.png", whole[: len(whole) // 2]), "cut.png"
    yield write(tmp_path / "text.jpg", b"this is no picture"), "text.jpg"
    yield write(tmp_path / "noise.png", b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + b"\0" * 40), "noise.png"
    yield tmp_path, str(tmp_path)


def test_a_picture_that_cannot_be_written_leaves_the_old_one(monkeypatch, capsys, tmp_path):
    class Session:
        marked_answer = "<ref>red star</ref><box>[[60, 40, 280, 270]]</box>"

    scene, out = chat_demo.DEMO_IMAGE.with_name("scene_2.png"), tmp_path / "out.png"
    out.write_bytes(b"old")
    (tmp_path / ".out.png").symlink_to("/dev/full")
    with pytest.raises(UserError, match="out.png cannot be written .No space left"):
        chat_demo.save_boxes(Session, str(scene), str(out))
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"] and out.read_bytes() == b"old"
    chat_demo.save_boxes(Session, str(scene), str(out))
    assert Image.open(out).size == Image.open(scene).size


def test_bad_pictures_end_in_one_sentence(monkeypatch, capsys, tmp_path):
    for path, word in bad_pictures(tmp_path):
        assert command(monkeypatch, chat_demo, "--image_path", path, "--text", "What?") == 1
        error = capsys.readouterr().err.strip()
        assert error.startswith("error: ") and "\n" not in error, error
        assert word in error


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--text", "<image>"], "1 <image> mark(s) but 0 picture(s)"),
        (["--image_path", SCENE, "--text", "<image> <image>"], "2 <image> mark(s) but 1 picture(s)"),
        (["--text", "<IMG_CONTEXT>"], "reserved token"),
        (["--text", "word " * 5000], "context is 4096"),
        (["--text", "hi", "--device", "gpu"], "needs the GPU build of Paddle"),
        (["--text", "hi", "--device", "npu"], "needs a Paddle plug-in"),
        (["--text", "hi", "--dtype", "float16"], "no float16 arithmetic on CPU"),
        (["--text", "hi", "--engine", "eager", "--dtype", "bfloat16"], "no bfloat16 arithmetic on CPU"),
        (["--text", "hi", "--max_new_tokens", "0"], "max_new_tokens is 0"),
        (["--text", "hi", "--model_name_or_path", "./nowhere"], "nowhere"),
        (["--text", "hi", "--draw_boxes", "x.png"], "exactly one picture"),
        (["--image_path", SCENE, "--text", "hi", "--draw_boxes", "nowhere/x.png"], "folder nowhere does not exist"),
        (["--image_path", SCENE, "--text", "hi", "--draw_boxes", "x.text"], "'.text' is no picture format"),
        (["--image_path", SCENE, "--text", "hi", "--max_num", "-1"], "max_num"),
    ],
)
def test_bad_flags_end_in_one_sentence(monkeypatch, capsys, flags, words):
    assert command(monkeypatch, chat_demo, *flags) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and "\n" not in error
    assert words in error


def test_the_bundled_checkpoint_is_complete():
    tokenizer = load_tokenizer(str(cli.DEMO_MODEL))
    assert tokenizer.require_token_id("<IMG_CONTEXT>") == 2005


def test_the_video_command_answers(monkeypatch, capsys):
    assert command(monkeypatch, chat_demo_video) == 0
    assert capsys.readouterr().out == "A blue square moves down.\n"


@pytest.mark.parametrize("name", ["astronaut.jpg", "cat.jpg", "coffee.jpg"])
def test_the_bundled_model_does_not_know_photographs(monkeypatch, capsys, name):
    flags = ["--image_path", cli.DEMO_IMAGES / name, "--text", "Please describe this picture."]
    assert command(monkeypatch, chat_demo, *flags) == 0
    assert capsys.readouterr().out == "I do not know.\n"


def test_the_video_command_asks_about_frames(monkeypatch, capsys, tmp_path):
    """A folder whose middle frames are the reference's pictures is the reference's video."""
    reference = load_reference("llama_vit6b")
    chat = next(c for c in reference.expected["chats"] if c["label"] == "video_like")
    chosen = get_index(None, 1.0, 15, num_segments=4)
    for frame in range(16):
        picture = int(np.searchsorted(chosen, frame)) % 4
        shutil.copy(reference.path.parents[1] / "images" / f"img{picture}.png", tmp_path / f"{frame}.png")
    flags = ["--model_name_or_path", reference.path, "--video_path", tmp_path, "--num_segments", 4, "--max_new_tokens", 24]
    assert command(monkeypatch, chat_demo_video, *flags, "--text", chat["question"].split("\n")[-1]) == 0
    assert capsys.readouterr().out == chat["response"] + "\n"


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--video_path", "missing.mp4"], "missing.mp4"),
        (["--video_path", SCENE, "--start", "5", "--end", "2"], "--start 5.0 is not before --end 2.0"),
        (["--num_segments", "0"], "num_segments"),
    ],
)
def test_bad_video_flags_end_in_one_sentence(monkeypatch, capsys, flags, words):
    video = [] if "--video_path" in flags else ["--video_path", str(chat_demo_video.DEMO_VIDEO)]
    assert command(monkeypatch, chat_demo_video, *flags, *video, "--text", "What?") == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and "\n" not in error
    assert words in error
