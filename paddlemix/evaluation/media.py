"""Pictures of a question to tiles."""

import io

import numpy as np


def tiles(question, task, config, dynamic, max_num):
    """The tiles of a question's pictures.

    Args:
        question: a :class:`~.rows.Question`.
        task: its :class:`~.tasks.Task`.
        config: the model's configuration.
        dynamic: whether pictures are tiled; otherwise each is one tile, squeezed.
        max_num: most tiles of a picture.

    Returns:
        (pixel_values float32 ``[T, 3, H, W]`` or None, tiles of each picture, what is put before the question).

    Raises:
        ImageError, VideoError: a picture cannot be read.
    """
    from PIL import Image

    from paddlemix.processors.image import dynamic_preprocess, open_image, to_pixels

    pictures = frames(question) if question.clip else [open_image(source) for source in question.pictures]
    if not pictures:
        return None, [], ""
    most = {"shared": max_num // len(pictures), "pages": min(max_num, 64 // len(pictures)), "frames": 1}.get(
        task.tiling, max_num
    )
    size, parts = config.image_size, []
    for number, picture in enumerate(pictures):
        if not (dynamic or task.always_dynamic):
            parts.append(to_pixels([picture.resize((size, size), Image.Resampling.BICUBIC)]))
            continue
        limit = max(1, most)
        if task.tiling == "mmmu":
            if number == 0:
                picture = picture.resize((picture.width * 2, picture.height * 2), Image.Resampling.BILINEAR)
            limit = limit if number == 0 else 1
        parts.append(to_pixels(dynamic_preprocess(picture, 1, limit, size, config.use_thumbnail)))
    counts = [len(part) for part in parts]
    total = sum(counts)
    marked = (task.marks == "several" and len(counts) > 1) or (task.marks == "tiles" and total > 1)
    marks = "".join(f"Image-{i + 1}: <image>\n" for i in range(len(counts))) if marked else ""
    return np.concatenate(parts), [total] if task.tiling == "mmmu" else counts, marks


def frames(question, count=16):
    """The frames of a question's clip, as MVBench takes them."""
    import os

    from paddlemix.processors.image import open_image
    from paddlemix.processors.video import get_index, sample_frames

    path, bound = question.pictures[0], question.clip["bound"]
    if not question.clip["folder"]:
        return sample_frames(path, count, bound)
    from paddlemix.errors import VideoError

    try:
        last = len(os.listdir(path))  # frames 00001.jpg, ... at 3 a second
    except OSError:
        raise VideoError(f"the folder of frames {path} is missing: get it again") from None
    return [open_image(f"{path}/{index:05d}.jpg") for index in get_index(bound, 3, last, 1, count)]


def encoded(source):
    """Bytes of a picture file or of a PIL picture, for a server."""
    if isinstance(source, (bytes, bytearray)):
        return bytes(source)
    if isinstance(source, str):
        from paddlemix.processors.image import open_image

        open_image(source)  # says what is wrong with it
        with open(source, "rb") as file:
            return file.read()
    stream = io.BytesIO()
    source.save(stream, "PNG")
    return stream.getvalue()
