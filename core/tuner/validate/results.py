"""What a ``validate`` hook answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


PREVIEWS = "previews"
"""Folder in ``validation/step-<n>/`` that has a folder for each clip, named like it: what it looked like on the way."""


@dataclass(frozen=True)
class SamplingStep:
    """Where the rendering of one clip is."""

    name: str
    """Of the clip's files, without suffix: ``cat``, or ``cat@ema`` of other weights than the trained ones."""
    prompt: str
    step: int
    """Steps done, from 1."""
    steps: int
    fps: float
    """Frames per second of the clip."""
    latents: Tensor
    """(1, C, F', h, w) float32 on the device: the clean latents that the step was taken towards."""


@dataclass(frozen=True)
class Preview:
    """A picture of a clip while it is rendered."""

    name: str
    prompt: str
    step: int
    """Sampling steps done."""
    steps: int
    path: Path
    """A small file that people look at, inside the run's output folder: moving where the clip does."""
    sheet: Path | None = None
    """A picture of all previews of this clip, once the last one was made."""


@dataclass(frozen=True)
class Validation:
    """Numbers and files a validation made."""

    metrics: Mapping[str, float] = field(default_factory=dict)
    """Reported as ``plugin/key``."""
    media: Sequence[Path] = ()
    """Videos and pictures, inside the run's output folder."""
    of_weights: bool = True
    """Whether it depends on the weights in place; otherwise its metrics have no ``@name`` of other weights."""
