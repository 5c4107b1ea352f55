"""Look into one video file. Imported by the probing processes, so it imports PyAV and nothing heavier."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av

from tuner.data.pictures import Unreadable, quarter_turns, video_stream
from tuner.files import sha256_of

HIDDEN_FRAMES = frozenset({"vp8", "vp9", "av1"})
"""Codecs with packets that show nothing: their frames are counted by decoding, not by packets."""


class VideoFacts(NamedTuple):
    """What a file says about itself when it is opened; sizes are as displayed."""

    sha256: str
    width: int
    height: int
    frames: int
    fps: float
    duration: float
    """seconds"""


def probe_file(path: Path) -> VideoFacts | str:
    """Facts about a video file, or the reason why it cannot be decoded. Never raises for a bad file."""
    try:
        if path.stat().st_size == 0:
            return "the file is empty"
        width, height, fps = _first_frame(path)
        frames = _count_frames(path)
        return VideoFacts(sha256_of(path), width, height, frames, fps, frames / fps if fps else 0.0)
    except Unreadable as error:
        return str(error)
    except (av.FFmpegError, OSError, ValueError) as error:
        return f"cannot be read as a video: {getattr(error, 'strerror', None) or error}"


def _first_frame(path: Path) -> tuple[int, int, float]:
    """Displayed width and height, and frames per second, after decoding one frame."""
    with av.open(str(path)) as container:
        stream = video_stream(container)
        frame = next(container.decode(stream), None)
        if frame is None:
            raise Unreadable("not one frame can be decoded")
        pixel_aspect = stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio or Fraction(1)
        width, height = max(1, round(frame.width * pixel_aspect)) if pixel_aspect > 0 else frame.width, frame.height
        if quarter_turns(frame) % 2:
            width, height = height, width
        rate = stream.average_rate or stream.guessed_rate
        return width, height, float(rate) if rate else 0.0


def _count_frames(path: Path) -> int:
    """Frames that are really in the file, whatever its header claims."""
    count = 0
    with av.open(str(path)) as container:
        stream = video_stream(container)
        try:
            if stream.codec_context.codec.canonical_name in HIDDEN_FRAMES:
                for _ in container.decode(stream):
                    count += 1
            else:
                for packet in container.demux(stream):
                    count += bool(packet.size and not packet.is_discard and not packet.is_corrupt)
        except av.FFmpegError:
            pass  # a file cut short: what came before the cut counts
    return count
