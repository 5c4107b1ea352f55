"""From a clip on disk to the pixels that are encoded: the first frames, upright, resized, cut to the bucket."""

from __future__ import annotations

from collections.abc import Iterator

import av
import torch
from torch import Tensor

from tuner.data.pictures import Unreadable, quarter_turns, video_stream
from tuner.data.samples import Framing, Sample, View
from tuner.errors import DataError

SWSCALE = 0x4 | 0x2000 | 0x40000 | 0x80000
"""FFmpeg's SWS_BICUBIC | FULL_CHR_H_INT | ACCURATE_RND | BITEXACT. Bicubic alone takes chroma from the nearest
sample, four times further from the exact picture; exact rounding makes machines agree."""
BT709, BT601 = 1, 5
UNSPECIFIED = 2
HD_WIDTH, HD_HEIGHT = 1280, 576
"""Video that does not name its colours has those of high definition from this width, or above this height."""


def decode(sample: Sample, view: View) -> Tensor:
    """The pixels of one view of a sample: (3, F, H, W) float32 in [-1, 1], F, H and W as its bucket says.

    Frames are taken from the beginning; nothing behind the last one is decoded. The frame is turned upright
    and stretched to square pixels as players do, resized with antialiased bicubic, and cut.
    Raises DataError naming the clip when it cannot be decoded or ends too early.
    """
    pixels = torch.empty(sample.bucket.frames, sample.bucket.height, sample.bucket.width, 3, dtype=torch.uint8)
    done = 0
    try:
        for frame in _frames(sample):
            pixels[done] = _picture(frame, view.framing, sample.bucket.height, sample.bucket.width)
            done += 1
            if done == sample.bucket.frames:
                break
    except (av.FFmpegError, OSError, Unreadable) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"a clip cannot be decoded after frame {done}: {reason}", where=sample.path) from error
    if done < sample.bucket.frames:
        raise DataError(f"a clip ends after {done} frames where {sample.bucket.frames} are needed", where=sample.path)
    return pixels.permute(3, 0, 1, 2).contiguous().to(torch.float32).div_(127.5).sub_(1.0)


def _frames(sample: Sample) -> Iterator[av.VideoFrame]:
    with av.open(str(sample.path)) as container:
        stream = video_stream(container)
        stream.thread_type = "AUTO"
        yield from container.decode(stream)


def _picture(frame: av.VideoFrame, framing: Framing, height: int, width: int) -> Tensor:
    """(height, width, 3) uint8: the framed, upright picture."""
    turns = quarter_turns(frame)
    stored = (framing.height, framing.width) if turns % 2 else (framing.width, framing.height)
    colours = {"src_colorspace": _matrix(frame)} if frame.colorspace == UNSPECIFIED else {}
    rgb = frame.reformat(width=stored[0], height=stored[1], format="rgb24", interpolation=SWSCALE, **colours)
    picture = torch.from_numpy(rgb.to_ndarray())
    upright = torch.rot90(picture, turns, dims=(0, 1))
    return upright[framing.top : framing.top + height, framing.left : framing.left + width]


def _matrix(frame: av.VideoFrame) -> int:
    """The colour matrix that players assume for a frame that names none."""
    return BT709 if frame.width >= HD_WIDTH or frame.height > HD_HEIGHT else BT601
