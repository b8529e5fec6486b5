"""Readers of videos: folders of pictures, animations, and files by PyAV, OpenCV or decord.

Each has ``num_frames``, ``fps`` (None where there is none), ``frames(indices)`` in ascending order, and ``close()``.
"""

import importlib
import os
import re
from contextlib import contextmanager
from functools import partial
from itertools import chain, groupby
from pathlib import Path

import numpy as np
from PIL import Image

from paddlemix.errors import VideoError
from paddlemix.files import open_regular
from paddlemix.processors.image import open_image, picture_formats

# Frames of a folder are files of these kinds; everything else in it is ignored.
FRAME_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".avif", ".heic", ".heif"}


def open_video(path, reader, look=None):
    """A reader of frames; ``look`` is how :func:`~.image.open_image` takes the pictures of a folder or of an animation."""
    look = look or {}
    if not isinstance(path, (str, os.PathLike)):
        raise VideoError(f"a video must be the path of a file or folder, not {type(path).__name__}")
    path = Path(path)
    name = f"video {str(path)!r}"
    if path.is_dir():
        return _FolderReader(path, name, look)
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        raise VideoError(f"{name} does not exist; check the path") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise VideoError(
            f"{name} cannot be read ({getattr(error, 'strerror', None) or error}); give a file or folder"
        ) from None
    if not size:  # also the system's own files, which can make whoever reads them wait
        raise VideoError(f"{name} is empty; replace it")

    try:
        picture = Image.open(path, formats=picture_formats())
    except Exception:  # not a picture: what is hoped for, and damaged ones may raise anything
        pass
    else:
        if picture.format in _AnimationReader.formats and (picture.format == "GIF" or picture.is_animated):
            return _AnimationReader(picture, name, look)
        picture.close()
        raise VideoError(f"{name} is a still {picture.format} picture; give it as an image instead")

    # An absolute path, so that no reader takes "a:b.mp4" for a protocol and its address.
    return _reader_class(reader)(str(path.resolve()), name)


def _reader_class(reader):
    if reader == "auto":
        reader = os.environ.get("PADDLEMIX_VIDEO_READER", "auto")
    if reader != "auto" and reader not in _READERS:
        raise VideoError(f"video reader {reader!r} is unknown; choose auto, {', '.join(_READERS)}")
    for candidate in _READERS if reader == "auto" else [reader]:
        try:
            return partial(_READERS[candidate], importlib.import_module(_READERS[candidate].module))
        except ImportError:
            continue
    raise VideoError(f"no reader for videos is installed (asked for: {reader}); run `pip install av`")


def _check_complete(name, seconds, declared):
    """Players stop silently where a file was cut off; frames must not be sampled from half a video."""
    if declared and declared - seconds > max(1.0, 0.05 * declared):
        raise VideoError(f"{name} is cut off or damaged: {seconds:.1f} s of {declared:.1f} s can be read; replace it")


def _frame_rate(declared, num_frames, seconds):
    """Frames per second: what the file declares, unless its time stamps contradict that (variable frame rate)."""
    measured = (num_frames - 1) / seconds if num_frames > 1 and seconds > 0 else None
    if not declared or (measured and abs(declared / measured - 1) > 0.05):
        return measured or 1.0
    return declared


def _turn(image, degrees):
    """Turn a picture counterclockwise by a multiple of 90 degrees."""
    turns = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}
    return image.transpose(turns[degrees % 360]) if degrees % 360 in turns else image


class _FolderReader:
    """The pictures of a folder, in natural order of their names (frame2 before frame10)."""

    fps = None

    def __init__(self, path, name, look):
        self.name, self._look = name, look
        pictures = (file for file in path.iterdir() if file.suffix.lower() in FRAME_SUFFIXES and file.name[0] != ".")
        self._files = sorted(pictures, key=lambda file: _natural_order(file.name))
        self.num_frames = len(self._files)
        if not self._files:
            raise VideoError(f"{name} is a folder without pictures; put the frames there as JPEG or PNG files")

    def frames(self, indices):
        return (open_image(self._files[index], **self._look) for index in indices)

    def close(self):
        pass


def _natural_order(name):
    return [int(part) if part.isdecimal() else part.lower() for part in re.split("([0-9]+)", name)]


