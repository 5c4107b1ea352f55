"""Whether a file may be trained on at all. Pure arithmetic on what the probe found."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tuner.builtin.datasets.entries import Clips, Trained
from tuner.builtin.datasets.probe import Probed
from tuner.data import buckets
from tuner.data.probe_file import VideoFacts
from tuner.data.report import Dropped
from tuner.spec import ModelSpec

REMEDIES = {
    "cannot be decoded": "convert the files to mp4 (H.264), or take them out",
    "too short": "lower video.num_frames and video.min_frames, or use longer clips",
    "too long": "raise video.max_frames",
    "too small": "lower minimum_image_size, or use larger clips",
}
"""What to do about each reason."""


@dataclass(frozen=True)
class Kept:
    """A file that is used."""

    path: Path
    name: str
    """its path inside the dataset's folder, with forward slashes"""
    facts: VideoFacts


def judge(dataset: Trained, root: Path, probed: Iterable[Probed], spec: ModelSpec) -> tuple[list[Kept], list[Dropped]]:
    """Split the files under ``root`` into those to use and those to leave out."""
    kept: list[Kept] = []
    dropped: list[Dropped] = []
    for each in probed:
        path = root / each.name
        if each.facts is None:
            dropped.append(Dropped(dataset.id, path, "cannot be decoded", each.reason))
        elif fault := _fault(dataset, each.facts, spec):
            dropped.append(Dropped(dataset.id, path, *fault))
        else:
            kept.append(Kept(path, Path(each.name).as_posix(), each.facts))
    return kept, dropped


def shortest_allowed(dataset: Clips, spec: ModelSpec) -> int:
    """Frames that a clip of this dataset must have: ``min_frames``, else all frames of a training clip."""
    if dataset.video.min_frames is not None:
        return dataset.video.min_frames
    return spec.latents.frames_allowed(dataset.video.num_frames)


def _fault(dataset: Trained, facts: VideoFacts, spec: ModelSpec) -> tuple[str, str] | None:
    """Why a file is not used: the reason and this file's numbers; None when it is."""
    size = buckets.measure(facts.width, facts.height, dataset.resolution_type)
    if isinstance(dataset, Clips):
        shortest, longest = shortest_allowed(dataset, spec), dataset.video.max_frames
        if facts.frames < shortest:
            return "too short", f"{facts.frames} frames, {shortest} needed"
        if longest is not None and facts.frames > longest:
            return "too long", f"{facts.frames} frames, at most {longest} wanted"
    if size < dataset.minimum_image_size:
        needed = f"{size:.4g} by {dataset.resolution_type}, {dataset.minimum_image_size:g} needed"
        return "too small", f"{facts.width}x{facts.height} is {needed}"
    return None
