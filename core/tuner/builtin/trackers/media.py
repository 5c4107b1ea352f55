"""Files of a validation in the forms that trackers take."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tuner.builtin.file_kinds import is_picture

if TYPE_CHECKING:
    from PIL.Image import Image

WIDTH, FPS = 320, 8.0
"""Of GIFs at most, in pixels and frames per second: they are an order of magnitude larger than the video."""


def first_frames(path: Path, count: int = 1) -> list[Image]:
    """A picture, or up to ``count`` of a video's first frames, as RGB."""
    frames = (frame for frame, _ in _frames(path))
    return [frame for _, frame in zip(range(count), frames, strict=False)]


def gif_of(path: Path) -> tuple[bytes, int, int]:
    """A picture as PNG, as large as it is, or a video as a small GIF: (data, width, height)."""
    data = io.BytesIO()
    if is_picture(path):
        [picture] = first_frames(path)
        picture.save(data, format="PNG")
        return data.getvalue(), picture.width, picture.height
    frames, due = [], 0.0
    for frame, seconds in _frames(path):
        if seconds >= due - 1e-3:
            due = seconds + 1 / FPS
            scale = min(1.0, WIDTH / frame.width)
            frames.append(frame.resize((round(frame.width * scale), max(1, round(frame.height * scale)))))
    frames[0].save(data, format="GIF", save_all=True, append_images=frames[1:], duration=round(1000 / FPS), loop=0)
    return data.getvalue(), frames[0].width, frames[0].height


def _frames(path: Path) -> Iterator[tuple[Image, float]]:
    """The frames of a video, or the only one of a picture, with their times in seconds."""
    from PIL import Image

    if is_picture(path):
        with Image.open(path) as picture:
            yield picture.convert("RGB"), 0.0
        return
    import av

    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            yield frame.to_image(), frame.time or 0.0
