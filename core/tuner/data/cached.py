"""What the core asks of the encodings: what the hook ``fill_cache`` answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from tuner.data.samples import Dataset, Prepared, Sample

EMPTY_CAPTION = ""
"""Always encoded: what a sample is trained with when its caption is dropped."""
MASK, SEGMENTATION = "mask", "segmentation"
"""Roles of the files that mask a sample."""


@dataclass(frozen=True)
class Mask:
    """The mask of one view of a sample."""

    weights: Tensor
    """(1, F', h, w) float32 in [0, 1], above 0 somewhere"""
    forced: Tensor
    """(S,) bool: tokens that no route may drop"""


class CachedData(Protocol):
    """The samples that are encoded, and their encodings. Asked by several threads."""

    @property
    def prepared(self) -> Prepared:
        """What was prepared, without the samples that could not be encoded; its report names them."""

    @property
    def samples(self) -> tuple[Sample, ...]:
        """The samples that are trained on."""

    @property
    def datasets(self) -> Mapping[str, Dataset]:
        """What holds for the samples of each dataset alike."""

    def text(self, caption: str) -> dict[str, Tensor]:
        """The encoding of a caption: tensors whose first axis is its true length.

        Raises KeyError for a caption that was not asked for, DataError for a damaged entry.
        """

    def video(self, sample: Sample, view: int = 0) -> dict[str, Tensor]:
        """The encoding of a clip's view: ``latents`` (C, F', h, w) and whatever else the family stores."""

    def mask(self, sample: Sample, view: int = 0) -> Mask | None:
        """The mask of a clip's view, where it has one."""
