"""Tiling and normalisation against the original implementation's numbers, and behaviour on unusual or broken pictures."""

import io
import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from paddlemix.errors import ImageError
from paddlemix.processors.internvl2 import (
    NORMALIZATION,
    dynamic_preprocess,
    find_closest_aspect_ratio,
    load_image,
    open_image,
    sample_frames,
    target_grids,
    to_pixels,
)
from tests.conftest import SAME_PILLOW, assert_pixels

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "tests" / "data" / "reference"
DEMO_IMAGES = ROOT / "paddlemix" / "demo_images"


def noise(width, height, mode="RGB", seed=0):
    bands = len(Image.new(mode, (1, 1)).getbands())
    array = np.random.default_rng(seed).integers(0, 256, (height, width, bands), dtype=np.uint8)
    return Image.frombytes(mode, (width, height), array.tobytes())


def encode(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, **options)
    return buffer.getvalue()


def test_grid_choice_equals_the_original():
    tiling = json.loads((REFERENCE / "tiling.json").read_text())
    wrong = [
        (width, height, low, high, across, down)
        for width, height, low, high, across, down in tiling["rows"]
        if find_closest_aspect_ratio(width / height, target_grids(low, high), width, height, tiling["image_size"])
        != (across, down)
    ]
    assert len(tiling["rows"]) == 1896
    assert wrong == []


@pytest.mark.parametrize(("low", "high"), [(1, 1), (1, 6), (2, 7), (4, 12), (1, 40)])
def test_grids_are_all_grids_of_allowed_area(low, high):
    grids = target_grids(low, high)
    every = {(i, j) for i in range(1, high + 1) for j in range(1, high + 1) if low <= i * j <= high}
    assert set(grids) == every
    assert len(grids) == len(every)
    areas = [i * j for i, j in grids]
    assert areas == sorted(areas)


def test_large_picture_takes_the_larger_of_two_grids_of_one_shape():
    grids = target_grids(1, 6)
    assert find_closest_aspect_ratio(1.0, grids, 100, 100, 448) == (1, 1)
    # 2x2 tiles have 4 * 448**2 pixels: just above and just below half of that
    assert find_closest_aspect_ratio(1.0, grids, 634, 634, 448) == (2, 2)
    assert find_closest_aspect_ratio(1.0, grids, 633, 633, 448) == (1, 1)


@pytest.mark.parametrize("index", [0, 1])
def test_pixels_equal_the_original(index):
    expected = np.load(REFERENCE / f"pixels_448_img{index}.npz")
    pixels = load_image(REFERENCE / "images" / f"img{index}.png", max_num=6)
    assert pixels.dtype == np.float32
    assert pixels.shape == (int(expected["n_tiles"]), 3, 448, 448)
    mean = 1e-5 if SAME_PILLOW else 1e-3
    assert_pixels(pixels[:, :, ::16, ::16], expected["strided"], min(NORMALIZATION["imagenet"][1]))
    np.testing.assert_allclose(pixels.mean((2, 3)), expected["mean"], rtol=0, atol=mean)
    np.testing.assert_allclose(pixels.std((2, 3), ddof=1), expected["std"], rtol=0, atol=mean)


@pytest.mark.parametrize("family", ["qwen2", "internlm2", "phi3", "llama_vit6b"])
def test_number_of_tiles_at_112_equals_the_original(family):
    expected = json.loads((REFERENCE / family / "expected.json").read_text())["num_tiles"]
    assert [len(load_image(REFERENCE / "images" / f"img{k}.png", 112, max_num=6)) for k in range(4)] == expected


@pytest.mark.parametrize("normalize_type", ["imagenet", "clip", "siglip"])
def test_normalisation_is_the_plain_formula(normalize_type):
    images = [noise(20, 12, seed=seed) for seed in range(3)]
    mean, std = np.array(NORMALIZATION[normalize_type])
    expected = np.stack([(np.asarray(image) / 255 - mean) / std for image in images]).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(to_pixels(images, normalize_type), expected, rtol=0, atol=1e-6)


