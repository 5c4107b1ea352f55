"""What is taken of each file: its bucket, and the frames and the part of the picture that fill it."""

from __future__ import annotations

from dataclasses import dataclass

from tuner.builtin.datasets.entries import Clips, Trained
from tuner.data import buckets
from tuner.data.probe_file import VideoFacts
from tuner.data.samples import Bucket, Framing, View
from tuner.spec import ModelSpec


@dataclass(frozen=True)
class Window:
    """One sample of a file."""

    bucket: Bucket
    views: tuple[View, ...]


def windows(dataset: Trained, name: str, facts: VideoFacts, spec: ModelSpec, seed: int) -> list[Window]:
    """The samples that a file gives; at least one.

    Arguments
        name: the file's path inside its folder: what is random depends on it and on ``seed`` alone.
    """
    bucket = _bucket(dataset, facts, spec)
    return [Window(bucket, (View(_framing(dataset, facts, bucket)),))]


def _bucket(dataset: Trained, facts: VideoFacts, spec: ModelSpec) -> Bucket:
    square = dataset.crop and dataset.crop_aspect == "square"
    width, height = buckets.bucket_size(
        1 if square else facts.width,
        1 if square else facts.height,
        resolution=dataset.resolution,
        unit=dataset.resolution_type,
        multiple=dataset.aspect_bucket_alignment or spec.size_multiple,
        rounding=dataset.aspect_bucket_rounding,
    )
    frames = (
        buckets.bucket_frames(facts.frames, dataset.video.num_frames, spec.latents) if isinstance(dataset, Clips) else 1
    )
    return Bucket(frames, height, width)


def _framing(dataset: Trained, facts: VideoFacts, bucket: Bucket) -> Framing:
    """Cover the bucket; what is above ``maximum_image_size`` is scaled to ``target_downsample_size`` before the cut."""
    largest, target, unit = dataset.maximum_image_size, dataset.target_downsample_size, dataset.resolution_type
    scale = 0.0
    if dataset.crop and largest and target and buckets.measure(facts.width, facts.height, unit) > largest:
        scale = buckets.scale_to(facts.width, facts.height, target, unit)
    return buckets.framing(facts.width, facts.height, bucket, at_least_scale=scale)
