"""Where the chat commands take pictures and clips from, how they turn them, and beams: each command by the same code."""

import base64
import io
import sys

import pytest
from PIL import Image

from paddlemix.examples.internvl2 import chat_demo, chat_demo_video
from paddlemix.examples.internvl_llava import chat as llava_chat
from paddlemix.examples.minimonkey import chat_demo_minimonkey
from paddlemix.models.minimonkey import MiniMonkeyChatModel
from paddlemix.processors.image import open_image
from paddlemix.processors.minimonkey import multi_scale_tiles
from paddlemix.tokenizers import load_tokenizer
from tests.conftest import REFERENCE, load_reference
from tests.models.internvl_llava import helpers as llava

PICTURE = REFERENCE / "images" / "img0.png"
QWEN2 = ["--model_name_or_path", REFERENCE / "qwen2" / "checkpoint", "--max_new_tokens", 6]
MONKEY = ["--model_name_or_path", REFERENCE / "internlm2" / "checkpoint", "--max_new_tokens", 6, "--engine", "eager"]
LLAVA = ["--model-path", llava.CHAT, "--vision-tower", llava.TOWER, "--temperature", 0, "--max-new-tokens", 6]


@pytest.fixture
def ask(monkeypatch, capsys):
    """Run a command in this process: ``ask(module, flags, stdin=b"") -> (exit code, output, errors)``."""

    def run(module, *flags, stdin=b""):
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, flags)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        code = 0
        try:
            module.main()
        except SystemExit as stop:
            code = stop.code
        return (code, *capsys.readouterr())

    return run


def as_address(path, kind="image/png"):
    return f"data:{kind};base64," + base64.b64encode(path.read_bytes()).decode()


@pytest.fixture
def sideways(tmp_path):
    """(a picture that EXIF data turn upright, the same as it lies, with some of it transparent)."""
    upright = Image.open(PICTURE).convert("RGB")
    lying = upright.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise
    lying.save(tmp_path / "phone.png", exif=exif)
    lying.save(tmp_path / "lying.png")
    return tmp_path / "phone.png", tmp_path / "lying.png"


