"""Which size a source is trained at, and which part of its picture that is. Arithmetic on what was probed."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tuner import rng
from tuner.builtin import buckets
from tuner.builtin.datasets.entries import Media
from tuner.builtin.datasets.probe_file import VideoFacts
from tuner.data.samples import Bucket, Framing
from tuner.spec import ModelSpec

WRITTEN = 0.005
"""Aspect limits are written with two decimals: 0.67 lets 2:3 in."""


def multiple_of(dataset: Media, spec: ModelSpec) -> int:
    """What the sides of the dataset's buckets are multiples of, in pixels."""
    return dataset.aspect_bucket_alignment or spec.size_multiple


def bucket_sides(dataset: Media, name: str, facts: VideoFacts, spec: ModelSpec, seed: int) -> tuple[int, int]:
    """Width and height in pixels of the bucket of a source.

    Arguments
        name: the file's path inside its folder: what is random depends on it and on ``seed`` alone.
    """
    width, height = _aspect(dataset, name, facts, seed)
    return buckets.bucket_size(
        width,
        height,
        resolution=dataset.resolution,
        unit=dataset.resolution_type,
        multiple=multiple_of(dataset, spec),
        rounding=dataset.aspect_bucket_rounding,
    )


def _aspect(dataset: Media, name: str, facts: VideoFacts, seed: int) -> tuple[float, float]:
    """Width and height of anything that has the aspect to cut to."""
    if not dataset.crop or dataset.crop_aspect == "preserve":
        return facts.width, facts.height
    if dataset.crop_aspect == "square":
        return 1, 1
    aspects = dataset.crop_aspect_buckets
    if dataset.crop_aspect == "random":
        return aspects[rng.derive_seed(seed, f"crop_aspect/{name}") % len(aspects)], 1
    return nearest_aspect(facts.width / facts.height, aspects), 1


def nearest_aspect(aspect: float, aspects: Sequence[float]) -> float:
    """The one of ``aspects`` (width / height) whose ratio to ``aspect`` is nearest to 1; of equals the first."""
    return min(aspects, key=lambda each: round(abs(math.log(each / aspect)), 9))


def covering(dataset: Media, facts: VideoFacts, bucket: Bucket) -> Framing:
    """Cover the bucket, cut from the centre.

    With ``crop``, what is above ``maximum_image_size`` is scaled to ``target_downsample_size`` before the cut.
    """
    largest, target, unit = dataset.maximum_image_size, dataset.target_downsample_size, dataset.resolution_type
    scale = 0.0
    if dataset.crop and largest and target and buckets.measure(facts.width, facts.height, unit) > largest:
        scale = buckets.scale_to(facts.width, facts.height, target, unit)
    return buckets.framing(facts.width, facts.height, bucket, at_least_scale=scale)


def fault(dataset: Media, facts: VideoFacts) -> tuple[str, str] | None:
    """Why a source's size does not do, as the kind of reason and its numbers; None when it does."""
    aspect, own = facts.width / facts.height, f"{facts.width}x{facts.height}"
    narrowest, widest = dataset.minimum_aspect_ratio, dataset.maximum_aspect_ratio
    if narrowest is not None and aspect < narrowest - WRITTEN:
        return "too narrow", f"{own} is {aspect:.3g} times as wide as high, at least {narrowest:g} wanted"
    if widest is not None and aspect > widest + WRITTEN:
        return "too wide", f"{own} is {aspect:.3g} times as wide as high, at most {widest:g} wanted"
    size, least = buckets.measure(facts.width, facts.height, dataset.resolution_type), dataset.minimum_image_size
    if size < least:
        return "too small", f"{own} is {size:.4g} by {dataset.resolution_type}, {least:g} needed"
    return None
