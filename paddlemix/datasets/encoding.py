"""From a record to the arrays of a training sample: tiles, prompt, labels.

Everything random about a sample is drawn from the generator that is passed in, so that whoever asks for it again, in whichever
process, gets the same.
"""

import io
from dataclasses import dataclass, fields

import numpy as np
from PIL import Image

from paddlemix.datasets.records import VIDEO_PLACEHOLDER
from paddlemix.datasets.shards import on_disk
from paddlemix.errors import ConfigError, DataError
from paddlemix.models.blocks.conversation import IGNORE_INDEX, IMAGE_PLACEHOLDER, IMG_CONTEXT, encode_conversations
from paddlemix.processors import minimonkey
from paddlemix.processors.image import (
    dynamic_preprocess,
    find_closest_aspect_ratio,
    load_image,
    open_image,
    target_grids,
    to_pixels,
)
from paddlemix.processors.video import sample_frames

JPEG_QUALITIES = (75, 100)
_LARGEST_JPEG = 65500  # pixels a side


@dataclass(frozen=True)
class DataOptions:
    """How records become samples; the names are those of the training arguments where there is one.

    Attributes:
        image_size: side of a tile in pixels.
        num_image_token: tokens of a tile.
        max_seq_length: longest sample in tokens; what is longer is cut behind its last picture.
        max_tiles: most tiles of a sample; None for no bound.
        dynamic_image_size: whether pictures are tiled; else each is one tile.
        use_thumbnail: whether a tiled picture is followed by a thumbnail.
        min_dynamic_patch, max_dynamic_patch: bounds on the tiles of a sample's pictures together, thumbnails not counted.
        multi_scale: Mini-Monkey's tiles, by the ``chat`` or the ``training`` rule, of a record's only picture; None for none.
        pad2square: whether untiled pictures are padded to squares instead of stretched.
        normalize_type: see ``load_image``.
        min_num_frame, max_num_frame: bounds on the number of frames taken from a video.
        sampling_method: ``rand`` takes a random frame of each interval of a video, ``middle`` the one in its middle.
        frame_format: the prompt's line for frame number ``{}``, which ends in a newline. InternVL's trainers write a hyphen.
    """

    image_size: int = 448
    num_image_token: int = 256
    max_seq_length: int = 2048
    max_tiles: int | None = None
    dynamic_image_size: bool = False
    use_thumbnail: bool = False
    min_dynamic_patch: int = 1
    max_dynamic_patch: int = 12
    multi_scale: str | None = None
    pad2square: bool = False
    normalize_type: str = "imagenet"
    min_num_frame: int = 8
    max_num_frame: int = 32
    sampling_method: str = "rand"
    frame_format: str = "Frame-{}: <image>\n"

    def __post_init__(self):
        for low, high in (("min_dynamic_patch", "max_dynamic_patch"), ("min_num_frame", "max_num_frame")):
            if not 1 <= getattr(self, low) <= getattr(self, high):
                raise ConfigError(
                    f"{low} ({getattr(self, low)}) and {high} ({getattr(self, high)}) must satisfy 1 <= {low} <= {high}"
                )
        for name in ("image_size", "num_image_token", "max_seq_length"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be positive, not {getattr(self, name)}")
        if self.multi_scale not in (None, *minimonkey.RULES):
            raise ConfigError(f"multi_scale is '{self.multi_scale}': it must be {' or '.join(minimonkey.RULES)}")
        if self.sampling_method not in ("rand", "middle"):
            raise ConfigError(f"sampling_method is '{self.sampling_method}': it must be rand or middle")
        if self.frame_format.count(IMAGE_PLACEHOLDER) != 1:
            raise ConfigError(f"frame_format is {self.frame_format!r}: it must contain {IMAGE_PLACEHOLDER} once")

    @classmethod
    def from_config(cls, config, **changes):
        """Options of a checkpoint's :class:`InternVLChatConfig`, with ``changes``."""
        names = {f.name for f in fields(cls)}
        own = {name: getattr(config, name) for name in names if hasattr(config, name)}
        return cls(**{**own, **changes})


def as_template(template):
    """A :class:`Template`, or the one of that name.

    Raises:
        PromptError: there is none.
    """
    if not isinstance(template, str):
        return template
    from paddlemix.models.internvl2.conversation import get_template

    return get_template(template)


class SampleEncoder:
    """Turns records into samples for one checkpoint.

    Args:
        tokenizer: of the checkpoint.
        template: a :class:`Template` or the name of one.
        options: :class:`DataOptions`.

    Raises:
        TokenizerError: the tokenizer lacks the tokens for pictures. PromptError: there is no such template.
    """

    answers = 1  # of a sample, which share its pictures

    def __init__(self, tokenizer, template, options):
        self.tokenizer, self.options = tokenizer, options
        self.template = as_template(template)
        self._context = tokenizer.require_token_id(IMG_CONTEXT)
        tokenizer.require_token_id(self.template.stop)

    def encode(self, record, augment=False, max_dynamic_patch=None, rng=None):
        """The sample of a record.

        Args:
            record: a :class:`Record`.
            augment: re-encode pictures as JPEG of random quality.
            max_dynamic_patch: in place of the option of that name, if not None.
            rng: numpy Generator or seed.

        Returns:
            Dictionary of ``input_ids`` and ``labels`` [N] int64, ``pixel_values`` [T, 3, size, size] float32,
            ``image_flags`` [T] int64, all 1, and ``min_length``, the tokens that hold all pictures and a label. A sample
            without pictures has T = 0.

        Raises:
            UserError: the sample cannot be used; the message says why.
        """
        rng = np.random.default_rng(rng)
        pictures = self.open_pictures(record, rng)
        bound = self.tile_bound(record, max_dynamic_patch)
        # The text first: it is cheap, and shows what does not fit.
        text = self.encode_answers(record, [self.count_tiles(p.size, bound, record) for p in pictures])
        size = self.options.image_size
        scales = self._scales(record)
        tiles = [self._pixels(picture, bound, rng if augment else None, scales) for picture in pictures]
        pixel_values = np.concatenate(tiles) if tiles else np.empty((0, 3, size, size), dtype=np.float32)
        return {**text, "pixel_values": pixel_values, "image_flags": np.ones(len(pixel_values), dtype=np.int64)}

    def encode_answers(self, record, tiles):
        """What of a sample is text, for pictures of so many ``tiles`` each: ``input_ids``, ``labels`` and ``min_length``."""
        input_ids, labels = self.encode_text(record, tiles)
        return {
            "input_ids": np.array(input_ids, dtype=np.int64),
            "labels": np.array(labels, dtype=np.int64),
            "min_length": self._min_length(input_ids, labels),
        }

    def open_pictures(self, record, rng=None):
        """The pictures of a record, or the frames of its video: list of RGB PIL images.

        Raises:
            ImageError, VideoError: one cannot be read.
        """
        if not record.video:
            return [open_image(path) for path in record.images]
        rng, options = np.random.default_rng(rng), self.options
        frames = int(rng.integers(options.min_num_frame, options.max_num_frame, endpoint=True))
        with on_disk(record.video) as path:
            return sample_frames(path, frames, record.clip, options.sampling_method, rng)

    def tiles_of(self, record, rng=None):
        """The tiles of each picture of a record, as chatting takes them: list of float32 ``[T, 3, size, size]``.

        Raises:
            ImageError, VideoError: one cannot be read.
        """
        bound, scales = self.tile_bound(record), self._scales(record)
        return [self._pixels(picture, bound, None, scales) for picture in self.open_pictures(record, rng)]

    def tile_bound(self, record, max_dynamic_patch=None):
        """Most tiles of each of a record's pictures, thumbnail not counted."""
        if record.video or not self.options.dynamic_image_size:
            return 1
        return max(1, (max_dynamic_patch or self.options.max_dynamic_patch) // max(1, len(record.images)))

    def _scales(self, record):
        """The rule of Mini-Monkey by which a record's picture is cut at two scales; None where it is cut at one."""
        alone = len(record.images) == 1 and not record.video and self.options.dynamic_image_size
        return self.options.multi_scale if alone else None

    def count_tiles(self, size, bound, record):
        """Tiles of a picture of ``record`` of ``size`` (width, height) where ``bound`` are allowed, thumbnail included."""
        if scales := self._scales(record):
            return minimonkey.count_tiles(size, self.options.image_size, scales, bound)
        if bound == 1:
            return 1
        width, height = size
        grids = target_grids(min(self.options.min_dynamic_patch, bound), bound)
        across, down = find_closest_aspect_ratio(width / height, grids, width, height, self.options.image_size)
        return across * down + (self.options.use_thumbnail and across * down > 1)

    def count_text(self, record):
        """Tokens of a record without those of its tiles; videos count with the mean number of frames.

        Raises:
            PromptError: the conversation cannot be used.
        """
        pictures = self.mean_frames if record.video else len(record.images)
        turns = marked(record, pictures, self.options.frame_format)
        return len(encode_conversations(turns, self.tokenizer, self.template, [0] * pictures)[0])

    @property
    def mean_frames(self):
        """Frames of a video on average."""
        return (self.options.min_num_frame + self.options.max_num_frame) // 2

    def encode_text(self, record, tiles):
        """Token ids and labels of a record whose pictures have so many ``tiles`` each, cut to ``max_seq_length``.

        Raises:
            UserError: the sample cannot be used; the message says why.
        """
        return self.fit(record, *self.encode_whole_text(record, tiles))

    def encode_whole_text(self, record, tiles):
        """Token ids and labels of a record, lists, however long they are; see :meth:`encode_text`."""
        limit = self.options.max_tiles
        if limit is not None and sum(tiles) > limit:
            raise DataError(f"has {sum(tiles)} tiles but {limit} fit: raise num_images_expected, or {_advice(record)}")
        counts = [n * self.options.num_image_token for n in tiles]
        turns = marked(record, len(tiles), self.options.frame_format)
        input_ids, labels = encode_conversations(turns, self.tokenizer, self.template, counts)
        if input_ids.count(self._context) != sum(counts):
            raise DataError("has a picture in its last question, which has no answer: remove the picture or add the answer")
        return input_ids, labels

    def fit(self, record, input_ids, labels):
        """Cut a record's ids and labels to ``max_seq_length``, behind its last picture.

        Raises:
            DataError: its pictures do not fit, or no token of an answer does.
        """
        limit = self.options.max_seq_length
        pictures_end = self._pictures_end(input_ids)
        if pictures_end > limit:
            raise DataError(
                f"needs {pictures_end} tokens up to the end of its last picture, but max_seq_length is {limit}: "
                f"raise it, or {_advice(record)}"
            )
        input_ids, labels = input_ids[:limit], labels[:limit]
        # A label in the first place has nothing before it to be predicted from.
        if all(label == IGNORE_INDEX for label in labels[1:]):
            raise DataError(f"has no token of an answer within max_seq_length ({limit}): raise it, or shorten the prompt")
        return input_ids, labels

    def _pictures_end(self, input_ids):
        """Number of tokens up to the end of the last picture."""
        if self._context not in input_ids:
            return 0
        # Behind the last context token stands the one that ends its picture.
        return len(input_ids) - input_ids[::-1].index(self._context) + 1

    def _min_length(self, input_ids, labels):
        first_label = next(i for i, label in enumerate(labels) if i and label != IGNORE_INDEX)
        return max(self._pictures_end(input_ids), first_label + 1)

    def _pixels(self, picture, bound, rng, scales=None):
        """Normalised tiles of a picture [T, 3, size, size], JPEG-compressed at random if there is an ``rng``.

        As in the original: tiles are compressed one by one, an untiled picture before it is resized.
        """
        options = self.options
        size, normalize = options.image_size, options.normalize_type
        if not options.dynamic_image_size:
            if rng is not None:
                picture = _recompressed(picture, rng)
            return load_image(picture, size, pad2square=options.pad2square, normalize_type=normalize, dynamic=False)
        if scales:
            tiles, _, _ = minimonkey.cut(picture, size, scales, bound)
        else:
            tiles = dynamic_preprocess(picture, min(options.min_dynamic_patch, bound), bound, size, options.use_thumbnail)
        if rng is not None:
            tiles = [_recompressed(tile, rng) for tile in tiles]
        return to_pixels(tiles, normalize)


def _advice(record):
    return "lower max_num_frame" if record.video else "lower max_dynamic_patch"


def marked(record, pictures, frame_format):
    """The record's turns with an ``<image>`` for each picture or frame."""
    if record.video:
        mark, lines = VIDEO_PLACEHOLDER, "".join(frame_format.format(i + 1) for i in range(pictures))
    elif len(record.images) == 1:
        mark, lines = IMAGE_PLACEHOLDER, IMAGE_PLACEHOLDER + "\n"
    else:
        return record.conversations
    turns = [dict(turn) for turn in record.conversations]
    questions = [turn for turn in turns if turn["from"] == "human"]
    marked = next((turn for turn in questions if mark in turn["value"]), None)
    if marked is None:
        if questions:
            questions[0]["value"] = lines + questions[0]["value"]
    elif record.video:
        before, after = marked["value"].split(mark)
        marked["value"] = before + lines + after.removeprefix("\n")
    return turns


def _recompressed(picture, rng):
    """The picture as it comes back from JPEG of a quality drawn uniformly."""
    quality = int(rng.integers(*JPEG_QUALITIES, endpoint=True))
    if max(picture.size) > _LARGEST_JPEG:
        return picture
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=quality)
    with Image.open(buffer) as compressed:
        return compressed.convert("RGB")
