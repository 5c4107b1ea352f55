"""The contact sheet: every prompt's clip at a glance, one row each, in one picture."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from tuner.builtin.sampling.media import evenly
from tuner.files import atomic_path

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
FONTS = (
    "DejaVuSans.ttf",
    "Arial.ttf",
    "NotoSansCJK-Regular.ttc",
    "SourceHanSans-Regular.ttc",
    "wqy-microhei.ttc",
    "DroidSansFallbackFull.ttf",
    "PingFang.ttc",
    "msyh.ttc",
    "Arial Unicode.ttf",
)
"""Tried in turn, where the system has them, for letters that Pillow's own font lacks: it has plain Latin only."""
UNDRAWABLE = "(see validation.json)"
ABSENT = "\uffff"
"""A character that no font has: what is drawn for it is drawn for every letter that is missing."""


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
    width = max(
        width, *(2 * MARGIN + _length(text, size) for text, size in ((title, TITLE_SIZE), (subtitle, TEXT_SIZE)))
    )
    top = MARGIN + TITLE_SIZE + TEXT_SIZE + 3 * GAP
    sheet = Image.new("RGB", (width, top + sum(height + 3 * GAP for height in heights) + MARGIN - 3 * GAP), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    _heading(draw, width, title, subtitle)
    for row, thumbnails, height in zip(rows, pictures, heights, strict=True):
        _label(draw, row, top, height)
        left = MARGIN + LABEL
        for thumbnail in thumbnails:
            sheet.paste(thumbnail, (left, top))
            draw.rectangle((left - 1, top - 1, left + thumbnail.width, top + thumbnail.height), outline=LINE)
            left += thumbnail.width + GAP
        top += height + 3 * GAP
    return sheet


def labelled(picture: NDArray[np.uint8], text: str) -> NDArray[np.uint8]:
    """``picture`` (H, W, 3) with ``text`` in a corner, to be read on a thumbnail of it."""
    import numpy as np
    from PIL import Image, ImageDraw

    image = Image.fromarray(picture)
    draw, font = ImageDraw.Draw(image), _fonts(max(1, round(NAME_SIZE * max(image.size) / CELL)))[0]
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    draw.rectangle((0, 0, left + right, top + bottom), fill=BACKGROUND)
    draw.text((0, 0), text, font=font, fill=BRIGHT)
    return np.asarray(image)


def _thumbnails(frames: NDArray[np.uint8]) -> Iterator[Image.Image]:
    from PIL import Image

    for picture in evenly(frames, COLUMNS):
        image = Image.fromarray(picture)
        scale = CELL / max(image.size)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        yield image.resize(size, Image.Resampling.LANCZOS)


def _heading(draw: ImageDraw.ImageDraw, width: int, title: str, subtitle: str) -> None:
    _write(draw, (MARGIN, MARGIN - GAP), title, TITLE_SIZE, BRIGHT)
    _write(draw, (MARGIN, MARGIN + TITLE_SIZE), subtitle, TEXT_SIZE, DIM)
    bottom = MARGIN + TITLE_SIZE + TEXT_SIZE + GAP
    draw.line((MARGIN, bottom, width - MARGIN, bottom), fill=LINE)


def _write(
    draw: ImageDraw.ImageDraw, place: tuple[int, int], text: str, size: int, colour: tuple[int, int, int]
) -> None:
    """``text`` where a font has its letters, else a pointer to where it can be read."""
    font = _font(size, text)
    draw.text(place, text if font else UNDRAWABLE, font=font or _fonts(size)[0], fill=colour)


def _label(draw: ImageDraw.ImageDraw, row: Row, top: int, height: int) -> None:
    """Nickname and as much of the prompt as fits beside the thumbnails."""
    room = LABEL - 2 * GAP
    _write(draw, (MARGIN, top), _fitted(row.name, NAME_SIZE, room), NAME_SIZE, BRIGHT)
    y, step = top + NAME_SIZE + GAP, TEXT_SIZE + 3
    lines = list(_wrapped(row.text, room))
    fitting = max(0, (top + height - y) // step)
    if 0 < fitting < len(lines):
        lines[fitting - 1] = _fitted(f"{lines[fitting - 1]} …", TEXT_SIZE, room)
    for index, line in enumerate(lines[:fitting]):
        _write(draw, (MARGIN, y + index * step), line, TEXT_SIZE, DIM)


def _wrapped(text: str, room: int) -> Iterator[str]:
    """``text`` in lines of at most ``room`` pixels; where there are no spaces it breaks between characters."""
    font = _font(TEXT_SIZE, text)
    if font is None:
        yield UNDRAWABLE
        return
    line = ""
    for piece in re.findall(r"[\u2e80-\uffef]|[^\s\u2e80-\uffef]+|\s+", text):
        if line and font.getlength(line + piece) > room:
            yield line.rstrip()
            line = piece.lstrip()
        else:
            line += piece
    if line.strip():
        yield line.rstrip()


def _length(text: str, size: int) -> int:
    """Width of ``text`` in pixels; 0 where no font has its letters."""
    font = _font(size, text)
    return 0 if font is None else math.ceil(font.getlength(text))


def _fitted(text: str, size: int, room: int) -> str:
    """``text``, shortened with an ellipsis to ``room`` pixels."""
    font = _font(size, text)
    if font is None or font.getlength(text) <= room:
        return text
    text = text.removesuffix(" …")
    while text and font.getlength(f"{text}…") > room:
        text = text[:-1]
    return f"{text}…"


def _font(size: int, text: str) -> ImageFont.FreeTypeFont | None:
    """The first font of ``size`` pixels that has every letter of ``text``, if any."""
    return next((font for font in _fonts(size) if _covers(font, text)), None)


@cache
def _fonts(size: int) -> tuple[ImageFont.FreeTypeFont, ...]:
    from PIL import ImageFont

    found = [ImageFont.load_default(size)]
    for name in FONTS:
        with suppress(OSError):
            found.append(ImageFont.truetype(name, size))
    # Pillow without FreeType has a bitmap font that cannot be measured this way; its wheels all have it.
    return tuple(font for font in found if isinstance(font, ImageFont.FreeTypeFont))


def _covers(font: ImageFont.FreeTypeFont, text: str) -> bool:
    missing = _glyph(font, ABSENT)
    return all(character.isspace() or _glyph(font, character) != missing for character in set(text))


def _glyph(font: ImageFont.FreeTypeFont, character: str) -> bytes:
    return bytes(font.getmask(character))
