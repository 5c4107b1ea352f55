"""What is not as the user wrote it, or not as the model was trained: one line each, for the report."""

from __future__ import annotations

from collections.abc import Sequence

from tuner.builtin.datasets.entries import Clips, Trained
from tuner.data.samples import Sample
from tuner.spec import ModelSpec


def dataset_notes(dataset: Trained, samples: Sequence[Sample], spec: ModelSpec) -> list[str]:
    """The notes of one dataset."""
    return [*_frame_notes(dataset, samples, spec), *_size_notes(dataset, samples)]


def _frame_notes(dataset: Trained, samples: Sequence[Sample], spec: ModelSpec) -> list[str]:
    if not isinstance(dataset, Clips):
        return []
    notes = []
    wanted, allowed = dataset.video.num_frames, spec.latents.frames_allowed(dataset.video.num_frames)
    if allowed != wanted:
        notes.append(f"num_frames {wanted} becomes {allowed}: the model takes {spec.latents.stride_time}k+1 frames")
    other = sum(abs(sample.fps - spec.fps) > 0.5 for sample in samples)
    if other:
        notes.append(
            f"{other} of {len(samples)} clips do not have the model's {spec.fps:g} frames per second; their frames "
            "are taken as they are, so motion is learnt slower or faster than it was filmed"
        )
    return notes


def _size_notes(dataset: Trained, samples: Sequence[Sample]) -> list[str]:
    notes = []
    enlarged = sum(sample.views[0].framing.width > sample.width for sample in samples)
    if enlarged:
        notes.append(f"{enlarged} of {len(samples)} clips are smaller than their bucket and are enlarged")
    if not dataset.crop and (dataset.maximum_image_size or dataset.target_downsample_size):
        notes.append("maximum_image_size and target_downsample_size do nothing without `crop: true`")
    elif bool(dataset.maximum_image_size) != bool(dataset.target_downsample_size):
        notes.append("maximum_image_size and target_downsample_size do nothing without each other")
    return notes