class _AnimationReader:
    """Animated pictures, by Pillow."""

    formats = ("GIF", "WEBP", "PNG", "AVIF")

    def __init__(self, picture, name, look):
        self.name, self._picture, self._look = name, picture, look
        with self._errors():
            self.num_frames = picture.n_frames
            self._read(self.num_frames - 1)  # where a GIF is cut off, the last frame is incomplete

    @property
    def fps(self):
        with self._errors():
            seconds = 0.0
            for index in range(self.num_frames):
                self._picture.seek(index)
                # Browsers show frames without a duration for a tenth of a second.
                seconds += (self._picture.info.get("duration") or 100) / 1000
        return self.num_frames / seconds

    def frames(self, indices):
        with self._errors():
            for index in indices:
                yield self._read(index)

    def _read(self, index):
        self._picture.seek(index)
        return open_image(self._picture, **self._look)

    @contextmanager
    def _errors(self):
        try:
            yield
        except (VideoError, MemoryError):
            raise
        except Exception as error:  # a damaged file may raise anything in Pillow
            raise VideoError(f"{self.name} is damaged or cut off; replace it") from error

    def close(self):
        self._picture.close()


class _AvReader:
    """PyAV. A first pass reads time stamps without decoding; frames are then decoded from the key frame before them."""

    module = "av"

    def __init__(self, av, path, name):
        self._av, self._path, self.name, self._container = av, path, name, None
        try:
            with self._errors("cannot be read as a video"):
                self._reopen()
                self._read_table()
        except VideoError:
            self.close()
            raise

    def frames(self, indices):
        return self._seek_frames(indices) if self._seekable else self._scan_frames(indices)

    def close(self):
        if self._container is not None:
            self._container.close()

    def _reopen(self):
        self.close()
        # Only local files: a playlist must not make this process fetch addresses.
        options = {"protocol_whitelist": "file,crypto,data"}
        self._container = self._av.open(self._path, container_options=options, metadata_errors="replace")
        # Music files carry their cover as a video stream.
        streams = [s for s in self._container.streams.video if not s.disposition & s.disposition.attached_pic]
        if not streams:
            raise VideoError(f"{self.name} has no video stream; give a file with moving pictures in it")
        self._stream = streams[0]
        if self._stream.codec_context is None:
            raise VideoError(f"{self.name} is in a form that this FFmpeg cannot decode: convert it to H.264, or copy it again")
        self._stream.thread_type = "AUTO"

    def _read_table(self):
        """List the packets in decoding order, and which of them are shown, in presentation order."""
        pts, keys, hidden, end = [], [], [], 0.0
        # VP8 keeps pictures that are never shown in packets of their own; bit 4 of a frame's header is "show_frame".
        vp8 = self._stream.codec_context.name == "vp8"
        # Where the stream does not declare its own length, the file's is that of its longest stream.
        streams = [self._stream] if self._stream.duration else [*self._container.streams.video, *self._container.streams.audio]
        for packet in self._container.demux(streams):
            if not packet.size:  # the mark of the end, or "show the last frame again" in AVI
                continue
            if packet.pts is not None:
                end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
            if packet.stream_index == self._stream.index:
                pts.append(packet.pts)
                keys.append(packet.is_keyframe)
                hidden.append(packet.is_discard or (vp8 and not bytes(packet)[0] & 0x10))
        start = float((self._stream.start_time or 0) * self._stream.time_base)
        if self._stream.duration:
            _check_complete(self.name, end - start, float(self._stream.duration * self._stream.time_base))
        elif self._container.duration:
            _check_complete(self.name, end - start, self._container.duration / self._av.time_base)

        self._keys = np.flatnonzero(keys)
        self._seekable = len(self._keys) > 0 and None not in pts and len(set(pts)) == len(pts)
        seconds = 0.0
        if self._seekable:
            self._pts = np.array(pts)
            self._position = {time: position for position, time in enumerate(pts)}
            # Nothing before the first key frame can be decoded.
            first = self._keys[0]
            shown = ~np.array(hidden) & (np.arange(len(pts)) >= first) & (self._pts >= self._pts[first])
            shown = np.flatnonzero(shown)
            self._shown = shown[np.argsort(self._pts[shown])]
            self.num_frames = len(self._shown)
            if self.num_frames:
                seconds = float((pts[self._shown[-1]] - pts[self._shown[0]]) * self._stream.time_base)
        else:  # raw streams and files with broken time stamps: count what comes out
            self._reopen()
            self.num_frames = sum(1 for _ in self._container.decode(self._stream))
        self.fps = _frame_rate(float(self._stream.average_rate or 0), self.num_frames, seconds)

    def _scan_frames(self, indices):
        with self._errors("is damaged"):
            self._reopen()
            wanted = set(indices)
            for index, frame in enumerate(self._container.decode(self._stream)):
                if index in wanted:
                    yield self._picture(frame)
                if index == indices[-1]:
                    break

    def _seek_frames(self, indices):
        for rank, group in groupby(indices, key=self._key_rank):
            group = list(group)
            frames = {}
            # Decoders may need more than the key frame before (gradual refresh): step back, in the end to the start.
            for start in sorted({rank, max(rank - 1, 0), max(rank - 3, 0), 0}, reverse=True):
                missing = [index for index in group if index not in frames]
                if missing:
                    frames.update(self._decode(self._keys[start], missing))
            for index in group:
                if index not in frames:
                    raise VideoError(f"frame {index} of {self.name} is damaged; replace the file or leave that part out")
                yield self._picture(frames.pop(index))

    def _key_rank(self, index):
        """Which key frame decoding has to start at; not one that frame ``index`` is shown before (open GOP)."""
        position = self._shown[index]
        rank = np.searchsorted(self._keys, position, side="right") - 1
        while rank > 0 and self._pts[self._keys[rank]] > self._pts[position]:
            rank -= 1
        return int(rank)

    def _decode(self, key, indices):
        """Decode from the packet at position ``key`` as far as needed; returns {index: frame} of those that came out."""
        wanted = {int(self._shown[index]): index for index in indices}
        index_of = {int(self._pts[position]): index for position, index in wanted.items()}
        decoder = self._stream.codec_context
        frames = []
        try:
            for packet, position in self._packets_from(key):
                decoder.skip_frame = "DEFAULT" if position in wanted else "NONREF"
                frames += (frame for frame in decoder.decode(packet) if frame.pts in index_of)
                if position >= max(wanted):
                    break
            frames += (frame for frame in decoder.decode(None) if frame.pts in index_of)
        except self._av.FFmpegError:
            pass  # what came out before is good; _seek_frames reports what did not
        decoder.flush_buffers()
        return {index_of[frame.pts]: frame for frame in frames if not frame.is_corrupt}

    def _packets_from(self, key):
        """The packets from position ``key`` on, with their positions."""
        for packet, position in self._packets_before(key):
            if position >= key:
                yield packet, position

    def _packets_before(self, key):
        rank = int(np.searchsorted(self._keys, key))
        for back in (0, 1, 4, 16):
            target = self._keys[max(rank - back, 0)]
            try:
                self._container.seek(int(self._pts[target]), stream=self._stream)
            except self._av.FFmpegError:
                break
            packets = self._numbered_packets()
            first = next(packets, None)
            if first is not None and first[1] <= key:
                return chain([first], packets)
        self._reopen()  # the container cannot seek, or not precisely: skip packets from the start
        return self._numbered_packets()

    def _numbered_packets(self):
        for packet in self._container.demux(self._stream):
            if packet.size:
                yield packet, self._position.get(packet.pts, len(self._pts))

    def _picture(self, frame):
        # The names mean BT.601 towards full-range RGB; left out, PyAV ignores what the frame says of itself.
        full_range = frame.color_range == 2 or frame.format.name.startswith("yuvj")
        frame = frame.reformat(
            format="rgb24",
            src_colorspace=frame.colorspace,
            src_color_range="JPEG" if full_range else "MPEG",
            dst_colorspace="DEFAULT",
            dst_color_range="JPEG",
        )
        return _turn(frame.to_image(), frame.rotation)

    @contextmanager
    def _errors(self, what):
        try:
            yield
        except (self._av.FFmpegError, OSError) as error:
            raise VideoError(f"{self.name} {what} ({error.strerror}); replace it") from error


