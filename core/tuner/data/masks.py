"""Masks at the size of latents: how much each place counts in the loss, and which tokens no route may drop.

What a mask's pixels mean is the answer of whoever prepares the data (``Prepared.weigh``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from tuner.data.samples import Companion, Sample, View
from tuner.data.store import Store, make_key
from tuner.spec import ModelSpec

MASK, SEGMENTATION = "mask", "segmentation"
ENCODING = 1
"""Bumped by hand when what is stored for a mask changes."""


@dataclass(frozen=True)
class Mask:
    """The mask of one view of a sample."""

    weights: Tensor
    """(1, F', h, w) float32 in [0, 1], above 0 somewhere"""
    forced: Tensor
    """(S,) bool: tokens that no route may drop"""


def mask_of(sample: Sample) -> Companion | None:
    """The file that masks the sample, if there is one."""
    return sample.companion(MASK) or sample.companion(SEGMENTATION)


def mask_key(sample: Sample, view: View, mask: Companion, spec: ModelSpec) -> str:
    """The name of a mask's entry: its content and role, what is taken of it, and the geometry of the model."""
    latents, patch = spec.latents, spec.networks[0].patch
    geometry = (latents.stride_time, latents.stride_space, patch)
    return make_key("mask", ENCODING, mask.content_hash, mask.role, sample.bucket, view, geometry)


def mask_keys(samples: Sequence[Sample], spec: ModelSpec) -> dict[tuple[str, int], str]:
    """The entry of each masked view, by sample id and number of the view."""
    return {
        (sample.sample_id, index): mask_key(sample, view, mask, spec)
        for sample in samples
        if (mask := mask_of(sample)) is not None
        for index, view in enumerate(sample.views)
    }


def read_mask(store: Store, key: str) -> Mask:
    """A mask from the cache. Raises DataError when its entry is missing or damaged."""
    stored = store.read(key)
    return Mask(stored["weights"], stored["forced"])
