"""From a file on disk to the pixels that are encoded: the chosen frames, upright, resized, cut to the bucket."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from torch import Tensor

from tuner.builtin.datasets.pictures import Unreadable, open_picture, pixels_of, quarter_turns, video_stream
from tuner.builtin.datasets.seek import frames_from
from tuner.data.samples import Bucket, Framing, Sample, View
from tuner.errors import DataError

SWSCALE = 0x4 | 0x2000 | 0x40000 | 0x80000
"""FFmpeg's SWS_BICUBIC | FULL_CHR_H_INT | ACCURATE_RND | BITEXACT. Bicubic alone takes chroma from the nearest
sample, four times further from the exact picture; exact rounding makes machines agree."""
HALF = 127.5
"""Half of what 8 bits hold."""
BT709, BT601 = 1, 5
UNSPECIFIED = 2
HD_WIDTH, HD_HEIGHT = 1280, 576
"""Video that does not name its colours has those of high definition from this width, or above this height."""


def decode(sample: Sample, view: View) -> Tensor:
    """The pixels of one view of a sample: :func:`decode_file` with the sample's file and bucket."""
    return decode_file(sample.path, view, sample.bucket)


def decode_file(path: Path, view: View, bucket: Bucket) -> Tensor:
    """The pixels of a clip or picture: (3, F, H, W) float32 in [-1, 1], F, H and W as the bucket says.

    Frames are counted from ``view.start`` in display order. With ``view.fps`` the k-th one is what is on the screen
    k / fps seconds after the first, so that frames are left out or repeated; the last one stays for as long as the
    file says. Nothing behind the last one is decoded. A frame is turned upright and stretched to square pixels as
    players do, resized with antialiased bicubic, and cut. A picture, or a clip of one frame, is repeated F times.
    Raises DataError naming the file when it cannot be decoded or ends too early.
    """
    # NumPy, not torch: its threads wait for one another on a busy machine, in every small operation.
    pixels = np.empty((3, bucket.frames, bucket.height, bucket.width), np.float32)
    done = 0
    try:
        scaler, still = Scaler(view.framing, bucket), _still(path)
        if still is not None:
            scaler.draw(still, pixels)
            return torch.from_numpy(pixels)
        with closing(frames_from(path, view.start)) as frames:
            for frame, times in _each_once(frames) if view.fps is None else _at_rate(frames, view.fps):
                scaler.draw(frame, pixels[:, done : done + times])
                done = min(done + times, bucket.frames)
                if done == bucket.frames:
                    return torch.from_numpy(pixels)
        if _holds_one_frame(path):
            with closing(frames_from(path, 0)) as frames:
                scaler.draw(next(frames), pixels)
                return torch.from_numpy(pixels)
    except (av.FFmpegError, OSError, ValueError, Unreadable) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"a clip cannot be decoded after frame {view.start + done}: {reason}", where=path) from error
    raise DataError(
        f"a clip ends after {done} frames where {bucket.frames} are needed ({view})"
        if view.start or view.fps
        else f"a clip ends after {done} frames where {bucket.frames} are needed",
        where=path,
    )


class Scaler:
    """Makes frames into pictures of a bucket. Kept from frame to frame, because setting up a scaler takes time."""

    def __init__(self, framing: Framing, bucket: Bucket) -> None:
        self._framing, self._bucket = framing, bucket
        self._reformatter = VideoReformatter()

    def draw(self, frame: av.VideoFrame, values: np.ndarray) -> None:
        """Put the framed, upright picture in [-1, 1] into ``values``: (3, T, H, W) float32, the same T times."""
        framing, turns = self._framing, quarter_turns(frame)
        width, height = (framing.height, framing.width) if turns % 2 else (framing.width, framing.height)
        unnamed = frame.colorspace == UNSPECIFIED and not frame.format.is_rgb
        colours = {"src_colorspace": _matrix(frame)} if unnamed else {}
        # A plane for each colour: the same numbers as rgb24, in a third of the time.
        planar = self._reformatter.reformat(frame, width, height, "gbrp", interpolation=SWSCALE, **colours)
        for channel, plane in zip((1, 2, 0), planar.planes, strict=True):
            rows = np.frombuffer(memoryview(plane), np.uint8).reshape(-1, plane.line_size)[:height, :width]
            upright = np.rot90(rows, turns)
            cut = upright[framing.top :, framing.left :][: self._bucket.height, : self._bucket.width]
            np.divide(cut, HALF, out=values[channel, 0], dtype=np.float32)
            values[channel, 0] -= 1
        values[:, 1:] = values[:, :1]


def _still(path: Path) -> av.VideoFrame | None:
    """A picture as a frame; None when the file is a clip."""
    with open_picture(path) as picture:
        return None if picture is None else av.VideoFrame.from_ndarray(pixels_of(picture), "rgb24")


def _each_once(frames: Iterable[av.VideoFrame]) -> Iterator[tuple[av.VideoFrame, int]]:
    return ((frame, 1) for frame in frames)


def _at_rate(frames: Iterable[av.VideoFrame], fps: float) -> Iterator[tuple[av.VideoFrame, int]]:
    """The frames on the screen at every 1 / fps seconds from the first one on, each with how often that is (> 0).

    Times count to half a tick of the file's clock. Raises Unreadable where frames have no times, or times go back.
    """
    taken, began, before = 0, 0.0, None
    current, until = None, 0.0
    for frame in frames:
        if frame.time is None or (before is not None and frame.time <= before):
            raise Unreadable("the times of its frames are missing or go back, so it cannot be resampled (video.fps)")
        half_tick = float(frame.time_base) / 2
        if current is None:
            began = frame.time
        elif times := _due(frame.time - half_tick - began, fps) - taken:
            yield current, times
            taken += times
        length = frame.duration * frame.time_base if frame.duration else frame.time - (before or began)
        current, before, until = frame, frame.time, float(frame.time + length + half_tick)
    if current is not None and (times := _due(until - began, fps) - taken) > 0:
        yield current, times


def _due(elapsed: float, fps: float) -> int:
    """How many of the moments 0, 1 / fps, 2 / fps … are before ``elapsed`` seconds."""
    return -int(-elapsed * fps // 1)


def _holds_one_frame(path: Path) -> bool:
    with av.open(str(path)) as container:
        return [bool(packet.size) for packet in container.demux(video_stream(container))].count(True) == 1


def _matrix(frame: av.VideoFrame) -> int:
    """The colour matrix that players assume for a frame that names none."""
    return BT709 if frame.width >= HD_WIDTH or frame.height > HD_HEIGHT else BT601
