"""Writing what people look at: H.264 clips that play everywhere, pictures, and the contact sheet."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tuner.files import atomic_path

if TYPE_CHECKING:
    from av.video.stream import VideoStream
    from numpy.typing import NDArray

QUALITY = "15"
"""x264's constant rate factor: visually lossless, since people judge the model by these files."""
BT709 = 1
LIMITED_RANGE = 1


def write_mp4(path: Path, frames: NDArray[np.uint8], fps: float, *, comment: str = "") -> None:
    """Write ``frames`` (F, H, W, 3) uint8 RGB as H.264 at ``fps`` frames per second, at once or not at all.

    The pixel format that plays everywhere (yuv420p) has even sizes only: an odd edge gets its last row or
    column twice. ``comment`` goes into the file's metadata. Raises ValueError for another shape or type.
    """
    import av

    _check(frames)
    padded = _even(frames)
    with atomic_path(path) as temporary, av.open(str(temporary), "w", options={"movflags": "+faststart"}) as container:
        if comment:
            container.metadata["comment"] = comment
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        _configure(stream, padded.shape[2], padded.shape[1])
        for picture in padded:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            # Untagged or BT.601 colours look washed out or shifted in players that assume BT.709.
            frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709")
            frame.colorspace, frame.color_range = BT709, LIMITED_RANGE
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _configure(stream: VideoStream, width: int, height: int) -> None:
    stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
    stream.options = {"crf": QUALITY, "preset": "medium"}
    context: Any = stream.codec_context
    context.colorspace = context.color_primaries = context.color_trc = BT709
    context.color_range = LIMITED_RANGE


def read_evenly(path: Path, count: int) -> NDArray[np.uint8]:
    """At most ``count`` evenly spaced frames (F, H, W, 3) of a clip or picture that was written here."""
    import av

    with av.open(str(path)) as container:
        # Compressed colours take half the room of RGB: a long clip is held whole.
        frames = list(container.decode(video=0))
    places = np.linspace(0, len(frames) - 1, min(count, len(frames))).round().astype(int)
    return np.stack([frames[place].to_ndarray(format="rgb24") for place in places])


def write_png(path: Path, picture: NDArray[np.uint8]) -> None:
    """Write ``picture`` (H, W, 3) uint8 RGB as PNG, at once or not at all."""
    from PIL import Image

    with atomic_path(path) as temporary:
        Image.fromarray(picture).save(temporary, format="PNG")


def evenly(frames: NDArray[np.uint8], count: int) -> NDArray[np.uint8]:
    """At most ``count`` of ``frames`` (F, …), the first and the last among them, evenly spaced."""
    if len(frames) <= count:
        return frames
    return np.asarray(frames[np.linspace(0, len(frames) - 1, count).round().astype(int)])


def poster(frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The picture (H, W, 3) that stands for a clip: its middle frame."""
    return np.asarray(frames[len(frames) // 2])


def _check(frames: NDArray[np.uint8]) -> None:
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not len(frames):
        raise ValueError(f"frames must be (F, H, W, 3) uint8 with F > 0, not {frames.shape} {frames.dtype}")


def _even(frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
    rows, columns = frames.shape[1] % 2, frames.shape[2] % 2
    return np.pad(frames, ((0, 0), (0, rows), (0, columns), (0, 0)), mode="edge") if rows or columns else frames
