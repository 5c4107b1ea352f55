"""Whether a dataset's keys can serve the model, and whether a file may be trained on. Nothing is read for it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tuner.builtin.datasets import frames, sizes
from tuner.builtin.datasets.entries import Clips, Trained
from tuner.builtin.datasets.probe import Probed
from tuner.builtin.datasets.probe_file import VideoFacts
from tuner.builtin.garbage import uncollected
from tuner.config import faults
from tuner.data.report import Dropped
from tuner.errors import ConfigError
from tuner.spec import ModelSpec

UNDECODABLE = "cannot be decoded"
"""The reason of files that are broken, or of another kind."""
REMEDIES = {
    UNDECODABLE: "convert the files to mp4 (H.264), or take them out",
    "too short": "lower video.num_frames and video.min_frames, or use longer clips",
    "too long": "raise video.max_frames",
    "too small": "lower minimum_image_size, or use larger clips",
    "too narrow": "lower minimum_aspect_ratio",
    "too wide": "raise maximum_aspect_ratio",
}
"""What to do about each reason."""
MEGAPIXELS = 64
"""Above it a size under ``area`` was meant in pixels: a frame of 8K has 33."""


@dataclass(frozen=True)
class Kept:
    """A file that is used."""

    path: Path
    name: str
    """its path inside the dataset's folder, with forward slashes"""
    facts: VideoFacts


def check_dataset(dataset: Trained, spec: ModelSpec) -> None:
    """Refuse keys that cannot serve this model, before any file is looked at.

    Raises ConfigError (or ConfigErrors with all that was found) for an alignment that is no multiple of the model's,
    sizes in the wrong unit, and lengths that no clip can have.
    """
    where = f"dataset {dataset.id!r}"
    errors = [
        ConfigError(what, where=where, remedy=remedy)
        for what, remedy in (*_size_faults(dataset, spec), *_length_faults(dataset, spec))
    ]
    if error := faults.join(errors):
        raise error


def _size_faults(dataset: Trained, spec: ModelSpec) -> Iterator[tuple[str, str]]:
    """What is wrong with the sizes, and what to do about it."""
    alignment, needed, unit = dataset.aspect_bucket_alignment, spec.size_multiple, dataset.resolution_type
    if alignment is not None and alignment % needed:
        yield (
            f"aspect_bucket_alignment {alignment} is no multiple of the {needed} pixels that {spec.flavour} needs",
            f"leave it out, or write {max(1, round(alignment / needed)) * needed}",
        )
    keys = ["resolution", "minimum_image_size"]
    keys += ["maximum_image_size", "target_downsample_size"] if dataset.crop else []
    for name in keys:
        size = getattr(dataset, name)
        least = sizes.multiple_of(dataset, spec) if name == "resolution" else 1
        if size and unit == "area" and size > MEGAPIXELS:
            yield (
                f"{name} {size:g} under `resolution_type: area` is {size:g} megapixels",
                f"write {size * size / 1e6:.2g} for the area of {size:g}x{size:g}, or `resolution_type: pixel_area`",
            )
        elif size and unit != "area" and size < least:
            yield (
                f"{name} {size:g} under `resolution_type: {unit}` is an edge of {size:g} pixels, and {least} is the "
                "least",
                "write an edge in pixels, such as 480, or `resolution_type: area`",
            )


def _length_faults(dataset: Trained, spec: ModelSpec) -> Iterator[tuple[str, str]]:
    """What is wrong with the lengths, and what to do about it."""
    if not isinstance(dataset, Clips):
        return
    least, most = frames.shortest(dataset.video, spec), dataset.video.max_frames
    if most is not None and least > most:
        yield (
            f"no clip can have the {least} frames needed and the {most} of video.max_frames",
            "raise video.max_frames, or lower video.num_frames (with `frame_buckets`: the shortest of them)",
        )


def judge(dataset: Trained, root: Path, probed: Iterable[Probed], spec: ModelSpec) -> tuple[list[Kept], list[Dropped]]:
    """Split the files under ``root`` into those to use and those to leave out."""
    kept: list[Kept] = []
    dropped: list[Dropped] = []
    with uncollected():
        for each in probed:
            path = root / each.name
            if each.facts is None:
                dropped.append(Dropped(dataset.id, path, UNDECODABLE, each.reason))
            elif fault := _fault(dataset, each.facts, spec):
                dropped.append(Dropped(dataset.id, path, *fault))
            else:
                kept.append(Kept(path, each.name.replace(os.sep, "/"), each.facts))
    return kept, dropped


def _fault(dataset: Trained, facts: VideoFacts, spec: ModelSpec) -> tuple[str, str] | None:
    """Why a file is not used: the reason and this file's numbers; None when it is."""
    too_long_or_short = frames.fault(dataset, facts, spec) if isinstance(dataset, Clips) else None
    return too_long_or_short or sizes.fault(dataset, facts)