def test_tiles_put_together_are_the_resized_picture_and_the_thumbnail_comes_last():
    image = noise(300, 200)
    tiles = dynamic_preprocess(image, max_num=6, image_size=32, use_thumbnail=True)
    resized = Image.new("RGB", (96, 64))
    for number, tile in enumerate(tiles[:-1]):
        resized.paste(tile, (number % 3 * 32, number // 3 * 32))
    assert len(tiles) == 7
    assert resized.tobytes() == image.resize((96, 64)).tobytes()
    assert tiles[-1].tobytes() == image.resize((32, 32)).tobytes()


def test_a_single_tile_gets_no_thumbnail():
    assert len(dynamic_preprocess(noise(30, 30), image_size=32, use_thumbnail=True)) == 1
    assert load_image(noise(300, 200), 32, max_num=6, use_thumbnail=False).shape[0] == 6


def test_one_tile_without_dynamic_tiling():
    image = noise(300, 200)
    assert np.array_equal(load_image(image, 32, dynamic=False), to_pixels([image.resize((32, 32))]))


def test_pad2square_centres_the_picture_on_the_mean_colour():
    image = noise(64, 32)
    pixels = load_image(image, 64, dynamic=False, pad2square=True)[0]
    assert np.array_equal(pixels[:, 16:48], to_pixels([image])[0])
    grey = to_pixels([Image.new("RGB", (1, 1), (123, 116, 103))])[0]  # 255 * (.485, .456, .406), rounded down
    assert np.array_equal(pixels[:, :16], np.broadcast_to(grey, (3, 16, 64)))
    assert np.array_equal(pixels[:, 48:], np.broadcast_to(grey, (3, 16, 64)))


def test_every_way_to_hand_over_a_picture_gives_the_same_pixels(tmp_path):
    image, path = noise(50, 40), tmp_path / "a.png"
    image.save(path)
    expected = load_image(image, 28)
    with path.open("rb") as file:
        for source in (path, str(path), path.read_bytes(), bytearray(path.read_bytes()), file):
            assert np.array_equal(load_image(source, 28), expected)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"])
def test_modes_become_rgb_as_pillow_converts_them(mode):
    image = noise(16, 16).convert("1") if mode == "1" else noise(16, 16, mode)
    if mode == "P":
        image.putpalette(np.random.default_rng(1).integers(0, 256, 768, dtype=np.uint8).tobytes())
    assert open_image(image).tobytes() == image.convert("RGB").tobytes()


@pytest.mark.parametrize("transparency", [7, bytes(range(256))])
def test_palette_with_transparency_keeps_its_colours(transparency, recwarn):
    image = noise(16, 16, "P")
    image.putpalette(np.random.default_rng(1).integers(0, 256, 768, dtype=np.uint8).tobytes())
    expected = image.convert("RGB")
    read = open_image(encode(image, format="PNG", transparency=transparency))
    assert read.tobytes() == expected.tobytes()
    assert not recwarn.list


def test_sixteen_bit_greys_are_scaled_not_clipped():
    ramp = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    eight_bits = Image.fromarray((ramp >> 8).astype(np.uint8)).convert("RGB")
    for array in (ramp, ramp.astype(np.int32), ramp.astype(np.float32)):
        assert open_image(Image.fromarray(array)).tobytes() == eight_bits.tobytes()
    assert open_image(encode(Image.fromarray(ramp), format="PNG")).tobytes() == eight_bits.tobytes()


def test_integer_and_float_greys_of_eight_bit_range_stay_as_they_are():
    ramp = np.arange(256).reshape(16, 16)
    expected = Image.fromarray(ramp.astype(np.uint8)).convert("RGB").tobytes()
    assert open_image(Image.fromarray(ramp.astype(np.int32))).tobytes() == expected
    assert open_image(Image.fromarray(ramp.astype(np.float32))).tobytes() == expected
    assert open_image(Image.fromarray((ramp / 255).astype(np.float32))).tobytes() == expected


def test_premultiplied_alpha():
    image = Image.new("RGBA", (4, 4), (200, 100, 50, 255))
    assert open_image(image.convert("RGBa")).getpixel((0, 0)) == (200, 100, 50)
    assert open_image(Image.new("LA", (4, 4), (90, 255)).convert("La")).getpixel((0, 0)) == (90, 90, 90)


def test_exif_orientation_is_ignored_unless_asked_for():
    image = noise(20, 10)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    data = encode(image, format="PNG", exif=exif)
    assert open_image(data).size == (20, 10)
    assert open_image(data, exif_orientation=True).tobytes() == image.transpose(Image.Transpose.ROTATE_270).tobytes()


def test_first_frame_of_an_animation():
    first, second = noise(16, 16), noise(16, 16, seed=1)
    data = encode(first, format="WEBP", save_all=True, append_images=[second], lossless=True)
    assert open_image(data).tobytes() == first.tobytes()


def test_bad_paths(tmp_path):
    (tmp_path / "empty.png").touch()
    for path, problem in (
        (tmp_path / "missing.png", "does not exist"),
        (tmp_path, "is a folder"),
        (tmp_path / "empty.png", "is empty"),
        ("a\0b.png", "cannot be read"),
    ):
        with pytest.raises(ImageError, match=problem):
            load_image(path)


@pytest.mark.parametrize(
    "data",
    [b"hello " * 100, b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"\0\0\0\x18ftypisom" + bytes(100), b"%!PS-Adobe-3.0 EPSF"],
)
def test_what_is_not_a_picture_is_told_the_formats(tmp_path, data):
    path = tmp_path / "file.png"
    path.write_bytes(data)
    with pytest.raises(ImageError, match=r"file\.png.*JPEG, PNG, WebP"):
        load_image(path)


def test_other_objects_are_refused():
    with pytest.raises(ImageError, match="must be uint8"):
        load_image(np.zeros((4, 4, 3)))
    with pytest.raises(ImageError, match="text mode"):
        load_image(io.StringIO("x"))
    with pytest.raises(ImageError, match="no pixels"):
        load_image(Image.new("RGB", (0, 5)))


@pytest.mark.parametrize("tolerant", [False, True])
@pytest.mark.parametrize(
    "options", [{"format": "JPEG"}, {"format": "PNG"}, {"format": "WEBP"}, {"format": "GIF"}, {"format": "BMP"}]
)
def test_half_a_picture_is_never_accepted(monkeypatch, options, tolerant):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", tolerant)  # other libraries set this for the whole process
    data = encode(noise(64, 48), **options)
    whole = open_image(data).tobytes()
    refused = 0
    for end in [*range(1, len(data), len(data) // 40), *range(len(data) - 20, len(data))]:
        try:
            # The last bytes may be mere end marks: what is accepted must be the whole picture.
            assert open_image(data[:end]).tobytes() == whole
        except ImageError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 30
    assert ImageFile.LOAD_TRUNCATED_IMAGES is tolerant


@pytest.mark.parametrize("pillow_limit", [True, False])
def test_decompression_bomb(monkeypatch, pillow_limit):
    if not pillow_limit:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    with pytest.raises(ImageError, match="pixels"):
        load_image(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b""))


def test_endless_strip_is_not_padded_to_a_square():
    with pytest.raises(ImageError, match="too long to pad"):
        load_image(Image.new("L", (100_000, 1)), dynamic=False, pad2square=True)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"min_num": 5, "max_num": 2}, "min_num"),
        ({"min_num": 0}, "min_num"),
        ({"input_size": 0}, "tile size"),
        ({"input_size": -448}, "tile size"),
        ({"input_size": 44.8}, "tile size"),
        ({"normalize_type": "imagent"}, "imagenet, clip, siglip"),
    ],
)
def test_arguments_that_make_no_sense(arguments, problem):
    with pytest.raises(ImageError, match=problem):
        load_image(noise(8, 8), **arguments)


