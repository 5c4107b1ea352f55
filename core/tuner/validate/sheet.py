"""The contact sheet: every prompt's clip at a glance, one row each, in one picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from tuner.files import atomic_path
from tuner.validate.media import evenly

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image, ImageDraw, ImageFont

COLUMNS = 6
CELL = 208
"""Longer edge of a thumbnail in pixels."""
GAP, MARGIN, LABEL = 6, 20, 240
TITLE_SIZE, NAME_SIZE, TEXT_SIZE = 20, 15, 12
BACKGROUND, BRIGHT, DIM, LINE = (24, 25, 28), (238, 238, 240), (160, 163, 170), (52, 54, 60)
WIDE_FONTS = (
    "NotoSansCJK-Regular.ttc",
    "SourceHanSans-Regular.ttc",
    "wqy-microhei.ttc",
    "DroidSansFallbackFull.ttf",
    "PingFang.ttc",
    "msyh.ttc",
    "Arial Unicode.ttf",
)
"""Fonts with Chinese, where the system has one: Pillow's own font is Latin only."""
LATIN = 0x250


@dataclass(frozen=True)
class Row:
    """One prompt and what came out of it."""

    name: str
    text: str
    frames: NDArray[np.uint8]
    """(F, H, W, 3)"""


def write_contact_sheet(path: Path, rows: Sequence[Row], *, title: str, subtitle: str = "") -> None:
    """Write one PNG with a row for each prompt and evenly spaced frames as columns, at once or not at all.

    Raises ValueError where there are no rows.
    """
    if not rows:
        raise ValueError("a contact sheet needs at least one row")
    with atomic_path(path) as temporary:
        contact_sheet(rows, title=title, subtitle=subtitle).save(temporary, format="PNG")


def contact_sheet(rows: Sequence[Row], *, title: str, subtitle: str = "") -> Image.Image:
    """The sheet as a picture."""
    from PIL import Image, ImageDraw

    pictures = [list(_thumbnails(row.frames)) for row in rows]
    heights = [max(each.height for each in row) for row in pictures]
    width = MARGIN + LABEL + max(sum(each.width + GAP for each in row) for row in pictures) + MARGIN - GAP
    top = MARGIN + TITLE_SIZE + TEXT_SIZE + 3 * GAP
    sheet = Image.new("RGB", (width, top + sum(height + 3 * GAP for height in heights) + MARGIN - 3 * GAP), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    _heading(draw, width, title, subtitle)
    for row, thumbnails, height in zip(rows, pictures, heights, strict=True):
        _label(draw, row, top, height)
        left = MARGIN + LABEL
        for thumbnail in thumbnails:
            sheet.paste(thumbnail, (left, top))
            left += thumbnail.width + GAP
        top += height + 3 * GAP
    return sheet


def _thumbnails(frames: NDArray[np.uint8]) -> Iterator[Image.Image]:
    from PIL import Image

    for picture in evenly(frames, COLUMNS):
        image = Image.fromarray(picture)
        scale = CELL / max(image.size)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        yield image.resize(size, Image.Resampling.LANCZOS)


def _heading(draw: ImageDraw.ImageDraw, width: int, title: str, subtitle: str) -> None:
    draw.text((MARGIN, MARGIN - GAP), title, font=_font(TITLE_SIZE, title), fill=BRIGHT)
    draw.text((MARGIN, MARGIN + TITLE_SIZE), subtitle, font=_font(TEXT_SIZE, subtitle), fill=DIM)
    bottom = MARGIN + TITLE_SIZE + TEXT_SIZE + GAP
    draw.line((MARGIN, bottom, width - MARGIN, bottom), fill=LINE)


def _label(draw: ImageDraw.ImageDraw, row: Row, top: int, height: int) -> None:
    """Nickname and as much of the prompt as fits beside the thumbnails."""
    room = LABEL - 2 * GAP
    name = _fitted(draw, row.name, NAME_SIZE, room)
    draw.text((MARGIN, top), name, font=_font(NAME_SIZE, name), fill=BRIGHT)
    if not _drawable(row.text):
        draw.text((MARGIN, top + NAME_SIZE + GAP), "prompt: see validation.json", font=_font(TEXT_SIZE, ""), fill=DIM)
        return
    y, bottom = top + NAME_SIZE + GAP, top + height
    lines = list(_wrapped(draw, row.text, room))
    fitting = max(0, (bottom - y) // (TEXT_SIZE + 3))
    for index, line in enumerate(lines[:fitting]):
        cut = index == fitting - 1 and len(lines) > fitting
        draw.text((MARGIN, y), f"{line} …" if cut else line, font=_font(TEXT_SIZE, row.text), fill=DIM)
        y += TEXT_SIZE + 3


def _wrapped(draw: ImageDraw.ImageDraw, text: str, room: int) -> Iterator[str]:
    """``text`` in lines of at most ``room`` pixels; scripts without spaces break between characters."""
    font = _font(TEXT_SIZE, text)
    words = text.split() if _latin(text) else list(text)
    joint = " " if _latin(text) else ""
    line = ""
    for word in words:
        longer = f"{line}{joint}{word}" if line else word
        if line and draw.textlength(longer, font=font) > room:
            yield line
            longer = word
        line = longer
    if line:
        yield line


def _fitted(draw: ImageDraw.ImageDraw, text: str, size: int, room: int) -> str:
    """``text``, shortened with an ellipsis to ``room`` pixels."""
    font = _font(size, text)
    if draw.textlength(text, font=font) <= room:
        return text
    while text and draw.textlength(f"{text}…", font=font) > room:
        text = text[:-1]
    return f"{text}…"


def _latin(text: str) -> bool:
    return all(ord(character) < LATIN or character in "–—‘’“”…•" for character in text)


def _drawable(text: str) -> bool:
    return _latin(text) or _wide_font(TEXT_SIZE) is not None


def _font(size: int, text: str) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """A font of ``size`` pixels that has the letters of ``text``, where there is one."""
    from PIL import ImageFont

    wide = None if _latin(text) else _wide_font(size)
    return ImageFont.load_default(size) if wide is None else wide


@cache
def _wide_font(size: int) -> ImageFont.FreeTypeFont | None:
    from PIL import ImageFont

    for name in WIDE_FONTS:
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return None
