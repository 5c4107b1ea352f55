"""What is taken of each file: its bucket, and the frames and the part of the picture that fill it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tuner import rng
from tuner.builtin.datasets import frames, sizes
from tuner.builtin.datasets.entries import Clips, Trained
from tuner.builtin.datasets.frames import Track
from tuner.builtin.datasets.probe_file import VideoFacts
from tuner.data.samples import Bucket, Framing, View
from tuner.spec import ModelSpec


@dataclass(frozen=True)
class Window:
    """One sample of a file."""

    bucket: Bucket
    views: tuple[View, ...]


def windows(dataset: Trained, name: str, facts: VideoFacts, spec: ModelSpec, seed: int) -> list[Window]:
    """The samples that a file gives; at least one, and several only with ``video.cut: uniform``.

    Arguments
        name: the file's path inside its folder: what is random depends on it and on ``seed`` alone.
    """
    track = frames.track(dataset, facts)
    width, height = sizes.bucket_sides(dataset, name, facts, spec, seed)
    bucket = Bucket(frames.length(dataset, track, spec), height, width)
    # One frame has no rate.
    fps = track.fps if bucket.frames > 1 else None
    made = []
    for index, starts in enumerate(_starts(dataset, name, track, bucket.frames, seed)):
        framings = _framings(dataset, f"{name}#{index}", facts, bucket, seed)
        made.append(Window(bucket, _views(starts, framings, fps, dataset.variants)))
    return made


def _starts(dataset: Trained, name: str, track: Track, length: int, seed: int) -> list[tuple[int, ...]]:
    """For each window the frames of the source that its views start from."""
    last = track.last_start(length)
    match dataset.video.cut if isinstance(dataset, Clips) else "beginning":
        case "middle":
            return [(last // 2,)]
        case "random":
            return [drawn(dataset.variants, last + 1, seed, f"cut/{name}")]
        case "uniform" if isinstance(dataset, Clips):
            return [(start,) for start in frames.spread(track, length, dataset.video.windows)]
        case _:
            return [(0,)]


def _framings(dataset: Trained, purpose: str, facts: VideoFacts, bucket: Bucket, seed: int) -> list[Framing]:
    """The parts of the picture that views show."""
    centred = sizes.covering(dataset, facts, bucket)
    if not dataset.crop or dataset.crop_style in ("center", "centre"):
        return [centred]
    if dataset.crop_style == "corner":
        return [replace(centred, left=0, top=0)]
    across, down = centred.width - bucket.width + 1, centred.height - bucket.height + 1
    places = drawn(dataset.variants, across * down, seed, f"crop/{purpose}")
    return [replace(centred, left=place % across, top=place // across) for place in places]


def _views(starts: Sequence[int], framings: Sequence[Framing], fps: float | None, variants: int) -> tuple[View, ...]:
    """Views in which both starts and framings take turns, no two alike; as many as there are up to ``variants``.

    After their least common multiple the turns would meet again: from then on one of the two is shifted.
    """
    around = math.lcm(len(starts), len(framings))
    count = min(variants, len(starts) * len(framings))
    return tuple(
        View(framings[(index + index // around) % len(framings)], starts[index % len(starts)], fps)
        for index in range(count)
    )


def drawn(count: int, among: int, seed: int, purpose: str) -> tuple[int, ...]:
    """``count`` different numbers below ``among`` in random order, or all of them where there are fewer.

    A larger ``count`` adds numbers and changes none. (Fisher and Yates, kept sparse.)
    """
    moved: dict[int, int] = {}
    numbers = []
    for index in range(min(count, among)):
        other = index + rng.derive_seed(seed, purpose, index) % (among - index)
        numbers.append(moved.get(other, other))
        moved[other] = moved.get(index, index)
    return tuple(numbers)
