"""Frame sampling against the original's numbers, and reading of exactly the frames that were asked for.

The videos are made here: each frame shows its own number as a pattern of black and white blocks.
"""

import json
import struct
import sys
import time
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from paddlemix.errors import ImageError, VideoError
from paddlemix.processors.internvl2 import frame_prefix, get_index, load_image, load_video, sample_frames

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "tests" / "data" / "reference"
DEMO_IMAGES = ROOT / "paddlemix" / "demo_images"
READERS = ["av", "opencv", pytest.param("decord", marks=pytest.mark.skipif(not find_spec("decord"), reason="no wheel here"))]


def numbered(number, width=64, height=48):
    bits = [number >> bit & 1 for bit in range(16)]
    return np.kron(np.reshape(bits, (4, 4, 1)), np.full((height // 4, width // 4, 3), 255)).astype(np.uint8)


def number_in(image):
    width, height = image.size
    blocks = np.asarray(image.convert("L")).reshape(4, height // 4, 4, width // 4).mean((1, 3)) > 127
    return sum(int(bit) << place for place, bit in enumerate(blocks.ravel()))


def numbers(frames):
    return [number_in(frame) for frame in frames]


def write(path, pictures, codec="libx264", rate=25, times=None, pix_fmt="yuv420p", container=None, colour=None, **options):
    """Encode pictures; ``times`` in 1/1000 s instead of a constant rate, ``colour`` one of FFmpeg's colour matrices."""
    time_base = Fraction(1, 1000) if times else Fraction(1, rate)
    with av.open(str(path), "w", options=container or {}) as output:
        stream = output.add_stream(codec, rate=rate, options={key.replace("_", "-"): str(o) for key, o in options.items()})
        stream.codec_context.time_base = time_base
        stream.pix_fmt = pix_fmt
        if colour:
            stream.codec_context.colorspace = colour
            stream.codec_context.color_range = 1
        for number, picture in enumerate(pictures):
            stream.height, stream.width = picture.shape[:2]
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = times[number] if times else number, time_base
            if colour:
                frame = frame.reformat(format=pix_fmt, dst_colorspace=colour, dst_color_range="MPEG")
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return path


def clip(path, num_frames=60, **options):
    return write(path, (numbered(number) for number in range(num_frames)), **options)


def turned(path, clockwise):
    """Ask players to turn the picture: the matrix in the track header of an MP4 file."""
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 4 + 40
    a, b, c, d = {90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}[clockwise]
    data[matrix : matrix + 36] = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    return path


def without_first_frames(path, source, num_frames):
    """Copy a video so that an edit list hides its first frames, as phones do when a video is trimmed."""
    with av.open(str(source)) as i, av.open(str(path), "w", options={"avoid_negative_ts": "disabled"}) as o:
        stream = i.streams.video[0]
        copy = o.add_stream_from_template(stream)
        for packet in i.demux(stream):
            if packet.dts is not None:
                shift = int(num_frames / stream.average_rate / packet.time_base)
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, copy
                o.mux(packet)
    return path


def only_sound(path):
    with av.open(str(path), "w") as output:
        stream = output.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return path


def test_indices_equal_the_original():
    cases = json.loads((REFERENCE / "frame_indices.json").read_text())
    wrong = [
        case
        for case in cases
        if get_index(case["bound"], case["fps"], case["num_frames"] - 1, num_segments=case["num_segments"]).tolist()
        != case["indices"]
    ]
    assert len(cases) == 200
    assert wrong == []


def test_prompt_lines():
    assert frame_prefix(2) == "Frame1: <image>\nFrame2: <image>\n"


MILLISECONDS = np.cumsum(np.random.default_rng(0).choice([33, 66, 99, 660], 60)).tolist()
VIDEOS = {
    "b_frames.mp4": {"g": 24, "bf": 3},
    "open_gop.mp4": {"x264_params": "open-gop=1:keyint=12:bframes=3:b-adapt=0:scenecut=0"},
    "gradual_refresh.mp4": {"x264_params": "intra-refresh=1:keyint=30"},
    "fragments.mp4": {"g": 12, "container": {"movflags": "frag_keyframe+empty_moov"}},
    "variable_rate.mp4": {"times": MILLISECONDS, "g": 24},
    "variable_rate.mkv": {"times": MILLISECONDS, "g": 24},
    "b_frames.avi": {"codec": "mpeg4", "bf": 2, "g": 12},
    "b_frames.mpg": {"codec": "mpeg2video", "bf": 2, "g": 12},
    "vp9.webm": {"codec": "libvpx-vp9", "g": 20, "deadline": "realtime", "cpu_used": 8},
    "one.mp4": {"num_frames": 1},
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", VIDEOS)
def test_readers_return_the_frames_asked_for(tmp_path, name, reader):
    options = {"num_frames": 60} | VIDEOS[name]
    path = clip(tmp_path / name, **options)
    total = options["num_frames"]
    assert numbers(sample_frames(path, total, sample="middle", reader=reader)) == list(range(total))
    expected = get_index(None, None, total - 1, num_segments=7).tolist()
    assert numbers(sample_frames(path, 7, reader=reader)) == expected


@pytest.mark.parametrize("reader", ["av", "opencv"])
@pytest.mark.parametrize("name", ["stream.ts", "stream.flv", "raw.h264"])
def test_streams_without_index(tmp_path, name, reader):
    path = clip(tmp_path / name, g=24, bf=3)
    assert numbers(sample_frames(path, 60, sample="middle", reader=reader)) == list(range(60))
    assert numbers(sample_frames(path, 1, reader=reader)) == [29]


@pytest.mark.parametrize("reader", ["av", "opencv"])
def test_edit_list_hides_frames(tmp_path, reader):
    path = without_first_frames(tmp_path / "trimmed.mp4", clip(tmp_path / "whole.mp4", g=24, bf=3), 7)
    assert numbers(sample_frames(path, 53, sample="middle", reader=reader)) == list(range(7, 60))


def test_vp8_frames_that_are_never_shown(tmp_path):
    source, path = clip(tmp_path / "whole.webm", codec="libvpx", deadline="realtime"), tmp_path / "hidden.webm"
    with av.open(str(source)) as i, av.open(str(path), "w") as o:
        copy = o.add_stream_from_template(i.streams.video[0])
        for number, packet in enumerate(p for p in i.demux(video=0) if p.size):
            data = bytearray(bytes(packet))
            data[0] &= 0xEF if number % 10 == 7 else 0xFF  # "show_frame" of RFC 6386, section 9.1
            changed = av.Packet(bytes(data))
            changed.pts, changed.dts, changed.time_base = packet.pts, packet.dts, packet.time_base
            changed.is_keyframe, changed.stream = packet.is_keyframe, copy
            o.mux(changed)
    expected = [number for number in range(60) if number % 10 != 7]
    assert numbers(sample_frames(path, len(expected), sample="middle", reader="av")) == expected


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("clockwise", "turn"),
    [(90, Image.Transpose.ROTATE_270), (180, Image.Transpose.ROTATE_180), (270, Image.Transpose.ROTATE_90)],
)
def test_pictures_are_upright(tmp_path, reader, clockwise, turn):
    path = write(tmp_path / "phone.mp4", [numbered(number, 128, 96) for number in range(20)])
    stored = sample_frames(path, 1, reader=reader)[0]
    upright = sample_frames(turned(path, clockwise), 1, reader=reader)[0]
    assert upright.tobytes() == stored.transpose(turn).tobytes()


@pytest.mark.parametrize(
    ("codec", "options"), [("libx264", {"x264_params": "b-pyramid=normal:keyint=50"}), ("mpeg4", {"bf": 2})]
)
def test_leaving_out_frames_that_no_other_refers_to_changes_no_pixel(tmp_path, codec, options):
    background = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8).repeat(2, 0).repeat(2, 1)
    pictures = (np.roll(background, 3 * number, axis=1) for number in range(60))
    path = write(tmp_path / "noise.mp4", pictures, codec=codec, **options)
    every = sample_frames(path, 60, sample="middle", reader="av")
    some = sample_frames(path, 9, reader="av")
    expected = [every[index] for index in get_index(None, None, 59, num_segments=9)]
    assert [frame.tobytes() for frame in some] == [frame.tobytes() for frame in expected]


@pytest.mark.parametrize("colour", [1, 5])
def test_colour_matrix_of_the_file_is_used(tmp_path, colour):
    red, green = np.full((48, 32, 3), (200, 40, 30), np.uint8), np.full((48, 32, 3), (40, 180, 60), np.uint8)
    picture = np.concatenate([red, green], axis=1)
    frame = sample_frames(write(tmp_path / "colours.mp4", [picture] * 3, colour=colour, crf=1), 1, reader="av")[0]
    np.testing.assert_allclose(np.asarray(frame)[:, 4:28], red[:, 4:28], atol=4)
    np.testing.assert_allclose(np.asarray(frame)[:, 36:60], green[:, 4:28], atol=4)


@pytest.mark.parametrize("reader", READERS[1:])
def test_readers_agree_on_every_pixel(tmp_path, reader):
    pictures = [np.random.default_rng(n).integers(0, 256, (12, 16, 3), np.uint8).repeat(8, 0).repeat(8, 1) for n in range(9)]
    path = write(tmp_path / "noise.mp4", pictures, bf=2)
    by_av, by_other = (np.stack(sample_frames(path, 4, reader=name)).astype(int) for name in ("av", reader))
    assert np.abs(by_av - by_other).max() <= 1


@pytest.mark.slow
def test_two_hours_are_not_decoded_to_sample_eight_frames(tmp_path):
    path = clip(tmp_path / "long.mp4", 36000, rate=5, preset="ultrafast", g=250, crf=40)
    start = time.perf_counter()
    frames = sample_frames(path, 8, reader="av")
    sampling = time.perf_counter() - start
    with av.open(str(path)) as container:
        container.streams.video[0].thread_type = "AUTO"
        start = time.perf_counter()
        assert sum(1 for _ in container.decode(video=0)) == 36000
        decoding = time.perf_counter() - start
    assert numbers(frames) == get_index(None, None, 35999, num_segments=8).tolist()
    assert sampling < decoding
    assert sampling < 10


def test_bound_is_in_seconds(tmp_path):
    path = clip(tmp_path / "ten_seconds.mp4", 100, rate=10)
    assert numbers(sample_frames(path, 4, bound=(2, 6))) == get_index((2, 6), 10, 99, num_segments=4).tolist()
    for end in (10, 1000, float("inf")):
        assert numbers(sample_frames(path, 4, bound=(5.0, end))) == get_index((5, 9.9), 10, 99, num_segments=4).tolist()
    assert set(numbers(sample_frames(path, 30, bound=(3, 4), sample="rand"))) <= set(range(30, 41))


@pytest.mark.parametrize("reader", ["av", "opencv"])
def test_bound_follows_time_stamps_where_the_declared_rate_is_wrong(tmp_path, reader):
    path = clip(tmp_path / "two_a_second.mkv", 40, rate=25, times=list(range(0, 20_000, 500)))
    assert numbers(sample_frames(path, 1, bound=(10, 12), reader=reader)) == [22]


@pytest.mark.parametrize(
    "bound", [(5, 2), (2, 2), (-1, 3), (float("inf"), float("inf")), (float("nan"), 2), (11, 12), (1,), 3, "ab"]
)
def test_impossible_bounds(tmp_path, bound):
    path = clip(tmp_path / "ten_seconds.mp4", 100, rate=10)
    with pytest.raises(VideoError, match="bound"):
        load_video(path, bound=bound)


def test_random_frames_come_from_their_interval_and_repeat_with_the_seed(tmp_path):
    path = clip(tmp_path / "a.mp4")
    first = numbers(sample_frames(path, 6, sample="rand", rng=1))
    assert all(10 * k <= number < 10 * (k + 1) for k, number in enumerate(first))
    assert numbers(sample_frames(path, 6, sample="rand", rng=np.random.default_rng(1))) == first
    assert len({tuple(numbers(sample_frames(path, 6, sample="rand", rng=seed))) for seed in range(5)}) > 1


def test_middle_frames_and_too_short_videos(tmp_path):
    path = clip(tmp_path / "a.mp4", 6)
    assert numbers(sample_frames(path, 2, sample="middle")) == [1, 4]
    assert numbers(sample_frames(path, 8, sample="rand", rng=0)) == [0, 1, 2, 3, 4, 5, 5, 5]
    assert numbers(sample_frames(path, 12)) == get_index(None, None, 5, num_segments=12).tolist()


def test_load_video_tiles_each_frame(tmp_path):
    path = write(tmp_path / "wide.mp4", [numbered(n, 128, 64) for n in range(9)])
    frames = sample_frames(path, 3)
    pixels, num_patches = load_video(path, input_size=28, max_num=6, num_segments=3)
    assert num_patches == [3, 3, 3]
    assert np.array_equal(pixels, np.concatenate([load_image(frame, 28, max_num=6) for frame in frames]))
    pixels, num_patches = load_video(path, input_size=28, num_segments=3)
    assert (pixels.shape, pixels.dtype, num_patches) == ((3, 3, 28, 28), np.float32, [1, 1, 1])


@pytest.mark.parametrize("kind", ["gif", "webp", "png"])
def test_animated_pictures(tmp_path, kind):
    pictures = [Image.fromarray(numbered(number)) for number in range(20)]
    path = tmp_path / f"a.{kind}"
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=100)
    assert numbers(sample_frames(path, 5)) == get_index(None, None, 19, num_segments=5).tolist()
    assert numbers(sample_frames(path, 2, bound=(1, 1.8))) == get_index((1, 1.8), 10, 19, num_segments=2).tolist()


def test_gif_cut_off(tmp_path):
    pictures = [Image.effect_noise((64, 48), 90) for _ in range(9)]
    path = tmp_path / "a.gif"
    pictures[0].save(path, save_all=True, append_images=pictures[1:])
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(VideoError, match="cut off"):
        sample_frames(path, 1)


def test_folder_of_frames_in_natural_order(tmp_path):
    for number in range(12):
        Image.fromarray(numbered(number)).save(tmp_path / f"frame{number}.png")
    (tmp_path / "notes.txt").write_text("not a frame")
    (tmp_path / "._frame0.png").write_bytes(b"what macOS leaves behind")
    assert numbers(sample_frames(tmp_path, 12, sample="middle")) == list(range(12))
    with pytest.raises(VideoError, match="no frame rate"):
        sample_frames(tmp_path, 2, bound=(0, 1))
    (tmp_path / "frame11.png").write_bytes(b"broken")
    with pytest.raises(ImageError, match=r"frame11\.png"):
        sample_frames(tmp_path, 12, sample="middle")


def cut(path, source, part=0.5):
    path.write_bytes(source.read_bytes()[: int(source.stat().st_size * part)])
    return path


def scrambled(path, source):
    data = bytearray(source.read_bytes())
    data[len(data) // 2 :] = np.random.default_rng(0).bytes(len(data) - len(data) // 2)
    path.write_bytes(data)
    return path


def written(path, data):
    path.write_bytes(data)
    return path


def broken_files(folder):
    """(file, what the message must say)"""
    fast = clip(folder / "fast.mp4", 300, g=50, container={"movflags": "faststart"})
    with av.open(str(folder / "no_frame.mp4"), "w") as output:
        stream = output.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        output.start_encoding()
    still = folder / "still.jpg"
    Image.new("RGB", (8, 8)).save(still)
    (folder / "frames").mkdir()
    playlist = b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n"
    return {
        "missing": (folder / "missing.mp4", "does not exist"),
        "empty": (written(folder / "empty.mp4", b""), "is empty"),
        "text": (written(folder / "text.mp4", b"hello\n" * 99), "cannot be read"),
        "playlist": (written(folder / "list.m3u8", playlist), "cannot be read"),
        "only sound": (only_sound(folder / "sound.mp4"), "no video stream|holds no video"),
        "no frame": (folder / "no_frame.mp4", "no video stream|holds no"),
        "header only": (cut(folder / "cut.mp4", fast), "cut off"),
        "no header": (cut(folder / "index_last.mp4", clip(folder / "last.mp4", 300)), "cannot be read"),
        "Matroska": (cut(folder / "cut.mkv", clip(folder / "whole.mkv", 300, g=50)), "cut off"),
        "scrambled": (scrambled(folder / "scrambled.mp4", fast), "damaged"),
        "still": (still, "still JPEG picture"),
        "empty folder": (folder / "frames", "folder without pictures"),
    }


@pytest.mark.parametrize("reader", ["av", "opencv"])
def test_broken_files_end_in_one_sentence(tmp_path, reader, capfd):
    for kind, (path, problem) in broken_files(tmp_path).items():
        with pytest.raises(VideoError, match=problem) as error:
            load_video(path, input_size=28, num_segments=60, reader=reader)
        assert path.name in str(error.value), kind
        assert "\n" not in str(error.value), kind
    assert capfd.readouterr().err == ""


def test_damage_elsewhere_does_not_matter(tmp_path):
    source = clip(tmp_path / "whole.mp4", 300, g=25, container={"movflags": "faststart"})
    path = scrambled(tmp_path / "scrambled.mp4", source)
    assert numbers(sample_frames(path, 1, bound=(0, 2), reader="av")) == [25]


@pytest.mark.parametrize("reader", READERS)
def test_bundled_clip_shows_a_blue_square_on_its_way_down(reader):
    frames = np.stack(sample_frames(DEMO_IMAGES / "clip.mp4", 4, reader=reader)).astype(int)
    rows = [np.flatnonzero((frame[..., 2] - frame[..., 0] > 128).any(axis=1)).mean() for frame in frames]
    assert all(later - earlier > frames.shape[1] / 12 for earlier, later in zip(rows, rows[1:]))
    # As tools/draw_demo_images.py draws frames 1, 5, 9 and 12: 80 pixels in 15 steps, the middle of them at 84.
    assert np.allclose(rows, [84 + (number / 15 - 0.5) * 80 for number in (1, 5, 9, 12)], atol=1.5)


def test_four_k(tmp_path):
    picture = numbered(5, 3840, 2160)
    path = write(tmp_path / "large.mp4", [picture] * 4, preset="ultrafast")
    pixels, num_patches = load_video(path, input_size=28, max_num=2, num_segments=2)
    assert pixels.shape == (6, 3, 28, 28)
    assert num_patches == [3, 3]


def test_reader_is_chosen_by_argument_then_environment_then_what_is_installed(tmp_path, monkeypatch):
    # The readers differ in the colours of a BT.709 file, which tells them apart.
    path = write(tmp_path / "a.mp4", [np.full((48, 64, 3), (200, 40, 30), np.uint8)] * 3, colour=1)
    by_av, by_opencv = (sample_frames(path, 1, reader=reader)[0].tobytes() for reader in ("av", "opencv"))
    assert by_av != by_opencv
    assert sample_frames(path, 1)[0].tobytes() == by_av
    monkeypatch.setenv("PADDLEMIX_VIDEO_READER", "opencv")
    assert sample_frames(path, 1)[0].tobytes() == by_opencv
    assert sample_frames(path, 1, reader="av")[0].tobytes() == by_av
    monkeypatch.setenv("PADDLEMIX_VIDEO_READER", "imageio")
    with pytest.raises(VideoError, match="choose auto, av, opencv, decord"):
        sample_frames(path, 1)
    monkeypatch.delenv("PADDLEMIX_VIDEO_READER")
    monkeypatch.setitem(sys.modules, "av", None)  # as if it were not installed
    assert sample_frames(path, 1)[0].tobytes() == by_opencv
    with pytest.raises(VideoError, match="pip install av"):
        sample_frames(path, 1, reader="av")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [({"num_segments": 0}, "num_segments"), ({"sample": "first"}, "segment, middle, rand"), ({"reader": "cv"}, "reader 'cv'")],
)
def test_arguments_that_make_no_sense(tmp_path, arguments, problem):
    with pytest.raises(VideoError, match=problem):
        sample_frames(clip(tmp_path / "a.mp4", 3), **arguments)


def test_a_video_must_be_a_path():
    with pytest.raises(VideoError, match="not bytes"):
        sample_frames(b"ftyp")
