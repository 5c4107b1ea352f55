"""Opening a file of moving or still pictures. Imported by the probing processes: PyAV, Pillow, nothing heavier."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import av
from av.container import InputContainer
from av.stream import Disposition
from av.video.stream import VideoStream
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

if TYPE_CHECKING:
    import numpy as np

PICTURE_FORMATS = ("AVIF", "BMP", "JPEG", "PNG", "TIFF", "WEBP")
"""What Pillow reads here, by its names; everything else is opened as a clip, a gif too."""
HEIF_BRANDS = frozenset({"heic", "heix", "hevc", "hevx", "heim", "heis", "mif1", "msf1"})
LYING_FIRST = frozenset({5, 6, 7, 8})
"""EXIF orientations that exchange width and height."""
SIXTEEN_BITS = 257
"""65535 / 255"""


class Unreadable(Exception):
    """A file that cannot be used; the message is the reason."""


def video_stream(container: InputContainer) -> VideoStream:
    """The first stream of moving pictures of an open file.

    Raises Unreadable when there is none, or when the file is a still picture of a kind that Pillow does not read here.
    """
    brand = str(container.metadata.get("major_brand", "")).strip()
    if brand in HEIF_BRANDS:
        raise Unreadable(f"is a picture of a kind that is not read here ({brand}): convert it to JPEG or PNG")
    if container.format.name == "image2" or container.format.name.endswith("_pipe"):
        kind = container.streams.video[0].codec_context.name if container.streams.video else container.format.name
        raise Unreadable(f"is a damaged picture, or one of a kind that is not read here ({kind})")
    for stream in container.streams.video:
        if not stream.disposition & Disposition.attached_pic:  # the cover of a song
            return stream
    raise Unreadable("has no video stream, only sound" if container.streams.audio else "has no video stream")


def quarter_turns(frame: av.VideoFrame) -> int:
    """Counter-clockwise quarter turns that show a frame upright, from its display matrix."""
    turns: int = round(frame.rotation / 90) % 4
    return turns


@contextmanager
def open_picture(path: Path) -> Iterator[Image.Image | None]:
    """The still picture in a file, by its content whatever its name; None when the file is something else.

    Of an animated WebP or AVIF, the first frame. Raises Unreadable, here or while the picture is read, when it is
    damaged, cut short, or larger than Pillow takes for honest (``PIL.Image.MAX_IMAGE_PIXELS``).
    """
    try:
        try:
            picture = Image.open(path, formats=PICTURE_FORMATS)
        except UnidentifiedImageError:
            yield None
            return
        with picture:
            yield picture
    except (Unreadable, av.FFmpegError, MemoryError):
        raise
    except FileNotFoundError as error:
        raise Unreadable("is not there any more") from error
    except Exception as error:  # what Pillow raises for bad files is documented nowhere: any of a dozen kinds
        raise Unreadable(f"cannot be read as a picture: {error}") from error


def displayed_size(picture: Image.Image) -> tuple[int, int]:
    """Width and height in pixels as displayed: the EXIF orientation is applied. To be asked before it is loaded."""
    width, height = picture.size
    turned = picture.getexif().get(ExifTags.Base.Orientation) in LYING_FIRST
    # Pillow itself turns TIFF, and says the turned size.
    return (height, width) if turned and picture.format != "TIFF" else (width, height)


def pixels_of(picture: Image.Image) -> np.ndarray:
    """(H, W, 3) uint8 RGB, upright; what is transparent lies over white. Raises Unreadable for 32-bit values."""
    import numpy as np  # not above: probing does without, and its processes start sooner

    upright = ImageOps.exif_transpose(picture)
    if upright.mode.startswith("I;16") or (upright.mode == "I" and picture.format == "PNG"):
        grey = np.asarray(upright).astype(np.uint32)
        return np.repeat(((grey + SIXTEEN_BITS // 2) // SIXTEEN_BITS).astype(np.uint8)[..., None], 3, axis=2)
    if upright.mode in ("I", "F"):
        raise Unreadable("has 32-bit values: convert it to 8 or 16 bits")
    if upright.mode.endswith(("A", "a")) or "transparency" in upright.info:
        layer = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return np.asarray(upright.convert("RGB"))
