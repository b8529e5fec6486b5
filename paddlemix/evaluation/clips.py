"""Features of clips: frames by the rule of InternVL's video retrieval, their features averaged."""

import sys

import numpy as np

from paddlemix.errors import ImageError, VideoError
from paddlemix.models.internvl.embedder import unit
from paddlemix.processors.video import sample_frames


class ClipFeatures:
    """Features of clips, as a function of numbers for :func:`~.features.compute_features`.

    Args:
        paths: the clips: files, or folders of frames.
        read: turns a picture into pixels ``[3, S, S]``.
        encode: turns pixels ``[B, 3, S, S]`` into features ``[B, E]`` on the host, not normalised.
        width: ``E``.
        frames: of each clip.
    """

    def __init__(self, paths, read, encode, width, frames):
        self.paths, self.read, self.encode, self.width, self.frames = paths, read, encode, width, frames
        self.bad = {}

    def __call__(self, start, stop):
        rows = np.full([stop - start, self.width], np.nan, "float32")
        for number in range(start, stop):
            try:
                pictures = sample_frames(self.paths[number], self.frames, sample="interval")
                # Averaged as they come from the model, and normalised after that.
                rows[number - start] = unit(self.encode(np.stack([self.read(picture) for picture in pictures])).mean(0))
            except (VideoError, ImageError) as error:
                self.bad[number] = str(error)
                print(f"left out: {error}", file=sys.stderr)
        return rows
