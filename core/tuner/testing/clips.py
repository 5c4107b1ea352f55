"""Short captioned clips and pictures made by our own code: shapes that move over a gradient, H.264 in mp4 by default.

They stand in for people's videos in the quickstart, in tests and in benchmarks: real files that go
through the real decoder, of different sizes, lengths and frame rates, each with a caption that says
what is drawn. The same seed gives the same clip.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from tuner.files import atomic_path, atomic_write_bytes, atomic_write_text

if TYPE_CHECKING:
    from PIL import Image, ImageDraw

COLOURS = {
    "red": (214, 48, 49),
    "orange": (240, 147, 43),
    "yellow": (246, 229, 81),
    "green": (46, 184, 92),
    "blue": (45, 108, 223),
    "purple": (142, 68, 173),
    "white": (245, 246, 250),
    "black": (24, 26, 30),
}
KINDS = ("circle", "square", "triangle")
DIRECTIONS = {
    "from left to right": (1, 0),
    "from right to left": (-1, 0),
    "upwards": (0, -1),
    "downwards": (0, 1),
    "diagonally": (1, 1),
}
FOLDER_CLIPS = (
    # width, height, frames, frames per second
    (96, 64, 33, 16),
    (64, 96, 25, 24),
    (80, 80, 29, 12),
    (128, 72, 40, 25),
    (96, 64, 21, 30),
    (72, 128, 34, 16),
    (112, 64, 27, 20),
    (96, 96, 37, 24),
)
"""What :func:`render_folder` renders, in turn."""
SUPERSAMPLING = 3
MILLISECOND = Fraction(1, 1000)
QUARTER_RIGHT = b"".join(
    value.to_bytes(4, "big", signed=True) for value in (0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
)
"""The display matrix of a track that is to be turned clockwise by 90 degrees."""


@dataclass(frozen=True)
class Encoding:
    """How a clip is encoded: FFmpeg's names of the encoder and of the pixels, and the encoder's options."""

    codec: str
    pixels: str = "yuv420p"
    options: Mapping[str, str] = field(default_factory=dict)


H264 = Encoding("libx264", options={"crf": "16", "preset": "fast", "threads": "1"})
"""Nearly lossless; one thread, so that the bytes are always the same."""


@dataclass(frozen=True)
class Shape:
    """One thing that moves. Lengths are in units of the clip's shorter edge, times in units of the clip."""

    kind: str
    colour: str
    direction: str
    offset: float
    """Place across the direction of travel, from 0 to 1."""
    radius: float


@dataclass(frozen=True)
class Scene:
    """What a clip shows, drawn from its seed."""

    background: str
    shapes: tuple[Shape, ...]

    @property
    def caption(self) -> str:
        """One sentence that says what is drawn."""
        things = " and ".join(f"{_a(each.colour)} {each.kind} moving {each.direction}" for each in self.shapes)
        return f"{things[0].upper()}{things[1:]} over {_a(self.background)} background."

    @property
    def short_caption(self) -> str:
        """A shorter wording of the same."""
        things = " and ".join(f"{_a(each.colour)} {each.kind}" for each in self.shapes)
        return f"{things[0].upper()}{things[1:]}, {self.background} background, simple animation."


def _a(word: str) -> str:
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def scene(seed: int) -> Scene:
    """The scene of a seed: one or two shapes of colours that differ from the background's."""
    draw = random.Random(seed)
    background, *colours = draw.sample(sorted(COLOURS), 3)
    shapes = tuple(
        Shape(
            kind=draw.choice(KINDS),
            colour=colour,
            direction=draw.choice(sorted(DIRECTIONS)),
            offset=draw.uniform(0.3, 0.7),
            radius=draw.uniform(0.14, 0.24),
        )
        for colour in colours[: draw.randint(1, 2)]
    )
    return Scene(background, shapes)


def render_clip(
    path: Path,
    *,
    width: int,
    height: int,
    frames: int,
    fps: int,
    seed: int,
    encoding: Encoding = H264,
    times: Sequence[int] | None = None,
) -> str:
    """Render the scene of ``seed`` to ``path`` and return its caption. The container is chosen by the suffix.

    Arguments
        width, height: in pixels.
        fps: frames per second.
        times: when each frame is shown, in milliseconds; evenly at ``fps`` when None.
    Raises ValueError for odd sizes, which 4:2:0 does not have, and FileExistsError rather than overwrite a file.
    """
    if width % 2 or height % 2 or min(width, height) < 16 or frames < 1:
        raise ValueError(
            f"cannot render {frames} frames of {width}x{height}: sizes are even, at least 16; frames at least 1"
        )
    if path.exists():
        raise FileExistsError(path)
    drawn = scene(seed)
    with atomic_path(path) as temporary:
        pictures = [draw_frame(drawn, index / max(frames - 1, 1), width, height) for index in range(frames)]
        _encode(temporary, pictures, fps, encoding, times)
    return drawn.caption