def test_no_framework_is_imported():
    code = (
        "import sys, paddlemix.processors.internvl2; print([m for m in ('paddle', 'torch', 'av', 'cv2') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT).stdout.strip() == "[]"


def test_bundled_files_are_small_and_attributed():
    attribution = (DEMO_IMAGES / "ATTRIBUTION.md").read_text()
    files = [path for path in DEMO_IMAGES.iterdir() if path.name != "ATTRIBUTION.md"]
    assert files
    assert [path.name for path in files if f"| `{path.name}` |" not in attribution] == []
    assert [path.name for path in files if path.stat().st_size > 200_000] == []


def test_bundled_scenes_and_clips_can_be_drawn_again(tmp_path):
    subprocess.run([sys.executable, ROOT / "tools" / "draw_demo_images.py", tmp_path], check=True, capture_output=True)
    drawn = sorted(path.name for path in tmp_path.iterdir())
    assert drawn == ["clip.mp4", *(f"scene_{number}.png" for number in range(1, 6))]
    for name in drawn:
        read = open_image if name.endswith("png") else lambda path: sample_frames(path, 1)[0]
        bundled, redrawn = (np.asarray(read(folder / name)).astype(int) for folder in (DEMO_IMAGES, tmp_path))
        assert np.abs(bundled - redrawn).mean() < 1, name  # fonts and encoders differ a little between versions
