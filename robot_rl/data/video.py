"""Video through PyAV: H.264 writing made for random access, and frame-accurate reading of any codec in the wheel."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

import av
import numpy as np

from robot_rl.core.errors import DataError
from robot_rl.data.dataset import reading

KEYFRAME_INTERVAL = 2
"""Frames between key frames: one decoded frame at most is thrown away for a random read."""
WRITE_ERRORS = (OSError, av.FFmpegError)
"""What a full disk or a failing encoder raises."""
SEEK_AHEAD = 48
"""Frames that are decoded and dropped rather than sought for; seeking costs about as much."""


class VideoWriter:
    """Writes RGB frames (H, W, 3) uint8 to an H.264 mp4 file, one after the other."""

    def __init__(
        self,
        path: Path,
        fps: float,
        height: int,
        width: int,
        crf: int = 20,
        keyframe_interval: int = KEYFRAME_INTERVAL,
    ) -> None:
        """Open ``path`` for writing.

        Args:
            path: file to write.
            fps: frames per second.
            height: of each frame in pixels.
            width: of each frame in pixels.
            crf: quality, lower is better; 18 is nearly lossless.
            keyframe_interval: frames between key frames; more make smaller files and slower random reads.
        """
        self.path, self.shape, self.count = path, (height, width, 3), 0
        self._container: Any = av.open(str(path), "w", format="mp4")
        rate = Fraction(fps).limit_denominator(100_000)
        self._time_base = 1 / rate
        self._stream: Any = self._container.add_stream("libx264", rate=rate)
        self._stream.width, self._stream.height = width, height
        self._stream.pix_fmt = pixel_format(height, width)
        # Without B-frames every frame is stored in the order of display, so that files can be joined by packets.
        self._stream.options = {"crf": str(crf), "g": str(keyframe_interval), "bf": "0", "preset": "veryfast"}
        self._stream.codec_context.thread_count = 1

    def add(self, image: np.ndarray) -> None:
        """Encode one image (H, W, 3) uint8."""
        if image.shape != self.shape or image.dtype != np.uint8:
            raise DataError(f"{self.path}: image of shape {image.shape} {image.dtype}, expected {self.shape} uint8")
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
        frame.pts = self.count
        frame.time_base = self._time_base
        self._container.mux(self._stream.encode(frame))
        self.count += 1

    def close(self) -> None:
        """Finish the file; calling it again does nothing."""
        if self._container is not None:
            container, self._container = self._container, None
            try:
                container.mux(self._stream.encode(None))
            finally:
                container.close()

    def abandon(self) -> None:
        """Close without caring for the content, which may be incomplete."""
        try:
            self.close()
        except (*WRITE_ERRORS, ValueError):  # an encoder without frames refuses to be flushed
            self._container = None

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()


def pixel_format(height: int, width: int) -> str:
    """Return the pixel layout for H.264: the common 4:2:0 needs even sizes."""
    return "yuv444p" if height % 2 or width % 2 else "yuv420p"


class VideoReader:
    """Random access by frame number to one video file; frames asked for in order are decoded once."""

    def __init__(self, path: Path) -> None:
        """Open ``path``; raises `DataError` if it is missing, truncated or holds no video."""
        self.path = path
        with reading(path):
            self._container = av.open(str(path))
            if not self._container.streams.video:
                raise DataError(f"{path}: holds no video stream")
            self._stream: Any = self._container.streams.video[0]
            self._stream.thread_type = "AUTO"
            self.fps = float(self._stream.average_rate or 0)
            self.codec = self._stream.codec_context.codec.canonical_name
        if self.fps <= 0:
            raise DataError(f"{path}: states no frame rate")
        self._origin = self._stream.start_time or 0
        self._frames: Iterator[Any] | None = None
        self._next = 0
        self._held: Any = None

    @property
    def height(self) -> int:
        """Height in pixels."""
        return int(self._stream.height)

    @property
    def width(self) -> int:
        """Width in pixels."""
        return int(self._stream.width)

    @property
    def num_frames(self) -> int:
        """Number of frames that the file states, or that its packets count where it states none."""
        if self._stream.frames:
            return int(self._stream.frames)
        with reading(self.path), av.open(str(self.path)) as container:
            return sum(1 for packet in container.demux(video=0) if packet.size)

    def frame(self, index: int) -> np.ndarray:
        """Return frame ``index`` as (H, W, 3) uint8, RGB."""
        return self.frames(index, 1)[0]

    def frames(self, start: int, count: int) -> np.ndarray:
        """Return ``count`` frames from ``start`` on as (count, H, W, 3) uint8, RGB.

        Raises:
            DataError: the file ends earlier, lacks one of the frames or is damaged.
        """
        images = np.empty((count, self.height, self.width, 3), np.uint8)
        with reading(self.path):
            for offset in range(count):
                images[offset] = self._decode(start + offset)
        return images

    def close(self) -> None:
        """Close the file."""
        self._container.close()

    def _decode(self, wanted: int) -> np.ndarray:
        if self._frames is None or not self._next - 1 <= wanted < self._next + SEEK_AHEAD:
            self._seek(wanted)
        if self._held is not None and self._number(self._held) == wanted:
            return self._held.to_ndarray(format="rgb24")
        for frame in self._frames or ():
            number = self._number(frame)
            self._next, self._held = number + 1, frame
            if number == wanted:
                return frame.to_ndarray(format="rgb24")
            if number > wanted:
                break
        self._frames = None
        raise DataError(f"{self.path}: frame {wanted} is missing (the file states {self.num_frames} frames)")

    def _seek(self, wanted: int) -> None:
        """Go to the last key frame at or before ``wanted``."""
        time = Fraction(wanted) / Fraction(self._stream.average_rate)
        self._container.seek(self._origin + int(time / self._stream.time_base), stream=self._stream, backward=True)
        self._frames = iter(self._container.decode(self._stream))
        self._next, self._held = wanted, None

    def _number(self, frame: Any) -> int:
        """Return the number of a decoded frame, from its time stamp."""
        if frame.pts is None:
            raise DataError(f"{self.path}: a frame without time stamp")
        return round((frame.pts - self._origin) * self._stream.time_base * Fraction(self._stream.average_rate))


def join_videos(sources: list[Path], target: Path) -> list[int]:
    """Join H.264 files of one size and encoder setting without encoding them again.

    Returns:
        The number of frames of each source, in order.

    Raises:
        DataError: a source is damaged, or its encoding differs from the first one's.
    """
    counts: list[int] = []
    with av.open(str(target), "w", format="mp4") as output:
        stream: Any = None
        described: tuple[Any, ...] | None = ()
        total = 0
        for source in sources:
            with reading(source), av.open(str(source)) as container:
                video: Any = container.streams.video[0]
                if stream is None:
                    stream, described = output.add_stream_from_template(video), _signature(video)
                    stream.time_base = video.time_base
                elif _signature(video) != described:
                    raise DataError(f"{source}: encoded differently from {sources[0]}; it cannot be joined to it")
                tick = round(1 / (Fraction(video.average_rate) * video.time_base))
                first = total
                for packet in container.demux(video):
                    if packet.size == 0:
                        continue
                    packet.pts = packet.dts = total * tick
                    packet.duration = tick
                    packet.stream = stream
                    output.mux(packet)
                    total += 1
                counts.append(total - first)
    return counts


def video_signature(path: Path) -> tuple[Any, ...] | None:
    """Return what files must have in common to be joined by `join_videos`; ``None`` if this one cannot be joined."""
    with reading(path), av.open(str(path)) as container:
        return _signature(container.streams.video[0])


def _signature(video: Any) -> tuple[Any, ...] | None:
    context = video.codec_context
    if context.codec.canonical_name != "h264" or context.has_b_frames:
        return None
    return (video.width, video.height, video.average_rate, video.time_base, context.pix_fmt, bytes(context.extradata))