def render_picture(path: Path, *, width: int, height: int, seed: int, orientation: int = 1) -> str:
    """Draw the scene of ``seed`` into a picture file of any kind that Pillow writes, and return its caption.

    Arguments
        width, height: in pixels, as stored.
        orientation: what EXIF says of how to turn it, 1 to 8; 6 is what a phone held upright says.
    Raises FileExistsError rather than overwrite a file.
    """
    from PIL import ExifTags, Image

    if path.exists():
        raise FileExistsError(path)
    drawn, exif = scene(seed), Image.Exif()
    if orientation != 1:
        exif[ExifTags.Base.Orientation] = orientation
    with atomic_path(path) as temporary:
        draw_frame(drawn, 0.5, width, height).save(temporary, exif=exif)
    return drawn.caption


def turn_clip(path: Path) -> None:
    """Say in an mp4 or mov, as phones do, that its pictures are to be turned clockwise by 90 degrees."""
    data = path.read_bytes()
    header = data.index(b"tkhd") + 4
    matrix = header + (40 if data[header] == 0 else 52)
    atomic_write_bytes(path, data[:matrix] + QUARTER_RIGHT + data[matrix + len(QUARTER_RIGHT) :])


def render_folder(folder: Path, count: int = 8, seed: int = 0) -> list[Path]:
    """Render ``count`` captioned clips into ``folder`` and return their paths.

    Each clip has a ``.txt`` of the same stem with two wordings of its caption, one a line. Clips that
    are there already are left as they are, so that an interrupted call can be repeated.
    """
    paths = []
    for index in range(count):
        width, height, frames, fps = FOLDER_CLIPS[index % len(FOLDER_CLIPS)]
        path = folder / f"clip-{index:02d}.mp4"
        clip_seed = seed * 1000 + index
        if not path.exists():
            render_clip(path, width=width, height=height, frames=frames, fps=fps, seed=clip_seed)
        caption = path.with_suffix(".txt")
        if not caption.exists():
            drawn = scene(clip_seed)
            atomic_write_text(caption, f"{drawn.caption}\n{drawn.short_caption}\n")
        paths.append(path)
    return paths


def draw_frame(drawn: Scene, time: float, width: int, height: int) -> Image.Image:
    """The picture (width x height, RGB) of a scene at ``time`` in [0, 1]."""
    from PIL import Image, ImageDraw

    size = (width * SUPERSAMPLING, height * SUPERSAMPLING)
    picture = _gradient(COLOURS[drawn.background], size)
    pen = ImageDraw.Draw(picture)
    for shape in drawn.shapes:
        _draw_shape(pen, shape, time, size)
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def _gradient(colour: tuple[int, int, int], size: tuple[int, int]) -> Image.Image:
    """``colour`` from full at the top to two thirds at the bottom."""
    from PIL import Image

    column = Image.new("RGB", (1, 64))
    for y in range(64):
        share = 1 - y / 64 / 3
        red, green, blue = (round(channel * share) for channel in colour)
        column.putpixel((0, y), (red, green, blue))
    return column.resize(size, Image.Resampling.BILINEAR)


def _draw_shape(pen: ImageDraw.ImageDraw, shape: Shape, time: float, size: tuple[int, int]) -> None:
    x, y, radius = _place(shape, time, size)
    fill = COLOURS[shape.colour]
    box = (x - radius, y - radius, x + radius, y + radius)
    if shape.kind == "circle":
        pen.ellipse(box, fill=fill)
    elif shape.kind == "square":
        pen.rectangle(box, fill=fill)
    else:
        corners = [(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)]
        pen.polygon(corners, fill=fill)


def _place(shape: Shape, time: float, size: tuple[int, int]) -> tuple[float, float, float]:
    """Centre and radius in pixels: across the picture in the shape's direction, edge to edge over the clip."""
    width, height = size
    radius = shape.radius * min(size)
    along = (0.15 + 0.7 * time, 0.15 + 0.7 * (1 - time))
    horizontal, vertical = DIRECTIONS[shape.direction]
    x = width * (shape.offset if horizontal == 0 else along[horizontal < 0])
    y = height * (shape.offset if vertical == 0 else along[vertical < 0])
    return x, y, radius


def _encode(
    path: Path, pictures: Sequence[Image.Image], fps: int, encoding: Encoding, times: Sequence[int] | None
) -> None:
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream(encoding.codec, rate=fps, options=dict(encoding.options))
        stream.width, stream.height = pictures[0].size
        stream.pix_fmt = encoding.pixels
        if times is not None:
            stream.codec_context.time_base = MILLISECOND
        for index, picture in enumerate(pictures):
            frame = av.VideoFrame.from_image(picture)
            if times is not None:
                frame.pts, frame.time_base = times[index], MILLISECOND
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
