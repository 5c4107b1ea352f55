"""The layout of a tiny video autoencoder's decoder (TAEHV, of which taew2_1 and taew2_2 are for Wan). Light: no torch.

Names and shapes are those of the public files (github.com/madebyollin/taehv). What varies between them is read off the
file: latent channels, widths, how much each of three levels grows in time, and pixels for each output place.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt, prod
from pathlib import Path
from typing import TYPE_CHECKING

from tuner.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tuner.spec import ModelSpec

Shapes = dict[str, tuple[int, ...]]
KEY = "validation_preview_model"
LEVELS = 3
"""Times that a frame is doubled in height and width."""
MEMORIES = 3
"""Blocks of each level that see the frame before."""
FIRST, LAST = 1, 22
"""Places of the convolutions that take latents and give pixels."""
COLOURS = 3


@dataclass(frozen=True)
class Layout:
    """What a file says of its decoder."""

    channels: int
    """of the latents"""
    widths: tuple[int, int, int, int]
    """of the three levels, and of what gives pixels"""
    grows: tuple[int, int, int]
    """frames that each level makes of one"""
    patch: int
    """pixels along each edge of an output place"""

    @property
    def stride_time(self) -> int:
        """Frames for each latent frame."""
        frames: int = prod(self.grows)
        return frames

    @property
    def stride_space(self) -> int:
        """Pixels along each edge of a latent place."""
        return self.patch << LEVELS

    def shapes(self) -> Shapes:
        """Every parameter of the decoder: name -> shape."""
        found: Shapes = _convolution(FIRST, self.channels, self.widths[0])
        for level in range(LEVELS):
            width, place = self.widths[level], first_of(level)
            for block in range(place, place + MEMORIES):
                for index, inputs in ((0, 2 * width), (2, width), (4, width)):
                    found |= _convolution(f"{block}.conv.{index}", inputs, width)
            found[grow_of(level)] = (self.grows[level] * width, width, 1, 1)
            found[narrow_of(level)] = (self.widths[level + 1], width, 3, 3)
        return found | _convolution(LAST, self.widths[-1], COLOURS * self.patch**2)


def first_of(level: int) -> int:
    """The place of a level's first block: 3, 9 or 15. Behind its blocks come doubling, growth and a convolution."""
    return 3 + 6 * level


def grow_of(level: int) -> str:
    """The name of what makes more frames."""
    return f"decoder.{first_of(level) + 4}.conv.weight"


def narrow_of(level: int) -> str:
    """The name of a level's last convolution."""
    return f"decoder.{first_of(level) + 5}.weight"


def _convolution(name: int | str, inputs: int, outputs: int) -> Shapes:
    return {f"decoder.{name}.weight": (outputs, inputs, 3, 3), f"decoder.{name}.bias": (outputs,)}


def read_layout(path: Path) -> Layout:
    """The layout of the decoder in a safetensors file, of which only the header is read.

    Raises ModelError for a file that cannot be read, or whose names or shapes are not those of this autoencoder.
    """
    shapes = _header(path)
    outer = (f"decoder.{FIRST}.weight", *(narrow_of(level) for level in range(LEVELS)), f"decoder.{LAST}.weight")
    telling = (*outer, *(grow_of(level) for level in range(LEVELS)))
    for name in telling:
        if len(shapes.get(name, ())) != 4 or not all(shapes[name]):
            found = "no" if name not in shapes else f"a {_times(shapes[name])}"
            raise _refused(path, f"it has {found} {name}")
    widths = tuple(shapes[name][0] for name in outer[:-1])
    grows = tuple(shapes[grow_of(level)][0] // widths[level] for level in range(LEVELS))
    layout = Layout(shapes[outer[0]][1], widths, grows, isqrt(shapes[outer[-1]][0] // COLOURS))  # type: ignore[arg-type]
    _compare(path, shapes, layout.shapes())
    return layout


def check_fit(layout: Layout, spec: ModelSpec, path: Path) -> None:
    """Raise ModelError where the autoencoder is made for other latents than the model's."""
    ours = (spec.latents.channels, spec.latents.stride_time, spec.latents.stride_space)
    theirs = (layout.channels, layout.stride_time, layout.stride_space)
    if ours == theirs:
        return
    known = {16: "taew2_1", 48: "taew2_2"}.get(ours[0]) if spec.family == "wan" else None
    raise ModelError(
        f"this tiny autoencoder decodes {_geometry(*theirs)}, and {spec.flavour} has {_geometry(*ours)}",
        where=f"{KEY}: {path}",
        remedy=f"name {known}.safetensors, or leave the key out" if known else "name another one, or leave the key out",
    )


def _geometry(channels: int, time: int, space: int) -> str:
    return f"latents of {channels} channels for {time} frames of {space}x{space} pixels"


def _header(path: Path) -> Shapes:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"the file of the tiny autoencoder cannot be read: {error}",
            where=f"{KEY}: {path}",
            remedy="copy or download it again",
        ) from error


def _compare(path: Path, found: Mapping[str, tuple[int, ...]], expected: Shapes) -> None:
    """Raise ModelError for the first parameter of the decoder that is missing, of another shape, or too many."""
    for name, shape in expected.items():
        if name not in found:
            raise _refused(path, f"it has no {name}")
        if found[name] != shape:
            raise _refused(path, f"{name} is {_times(found[name])} and not {_times(shape)}")
    if more := sorted(name for name in found if name.startswith("decoder.") and name not in expected):
        raise _refused(path, f"it has {', '.join(more[:3])}{' …' * (len(more) > 3)}")


def _times(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _refused(path: Path, why: str) -> ModelError:
    return ModelError(
        f"this is no tiny video autoencoder of the TAEHV layout: {why}",
        where=f"{KEY}: {path}",
        remedy="for Wan take taew2_1.safetensors (16 latent channels) or taew2_2.safetensors (48), or leave the key "
        "out",
    )
