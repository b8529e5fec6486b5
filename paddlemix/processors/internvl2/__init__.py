"""Pictures and videos to pixel arrays for the InternVL family."""

from paddlemix.processors.image import (
    NORMALIZATION,
    dynamic_preprocess,
    find_closest_aspect_ratio,
    load_image,
    open_image,
    target_grids,
    to_pixels,
)
from paddlemix.processors.video import frame_prefix, get_index, load_video, sample_frames

__all__ = [
    "NORMALIZATION",
    "dynamic_preprocess",
    "find_closest_aspect_ratio",
    "frame_prefix",
    "get_index",
    "load_image",
    "load_video",
    "open_image",
    "sample_frames",
    "target_grids",
    "to_pixels",
]
