"""A clip as it is encoded: its pixels, and the pictures that stand in the place of its first or last frame."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from tuner.data.samples import Decode, Sample, View
from tuner.errors import DataError


@dataclass(frozen=True)
class Clip:
    """One view of a sample."""

    pixels: Tensor
    """(3, F, H, W) float32 in [-1, 1]"""
    frames: Mapping[str, Tensor]
    """role -> (3, 1, H, W), of those frames that a file was given for"""


def read_clip(decode: Decode, sample: Sample, view: View, roles: Iterable[str] = ()) -> Clip:
    """Decode one view, and the sample's own files of these ``roles`` with the same framing.

    Raises DataError for a file that cannot be decoded or ends too early.
    """
    length = sample.bucket.frames
    if view.still:
        pixels = first_frame(decode, sample, view).expand(-1, length, -1, -1)
    else:
        pixels = decode(sample.path, view, sample.bucket)
    given = {role: _given(decode, sample, view, role) for role in roles if sample.companion(role) is not None}
    return Clip(pixels, given)


def first_frame(decode: Decode, sample: Sample, view: View) -> Tensor:
    """(3, 1, H, W): the frame that the view starts from."""
    return decode(sample.path, replace(view, fps=None), replace(sample.bucket, frames=1))


def _given(decode: Decode, sample: Sample, view: View, role: str) -> Tensor:
    file = sample.companion(role)
    assert file is not None
    try:
        return first_frame(decode, replace(sample, path=file.path), View(view.framing))
    except DataError as error:
        named = role.replace("_", " ")
        raise DataError(f"its {named} {file.path.name}: {error.what}", where=file.path) from error
