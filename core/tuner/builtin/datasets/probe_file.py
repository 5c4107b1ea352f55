"""Look into one file of moving or still pictures. Imported by the probing processes: PyAV, Pillow, nothing heavier."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import av
from av.video.stream import VideoStream

from tuner.builtin.datasets.pictures import Unreadable, displayed_size, open_picture, quarter_turns, video_stream
from tuner.files import sha256_of

HIDDEN_FRAMES = frozenset({"vp8", "vp9", "av1"})
"""Codecs with packets that show nothing: their frames are counted by decoding, not by packets."""
UNEVEN = 0.1
"""A clip is of variable rate when frames stay on the screen for times that differ by more than this share, and by
more than two ticks: rounding to ticks makes constant rates uneven."""


class VideoFacts(NamedTuple):
    """What is in a file; sizes are as displayed."""

    sha256: str
    width: int
    height: int
    frames: int
    """what can be decoded, whatever the header claims; 1 for a picture"""
    fps: float
    """frames per second; the average where the rate is variable, 0 for a picture"""
    duration: float
    """seconds from the first frame to the end of the last one; 0 for a picture"""
    variable: bool = False
    """whether some frames are shown longer than others"""
    container: str = ""
    """what the file is, such as ``mp4``, ``matroska``, ``gif``, ``png``"""

    @property
    def still(self) -> bool:
        """Whether it is a picture, and no clip."""
        return self.fps == 0


def probe_file(path: Path) -> VideoFacts | str:
    """Facts about a file, or the reason why it cannot be decoded. Never raises for a bad file."""
    try:
        if path.stat().st_size == 0:
            return "the file is empty"
        return _picture(path) or _clip(path)
    except Unreadable as error:
        return str(error)
    except (av.FFmpegError, OSError, ValueError, MemoryError) as error:
        return f"cannot be read as a video: {getattr(error, 'strerror', None) or error or 'not enough memory'}"


def _picture(path: Path) -> VideoFacts | None:
    with open_picture(path) as picture:
        if picture is None:
            return None
        width, height = displayed_size(picture)
        kind = str(picture.format).lower()
        picture.draft(None, (1, 1))  # JPEG only: all of the file is read, and an eighth of each side computed
        picture.load()
    return VideoFacts(sha256_of(path), width, height, 1, 0.0, 0.0, False, kind)


def _clip(path: Path) -> VideoFacts:
    """One pass over the packets; as few as possible are decoded."""
    first: av.VideoFrame | None = None
    shown: list[tuple[int | None, int]] = []
    with av.open(str(path)) as container:
        stream = video_stream(container)
        decode_all = stream.codec_context.codec.canonical_name in HIDDEN_FRAMES
        try:
            for packet in container.demux(stream):
                if first is None or decode_all:
                    for frame in packet.decode():
                        first = first or frame
                        if decode_all:
                            shown.append((frame.pts, frame.duration))
                if not decode_all and packet.size and not packet.is_discard and not packet.is_corrupt:
                    shown.append((packet.pts, packet.duration or 0))
        except av.FFmpegError:
            if first is None:
                raise  # else a file cut short: what came before the cut counts
        if first is None or not shown:
            raise Unreadable("not one frame can be decoded")
        width, height = _displayed_size(stream, first)
        fps, duration, variable = _timing(stream, shown)
        kind = path.suffix.lower().lstrip(".")
        kinds = container.format.name.split(",")
    return VideoFacts(
        sha256_of(path), width, height, len(shown), fps, duration, variable, kind if kind in kinds else kinds[0]
    )


def _displayed_size(stream: VideoStream, frame: av.VideoFrame) -> tuple[int, int]:
    """Width and height in square pixels, upright."""
    pixel_aspect = stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio or Fraction(1)
    width = max(1, round(frame.width * pixel_aspect)) if pixel_aspect > 0 else frame.width
    return (frame.height, width) if quarter_turns(frame) % 2 else (width, frame.height)


def _timing(stream: VideoStream, shown: Sequence[tuple[int | None, int]]) -> tuple[float, float, bool]:
    """Frames per second, seconds in all, and whether the rate is variable.

    ``shown`` are the times of the frames and how long each is shown, in ticks of the stream, in any order.
    """
    nominal = stream.average_rate or stream.guessed_rate
    ordered = sorted((pts, ticks) for pts, ticks in shown if pts is not None)
    gaps = [later - earlier for (earlier, _), (later, _) in pairwise(ordered)]
    tick = stream.time_base
    if len(ordered) < len(shown) or tick is None or (gaps and min(gaps) <= 0):
        # Without a time for each frame, the rate that the file names is all there is.
        if not nominal:
            raise Unreadable("has neither times nor a frame rate")
        return float(nominal), len(shown) / float(nominal), False
    mean = sum(gaps) / len(gaps) if gaps else 0.0
    last = ordered[-1][1] or mean or (1 / (nominal * tick) if nominal else 0)
    duration = float((ordered[-1][0] - ordered[0][0] + last) * tick)
    variable = bool(gaps) and max(gaps) - min(gaps) > max(2.0, UNEVEN * mean)
    if (variable or not nominal) and duration <= 0:
        raise Unreadable("has neither times nor a frame rate")
    return (len(shown) / duration if variable or not nominal else float(nominal)), duration, variable


def serve() -> None:
    """Probe the files named on standard input, a line of JSON each; say when ready, and answer each with a line."""
    answers = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)  # whatever a decoder prints is no answer
    print('"ready"', file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(probe_file(Path(json.loads(line)))), file=answers, flush=True)


if __name__ == "__main__":
    serve()
