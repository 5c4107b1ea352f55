"""The frames of a clip from any frame on: the very ones that decoding from the beginning gives, sooner where safe."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import av
from av.container import InputContainer
from av.video.stream import VideoStream

from tuner.builtin.datasets.pictures import video_stream

BY_TIME_SHOWN = "matroska"
INDEXED = frozenset({"mov", BY_TIME_SHOWN})
"""Containers that know where their keyframes are, by FFmpeg's name; in others a jump may land anywhere. One knows them
by the time they are shown, the other by the time they are decoded."""
SEVERAL_PACKETS = frozenset({"vp8"})
"""Codecs with packets that show nothing, so that a frame's number is not known from packets."""
WORTHWHILE = 12
"""Frames that a jump must save: it costs a pass over the packets before it."""


@dataclass(frozen=True)
class Place:
    """Where a frame is, in ticks of the stream."""

    seek_to: int
    """what the container knows the keyframe before it by"""
    keyframe: int
    """time at which the keyframe is shown"""
    awaited: tuple[int, ...]
    """times of all frames that are shown from the keyframe up to the wanted one"""


def open_frames(container: InputContainer) -> tuple[VideoStream, Iterator[av.VideoFrame]]:
    """The video stream of an open file, and its frames in display order. Raises Unreadable when it has none."""
    stream = video_stream(container)
    stream.thread_type = "AUTO"
    return stream, container.decode(stream)


def frames_from(path: Path, start: int) -> Generator[av.VideoFrame]:
    """The frames of a clip in display order, from number ``start`` (from 0) on.

    Raises av.FFmpegError or Unreadable where it cannot be decoded.
    """
    if start >= WORTHWHILE:
        with av.open(str(path)) as container:
            stream = video_stream(container)
            place = locate(container, stream, start)
            sought = None if place is None else _jump(container, stream, place)
            if sought is not None:
                yield from sought
                return
    with av.open(str(path)) as container:
        yield from islice(open_frames(container)[1], start, None)


def locate(container: InputContainer, stream: VideoStream, start: int) -> Place | None:
    """Where frame ``start`` is, from the packets before it; None where a jump is unsafe or saves too little.

    Frames are shown in the order of their times, and none before it is decoded: so its place among the times is known
    once a packet is decoded later.
    """
    kind = container.format.name.split(",")[0]
    if kind not in INDEXED or stream.codec_context.codec.canonical_name in SEVERAL_PACKETS:
        return None
    shown: list[int] = []
    keyframes: list[tuple[int, int]] = []
    for packet in container.demux(stream):
        if not packet.size:
            break  # the end
        if packet.pts is None or packet.is_corrupt:
            return None
        if len(shown) > start and packet.dts is not None and sorted(shown)[start] < packet.dts:
            break
        known_by = packet.pts if kind == BY_TIME_SHOWN else packet.dts
        if packet.is_keyframe and known_by is not None:
            keyframes.append((packet.pts, known_by))
        if not packet.is_discard:
            shown.append(packet.pts)
    if len(shown) <= start or len(set(shown)) < len(shown):
        return None
    shown.sort()
    before = [each for each in keyframes if each[0] <= shown[start]]
    if not before:
        return None
    keyframe, seek_to = max(before)
    awaited = tuple(time for time in shown[: start + 1] if time >= keyframe)
    return Place(seek_to, keyframe, awaited) if start + 1 - len(awaited) >= WORTHWHILE else None


def _jump(container: InputContainer, stream: VideoStream, place: Place) -> Iterator[av.VideoFrame] | None:
    """The frames from the wanted one on; None when those before it are not what the packets promised."""
    try:
        stream.thread_type = "AUTO"
        container.seek(place.seek_to, stream=stream)
        frames = container.decode(stream)
        awaited = iter(place.awaited)
        for frame in frames:
            if frame.pts is None:
                return None
            if frame.pts < place.keyframe:
                continue  # pictures shown before an open group's keyframe: they need the group before
            if frame.pts != next(awaited) or frame.is_corrupt:
                return None
            if frame.pts == place.awaited[-1]:
                return chain((frame,), frames)
    except av.FFmpegError:
        pass
    return None
