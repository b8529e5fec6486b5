"""Features of clips: frames by the rule of InternVL's video retrieval, their features averaged."""

import sys

import numpy as np

from paddlemix.errors import DataError, ImageError, VideoError
from paddlemix.models.internvl.embedder import unit
from paddlemix.processors.video import sample_frames


class ClipFeatures:
    """Features of clips, as a function of numbers for :func:`~.features.compute_features`.

    Args:
        paths: the clips: files, or folders of frames.
        read: turns a picture into pixels ``[3, S, S]``.
        encode: turns pixels ``[B, 3, S, S]`` into features ``[B, E]`` on the host, not normalised.
        frames: of each clip.
    """

    def __init__(self, paths, read, encode, frames):
        self.paths, self.read, self.encode, self.frames = paths, read, encode, frames
        self.bad, self._width = {}, None

    def __call__(self, start, stop):
        rows = []
        for number in range(start, stop):
            try:
                pictures = sample_frames(self.paths[number], self.frames, sample="interval")
                # Averaged as they come from the model, and normalised after that.
                rows.append(unit(np.mean(self.encode(np.stack([self.read(picture) for picture in pictures])), axis=0)))
                self._width = rows[-1].size
            except (VideoError, ImageError) as error:
                self.bad[number] = str(error)
                print(f"left out: {error}", file=sys.stderr)
                rows.append(None)
        if self._width is None:
            raise DataError(f"none of the clips {start + 1} to {stop} can be read: {next(iter(self.bad.values()))}")
        return np.stack([np.full(self._width, np.nan, "float32") if row is None else row for row in rows])
