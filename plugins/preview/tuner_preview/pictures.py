"""The files of previews: a small moving picture of each, and a sheet of all of one clip."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from tuner.files import atomic_path

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Frames = NDArray[np.uint8]

T = TypeVar("T")

QUALITY = 70
"""WebP's: a preview of 24 frames of 320 pixels is some 100 to 200 kB."""
COLUMNS, ROWS, CELL = 6, 12, 160
"""Of a sheet at most: frames of a preview, previews, and pixels of a frame's longer edge."""
LABEL, GAP, TEXT = 100, 4, 14
BACKGROUND, FOREGROUND = (24, 25, 28), (238, 238, 240)


@dataclass(frozen=True)
class Shown:
    """A preview."""

    step: int
    """Sampling steps done."""
    frames: Frames
    """(F, H, W, 3), at most :data:`COLUMNS` of them"""


def write_moving(path: Path, frames: Frames, seconds: float) -> None:
    """Write ``frames`` (F, H, W, 3) uint8 RGB as WebP that goes round in ``seconds``, at once or not at all."""
    from PIL import Image

    first, *others = map(Image.fromarray, frames)
    with atomic_path(path) as temporary:
        if others:
            each = max(20, round(1000 * seconds / len(frames)))
            first.save(
                temporary, format="WEBP", quality=QUALITY, save_all=True, append_images=others, duration=each, loop=0
            )
        else:
            first.save(temporary, format="WEBP", quality=QUALITY)


def write_sheet(path: Path, previews: Sequence[Shown]) -> None:
    """Write a picture with a row for each preview, at once or not at all: the last one and evenly spaced others."""
    from PIL import Image, ImageDraw, ImageFont

    rows = _evenly(list(previews), ROWS)
    height, width = rows[0].frames.shape[1:3]
    scale = CELL / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    columns = min(COLUMNS, len(rows[0].frames))
    sheet = Image.new("RGB", (LABEL + columns * (size[0] + GAP) + GAP, len(rows) * (size[1] + GAP) + GAP), BACKGROUND)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(TEXT)
    for number, row in enumerate(rows):
        top = GAP + number * (size[1] + GAP)
        draw.text((GAP, top), f"step {row.step}", fill=FOREGROUND, font=font)
        for column, frame in enumerate(_evenly(list(row.frames), columns)):
            small = Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS)
            sheet.paste(small, (LABEL + column * (size[0] + GAP), top))
    with atomic_path(path) as temporary:
        sheet.save(temporary, format="WEBP", quality=QUALITY)


def evenly(count: int, most: int) -> list[int]:
    """At most ``most`` of ``count`` indices, evenly spaced, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return [round(index * (count - 1) / max(1, most - 1)) for index in range(most)]


def _evenly(found: Sequence[T], most: int) -> list[T]:
    return [found[index] for index in evenly(len(found), most)]