class _OpenCvReader:
    """OpenCV built with FFmpeg. Frames are told apart by their time stamps, since its seeking by number is not exact."""

    module = "cv2"

    def __init__(self, cv2, path, name):
        os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # FFmpeg's remarks on damaged files; errors say enough
        self._cv2, self._path, self.name = cv2, path, name
        self._unreadable = f"{name} cannot be read by OpenCV: it is damaged, holds no video, or needs another reader's codecs"
        packets = self._reopen([cv2.CAP_PROP_FORMAT, -1])  # -1: do not decode
        times = []
        while packets.grab():
            times.append(packets.get(cv2.CAP_PROP_POS_MSEC))
        rate = packets.get(cv2.CAP_PROP_FPS)
        declared = packets.get(cv2.CAP_PROP_FRAME_COUNT) / rate if rate > 0 else 0
        self._reopen()
        self._times = sorted(times)
        self._seekable = bool(times) and len(set(times)) == len(times) and self._go_to(self._times[0])
        self.num_frames, seconds = len(times), 0
        if self._seekable:
            seconds = (self._times[-1] - self._times[0]) / 1000
        else:  # no time stamps, repeated ones, or others than decoding gives: count what comes out
            self.num_frames = 0
            self._reopen()
            while self._capture.grab():
                self.num_frames += 1
            if times and not self.num_frames:
                raise VideoError(self._unreadable)
        self._reopen()
        self.fps = _frame_rate(rate, self.num_frames, seconds)
        _check_complete(name, (seconds or self.num_frames / self.fps), declared)

    def frames(self, indices):
        reached = -1
        for index in indices:
            if self._seekable:
                found = self._go_to(self._times[index])
            else:
                while reached < index and self._capture.grab():
                    reached += 1
                found = reached == index
            decoded, pixels = self._capture.retrieve() if found else (False, None)
            if not decoded:
                raise VideoError(f"OpenCV cannot decode frame {index} of {self.name}; replace the file, or `pip install av`")
            yield _turn(Image.fromarray(pixels[..., ::-1]), -self._rotation)

    def close(self):
        self._capture.release()

    def _reopen(self, options=()):
        cv2 = self._cv2
        level = cv2.setLogLevel(0)
        self._capture = cv2.VideoCapture(self._path, cv2.CAP_FFMPEG, list(options))
        cv2.setLogLevel(level)
        if not self._capture.isOpened():
            raise VideoError(self._unreadable)
        # Builds differ in whether they turn pictures by themselves.
        self._capture.set(cv2.CAP_PROP_ORIENTATION_AUTO, 0)
        self._rotation = round(self._capture.get(cv2.CAP_PROP_ORIENTATION_META))  # degrees clockwise
        self._time = float("-inf")
        return self._capture

    def _go_to(self, time):
        """Grab the frame of ``time`` milliseconds; returns whether it is there."""
        if time - self._time > 1000:
            self._capture.set(self._cv2.CAP_PROP_POS_MSEC, time)
            self._grab()
            if self._time > time + 0.1:
                self._reopen()
        while self._time < time - 0.1:
            if not self._grab():
                return False
        return self._time < time + 0.1

    def _grab(self):
        grabbed = self._capture.grab()
        self._time = self._capture.get(self._cv2.CAP_PROP_POS_MSEC) if grabbed else float("inf")
        return grabbed


