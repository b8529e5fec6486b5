"""Videos to pixel arrays: which frames to take, and reading exactly those.

Whatever reads the file, frame n is the n-th picture a player shows (presentation order, edit lists applied), turned upright
as the file asks. Pixels are taken as square, as the original implementation does.
"""

from contextlib import closing

import numpy as np

from paddlemix.errors import VideoError
from paddlemix.processors.image import dynamic_preprocess, to_pixels
from paddlemix.processors.video_readers import open_video
from paddlemix.validation import SEGMENTS, check

SAMPLES = ("segment", "middle", "rand", "interval")


def load_video(
    path,
    bound=None,
    input_size=448,
    max_num=1,
    num_segments=32,
    use_thumbnail=True,
    normalize_type="imagenet",
    reader="auto",
    exif_orientation=False,
    background=None,
):
    """Read frames spread evenly over a video and return their normalised tiles.

    Args:
        path: a video file, an animated GIF, WebP, PNG or AVIF, or a folder of frames in natural order of their names.
        bound: (start, end) in seconds; an end past the last frame, such as ``inf``, is cut to it. None takes the whole video.
        input_size, max_num, use_thumbnail, normalize_type: tiling of each frame, see ``load_image``.
        num_segments: number of frames; a shorter video repeats some.
        reader: see :func:`sample_frames`.
        exif_orientation, background: see ``open_image``, for the pictures of a folder and of an animation.

    Returns:
        pixel_values: float32 array [tiles of all frames, 3, input_size, input_size].
        num_patches_list: number of tiles of each frame.

    Raises:
        VideoError: the video cannot be read, is cut off, or has no frame within ``bound``.
        ImageError: a frame of a folder cannot be read, or the tiling makes no sense.
    """
    pixels = []
    look = dict(exif_orientation=exif_orientation, background=background)
    for frame in _iterate_frames(path, num_segments, bound, "segment", None, reader, look):
        tiles = dynamic_preprocess(frame, max_num=max_num, image_size=input_size, use_thumbnail=use_thumbnail)
        pixels.append(to_pixels(tiles, normalize_type))
    return np.concatenate(pixels), [len(tiles) for tiles in pixels]


def sample_frames(path, num_segments=32, bound=None, sample="segment", rng=None, reader="auto"):
    """Read ``num_segments`` frames of a video: a list of RGB PIL images in the video's own size.

    Args:
        path, bound: see :func:`load_video`.
        sample: "segment" takes the frames that inference takes (:func:`get_index`); for training, "middle" and "rand" cut
            the video into ``num_segments`` intervals and take the middle or a random frame of each, and repeat the last
            frame where the video has too few; "interval" is :func:`interval_indices`.
        rng: numpy Generator or seed for "rand".
        reader: "av", "opencv" or "decord", to compare them; "auto" is the environment variable PADDLEMIX_VIDEO_READER, or
            else the first that is installed, in this order. OpenCV ignores the colour matrix that a file declares and
            decord decodes from the start of the file, since its seeking returns wrong frames around open GOPs.

    Raises:
        VideoError, ImageError: as for :func:`load_video`.
    """
    return list(_iterate_frames(path, num_segments, bound, sample, rng, reader))


def get_index(bound, fps, max_frame, first_idx=0, num_segments=32):
    """Indices of the middle frames of ``num_segments`` equal segments (InternVL's rule for inference).

    Args:
        bound: (start, end) in seconds, or None for the whole video.
        fps: frames per second; unused without ``bound``.
        max_frame: index of the last frame.
        first_idx: index of the first frame.

    Returns:
        int64 array [num_segments], ascending.
    """
    start, end = _frame_range(bound, fps, max_frame, first_idx)
    length = (end - start) / num_segments
    return np.array([int(start + length / 2 + round(length * k)) for k in range(num_segments)], dtype=np.int64)


def interval_indices(first, last, num_segments):
    """Indices of the middle frames of intervals of ``ceil(frames / num_segments)`` (InternVL's rule for video retrieval).

    An interval that begins or has its middle beyond ``last`` gives that, where the original stops with an error.
    """
    interval = -(-(last - first + 1) // num_segments)
    return np.minimum(first + np.arange(num_segments) * interval + interval // 2, last).astype(np.int64)


def frame_prefix(num_frames):
    """The prompt's lines for a video: one numbered ``<image>`` a frame."""
    return "".join(f"Frame{number}: <image>\n" for number in range(1, num_frames + 1))


def _iterate_frames(path, num_segments, bound, sample, rng, reader, look=None):
    check({"num_segments": num_segments}, {"num_segments": SEGMENTS}, error=VideoError)
    if sample not in SAMPLES:
        raise VideoError(f"sample {sample!r} is unknown; choose one of {', '.join(SAMPLES)}")
    with closing(open_video(path, reader, look)) as video:
        max_frame, fps = video.num_frames - 1, None
        if max_frame < 0:
            raise VideoError(f"{video.name} holds no frame; replace it")
        if bound is not None:
            fps = video.fps
            bound = _checked_bound(video.name, bound, fps, max_frame)
        if sample == "interval":
            indices = interval_indices(*_frame_range(bound, fps, max_frame), num_segments)
        elif sample == "segment":
            indices = get_index(bound, fps, max_frame, num_segments=num_segments)
        else:
            indices = _interval_indices(*_frame_range(bound, fps, max_frame), num_segments, sample, rng)
        indices, repeats = np.unique(indices, return_counts=True)
        for frame, times in zip(video.frames(indices.tolist()), repeats, strict=True):
            yield from [frame] * times


def _frame_range(bound, fps, max_frame, first_idx=0):
    """First and last frame of ``bound`` seconds."""
    if bound is None:
        return first_idx, max_frame
    return max(first_idx, round(bound[0] * fps)), min(round(bound[1] * fps), max_frame)


def _interval_indices(first, last, num_segments, sample, rng):
    """One frame of each of ``num_segments`` intervals of first..last, the last one repeated if there are too few."""
    edges = np.linspace(first, last + 1, min(num_segments, last - first + 1) + 1).astype(np.int64)
    if sample == "rand":
        indices = np.random.default_rng(rng).integers(edges[:-1], edges[1:])
    else:
        indices = (edges[:-1] + edges[1:] - 1) // 2
    return np.pad(indices, (0, num_segments - len(indices)), mode="edge")


def _checked_bound(name, bound, fps, max_frame):
    try:
        start, end = (float(second) for second in bound)
    except (TypeError, ValueError):
        raise VideoError(f"bound must be a pair (start, end) in seconds, not {bound!r}") from None
    if not 0 <= start < end:
        raise VideoError(f"bound {bound!r} must satisfy 0 <= start < end, in seconds")
    if fps is None:
        raise VideoError(f"{name} is a folder of frames, which has no frame rate: leave bound out")
    if start * fps > max_frame + 1 or round(start * fps) > max_frame:  # the first alone for what no integer can hold
        raise VideoError(f"bound starts at {start:g} s, but {name} is only {(max_frame + 1) / fps:.2f} s long")
    return start, min(end, (max_frame + 1) / fps)
