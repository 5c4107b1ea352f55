"""What is not as the user wrote it, or not as the model was trained: one line each, for the report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from tuner.builtin.datasets import frames
from tuner.builtin.datasets.entries import Clips, Trained
from tuner.builtin.datasets.judge import Kept
from tuner.data.samples import Sample
from tuner.spec import ModelSpec

OTHER_RATE = 0.5
"""Frames per second by which a rate may differ before it is said."""
ENLARGED = 1.01
"""A clip is enlarged when its sides grow by more than this factor: less is rounding to the model's multiple."""


def dataset_notes(dataset: Trained, kept: Sequence[Kept], samples: Sequence[Sample], spec: ModelSpec) -> list[str]:
    """The notes of one dataset.

    Arguments
        kept: the files in use.
        samples: what they give: at least one each.
    """
    notes = [*_size_notes(dataset, samples), *_variant_notes(dataset, samples)]
    if isinstance(dataset, Clips):
        clips = [each for each in kept if not each.facts.still]
        notes = [*_length_notes(dataset, spec), *_rate_notes(dataset, clips, spec), *_cut_notes(dataset, clips), *notes]
    return notes


def _length_notes(dataset: Clips, spec: ModelSpec) -> Iterator[str]:
    name, wanted = "num_frames", [dataset.video.num_frames]
    if dataset.video.frame_buckets:
        name, wanted = "frame_buckets", sorted(set(dataset.video.frame_buckets))
    allowed = frames.lengths(dataset.video, spec)
    if list(allowed) != wanted:
        become = f"{_listed(wanted)} becomes {_listed(allowed)}"
        yield f"{name} {become}: the model takes {spec.latents.stride_time}k+1 frames"


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _rate_notes(dataset: Clips, clips: Sequence[Kept], spec: ModelSpec) -> Iterator[str]:
    """Motion that is not as fast as it was filmed, or not as smooth."""
    rate, model = dataset.video.fps, f"the model's {spec.fps:g} frames per second"
    if rate is None:
        other = sum(abs(each.facts.fps - spec.fps) > OTHER_RATE for each in clips)
        if other:
            yield (
                f"{other} of {len(clips)} clips do not have {model}; their frames are taken as they are, so motion is "
                f"learnt slower or faster than it was filmed (`video.fps: {spec.fps:g}` takes them at the model's rate)"
            )
        uneven = sum(each.facts.variable for each in clips)
        if uneven:
            yield (
                f"{uneven} of {len(clips)} clips have a variable frame rate; their frames are taken as they are, so "
                f"motion is uneven (`video.fps: {spec.fps:g}` evens it)"
            )
        return
    if abs(rate - spec.fps) > OTHER_RATE:
        yield f"video.fps {rate:g} is not {model}: motion is learnt slower or faster than it was filmed"
    slower = sum(each.facts.fps < rate - OTHER_RATE for each in clips)
    if slower:
        yield (
            f"{slower} of {len(clips)} clips have fewer than the {rate:g} frames per second (video.fps): "
            "some frames are shown twice"
        )


def _cut_notes(dataset: Clips, clips: Sequence[Kept]) -> Iterator[str]:
    """Clips that are not cut where ``video.cut`` says."""
    if dataset.video.cut == "beginning":
        return
    early = sum(not frames.track(dataset, each.facts).even for each in clips)
    if early:
        yield (
            f"{early} of {len(clips)} clips have a variable frame rate and are cut at their beginning instead of by "
            f"`video.cut: {dataset.video.cut}`: with video.fps, where their other frames are is not known before "
            "decoding"
        )


def _variant_notes(dataset: Trained, samples: Sequence[Sample]) -> Iterator[str]:
    """Fewer variants or windows than asked for."""
    crops = dataset.crop and dataset.crop_style == "random"
    cuts = isinstance(dataset, Clips) and dataset.video.cut == "random"
    if not crops and not cuts:
        if dataset.variants != type(dataset).model_fields["variants"].default:
            yield "variants does nothing without `crop_style: random` (with `crop: true`) or `video.cut: random`"
    elif fewer := sum(len(sample.views) < dataset.variants for sample in samples):
        yield f"{fewer} of {len(samples)} samples have fewer than {dataset.variants} places to cut, and fewer variants"
    wanted = dataset.video.windows if isinstance(dataset, Clips) and dataset.video.cut == "uniform" else None
    if wanted is not None:
        given = _windows(samples)
        if short := sum(count < wanted for count in given):
            yield f"{short} of {len(given)} clips have fewer than {wanted} places for windows, and give fewer samples"


def _windows(samples: Sequence[Sample]) -> list[int]:
    """Windows of each clip."""
    return list(Counter(sample.path for sample in samples).values())


def _size_notes(dataset: Trained, samples: Sequence[Sample]) -> Iterator[str]:
    factors = {sample.path: sample.views[0].framing.width / sample.width for sample in samples}
    enlarged = [factor for factor in factors.values() if factor > ENLARGED]
    if enlarged:
        what = "clips" if isinstance(dataset, Clips) else "pictures"
        yield (
            f"{len(enlarged)} of {len(factors)} {what} are smaller than their bucket and are enlarged, by up to "
            f"{max(enlarged):.3g} times (a higher `minimum_image_size` leaves them out)"
        )
    if not dataset.crop and (dataset.maximum_image_size or dataset.target_downsample_size):
        yield "maximum_image_size and target_downsample_size do nothing without `crop: true`"
    elif bool(dataset.maximum_image_size) != bool(dataset.target_downsample_size):
        yield "maximum_image_size and target_downsample_size do nothing without each other"