class _DecordReader:
    """decord. It reads in order from the start, since its seeking is not exact (open GOPs, MPEG-4 with B-frames)."""

    module = "decord"

    def __init__(self, decord, path, name):
        self._decord, self.name = decord, name
        decord.logging.set_level(decord.logging.QUIET)
        with self._errors("cannot be read by decord: it is damaged, holds no video, or has an unknown codec"):
            self._video = decord.VideoReader(path, ctx=decord.cpu(0), num_threads=1)
            self.num_frames = len(self._video)
            times = self._video.get_frame_timestamp(range(self.num_frames))[:, 0]
            seconds = float(times[-1] - times[0]) if np.all(np.diff(times) > 0) else 0
            self.fps = _frame_rate(self._video.get_avg_fps(), self.num_frames, seconds)

    def frames(self, indices):
        next_index = 0
        for index in indices:
            with self._errors(f"is damaged near frame {index}"):
                while next_index <= index:  # skip_frames() is not exact either
                    pixels = self._video.next()
                    next_index += 1
                pixels = pixels.asnumpy()
            yield Image.fromarray(pixels)

    def close(self):
        self._video = None

    @contextmanager
    def _errors(self, what):
        try:
            yield
        except (self._decord.DECORDError, RuntimeError, StopIteration) as error:
            raise VideoError(f"{self.name} {what}; replace it, or try another reader") from error


# In order of preference. PyAV is exact on every file tried and at least as fast. OpenCV takes all colours for BT.601 and counts
# VP8's hidden frames. decord knows no edit lists, loses the first frames of MPEG-TS, and has no build for aarch64.
_READERS = {"av": _AvReader, "opencv": _OpenCvReader, "decord": _DecordReader}