COMMANDS = {
    "chat": (chat_demo, [*QWEN2, "--text", "What is it?"], "--image_path", b""),
    "minimonkey": (chat_demo_minimonkey, [*MONKEY, "--text", "Read."], "--image_path", b""),
    "llava": (llava_chat, LLAVA, "--image-file", b"What is it?\n"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_picture_is_turned_upright_unless_told_otherwise(ask, sideways, name):
    module, flags, flag, stdin = COMMANDS[name]
    phone, lying = sideways
    upright = ask(module, *flags, flag, PICTURE, stdin=stdin)
    assert upright[0] == 0
    assert ask(module, *flags, flag, phone, stdin=stdin) == upright
    kept = ask(module, *flags, flag, phone, "--keep_orientation", stdin=stdin)
    assert kept == ask(module, *flags, flag, lying, stdin=stdin)
    assert kept != upright  # else the picture makes no difference


@pytest.mark.parametrize("name", COMMANDS)
def test_addresses_are_taken_and_what_is_none_is_one_sentence(ask, name):
    module, flags, flag, stdin = COMMANDS[name]
    assert ask(module, *flags, flag, as_address(PICTURE), stdin=stdin) == ask(module, *flags, flag, PICTURE, stdin=stdin)
    code, _, said = ask(module, *flags, flag, "http://127.0.0.1:1/a.png", stdin=stdin)
    assert code == 1 and said.startswith("error: http://127.0.0.1:1/a.png cannot be fetched") and said.count("\n") == 1


@pytest.mark.parametrize("name", ["chat", "minimonkey"])
def test_standard_input_is_a_picture_but_not_in_a_conversation(ask, name):
    module, flags, flag, _ = COMMANDS[name]
    assert ask(module, *flags, flag, "-", stdin=PICTURE.read_bytes()) == ask(module, *flags, flag, PICTURE)
    code, _, said = ask(module, *flags, flag, "-", "--interactive", stdin=PICTURE.read_bytes())
    assert code == 1 and said.startswith(f"error: {flag} - reads standard input") and said.count("\n") == 1


def test_llava_reads_questions_from_standard_input(ask):
    code, _, said = ask(llava_chat, *LLAVA, "--image-file", "-", stdin=b"What?\n")
    assert code == 1 and said.startswith("error: --image-file - reads standard input")


@pytest.mark.parametrize("name", COMMANDS)
def test_transparent_pictures_lie_on_what_is_asked_for(ask, tmp_path, name):
    module, flags, flag, stdin = COMMANDS[name]
    picture = Image.open(PICTURE).convert("RGBA")
    hidden = Image.new("L", picture.size, 255)
    hidden.paste(0, (0, 0, picture.width, picture.height // 2))
    picture.putalpha(hidden)
    picture.save(tmp_path / "clear.png")
    grounds = ("white", "black") if name == "chat" else ("white",)
    for ground in grounds:
        flat = Image.new("RGBA", picture.size, ground)
        Image.alpha_composite(flat, picture).convert("RGB").save(tmp_path / f"{ground}.png")
    shown = {g: ask(module, *flags, flag, tmp_path / f"{g}.png", stdin=stdin) for g in grounds}
    assert ask(module, *flags, flag, tmp_path / "clear.png", stdin=stdin) == shown["white"]
    if "black" in grounds:
        assert ask(module, *flags, flag, tmp_path / "clear.png", "--background", "black", stdin=stdin) == shown["black"]
    kept = ask(module, *flags, flag, tmp_path / "clear.png", "--background", "keep", stdin=stdin)
    assert kept == ask(module, *flags, flag, PICTURE, stdin=stdin)


def test_a_clip_comes_from_an_address_and_from_standard_input(ask, tmp_path):
    flags = [*QWEN2, "--num_segments", 2, "--text", "What is it?", "--video_path"]
    clip = chat_demo_video.DEMO_VIDEO
    expected = ask(chat_demo_video, *flags, clip)
    assert expected[0] == 0
    assert ask(chat_demo_video, *flags, as_address(clip, "video/mp4")) == expected
    assert ask(chat_demo_video, *flags, "-", stdin=clip.read_bytes()) == expected
    code, _, said = ask(chat_demo_video, *flags, "-", stdin=b"no clip at all")
    assert code == 1 and said.startswith("error: the given video cannot be read") and said.count("\n") == 1
    assert ask(chat_demo_video, *flags, "-", "--interactive", stdin=b"x")[0] == 1


def test_frames_of_a_folder_are_turned(ask, tmp_path, sideways):
    flags = [*QWEN2, "--num_segments", 2, "--text", "What is it?", "--video_path"]
    answers = {}
    for name, source in (("upright", PICTURE), ("phone", sideways[0]), ("lying", sideways[1])):
        (tmp_path / name).mkdir()
        for number in (1, 2):
            (tmp_path / name / f"{number}.png").write_bytes(source.read_bytes())
        answers[name] = ask(chat_demo_video, *flags, tmp_path / name)
    assert answers["phone"] == answers["upright"]
    assert ask(chat_demo_video, *flags, tmp_path / "phone", "--keep_orientation") == answers["lying"]


def test_more_frames_than_the_context_holds_are_refused_before_they_are_read(ask, tmp_path):
    (tmp_path / "clip.mp4").write_bytes(b"never opened")
    code, _, said = ask(chat_demo_video, *QWEN2, "--num_segments", 4000, "--video_path", tmp_path / "clip.mp4")
    room = load_reference("qwen2").model.config.llm_config.context_length
    assert code == 1 and said.startswith("error: --num_segments 4000 are at least 64000 tokens") and said.count("\n") == 1
    assert f"context is {room}: use at most {(room - 1) // 16}" in said


BEAMS = ["--num_beams", 3, "--num_return_sequences", 2]
OPTIONS = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 6}


def test_every_command_prints_the_best_answers_of_beams(ask):
    reference = load_reference("qwen2")
    code, said, _ = ask(chat_demo_video, *QWEN2, "--text", "Who?", "--video_path", "None", *BEAMS)
    assert code == 0 and said.splitlines() == reference.model.chat(reference.tokenizer, None, "Who?", OPTIONS)

    path = str(REFERENCE / "internlm2" / "checkpoint")
    model, tokenizer = MiniMonkeyChatModel.from_pretrained(path, dtype="float32", engine="eager"), load_tokenizer(path)
    pixels, grid, _ = multi_scale_tiles(open_image(PICTURE), model.config.image_size)
    for flag, compress in (("--scm", True), ("--no_scm", False)):
        several = model.chat(tokenizer, pixels, grid, "<image>\nRead.", OPTIONS, use_scm=compress)
        code, said, _ = ask(chat_demo_minimonkey, *MONKEY, "--text", "Read.", "--image_path", PICTURE, flag, *BEAMS)
        assert code == 0 and said.splitlines() == several and len(several) == 2

    session, _ = llava.model().session(llava.tokenizer())
    session.ask("Who?", None, OPTIONS)
    code, said, _ = ask(llava_chat, *LLAVA, *BEAMS, stdin=b"Who?\n")
    assert code == 0 and [line.split("ASSISTANT: ")[1] for line in said.splitlines()[:2]] == session.answers


def test_more_answers_than_beams_are_one_sentence(ask):
    for module, flags, flag, stdin in COMMANDS.values():
        code, _, said = ask(module, *flags, flag, PICTURE, "--num_return_sequences", 3, stdin=stdin)
        assert "error: num_return_sequences is 3, more than num_beams (1)" in said
        assert code == (0 if module is llava_chat else 1)  # where the conversation goes on
