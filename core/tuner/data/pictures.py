"""Opening a file of moving or still pictures. Imported by the probing processes, so PyAV and nothing heavier."""

from __future__ import annotations

import av
from av.container import InputContainer
from av.video.stream import VideoStream


class Unreadable(Exception):
    """A file that cannot be used as a video; the message is the reason."""


def video_stream(container: InputContainer) -> VideoStream:
    """The first video stream of an open file; :class:`Unreadable` when there is none."""
    if not container.streams.video:
        raise Unreadable("has no video stream")
    return container.streams.video[0]


def quarter_turns(frame: av.VideoFrame) -> int:
    """Counter-clockwise quarter turns that show a frame upright, from its display matrix."""
    turns: int = round(frame.rotation / 90) % 4
    return turns
