"""Which frames a clip has to give, at what rate, and where a training clip may start. Arithmetic on what was probed."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tuner.builtin.buckets import bucket_frames
from tuner.builtin.datasets.entries import Clips, EvalDataset, Trained, VideoFrames
from tuner.builtin.datasets.probe_file import VideoFacts
from tuner.spec import ModelSpec

MARGIN = 0.05
"""Share of a frame that stays free at the end of a resampled clip: the file's clock rounds times to ticks."""
SAME_RATE = 1e-4
"""Rates closer than this share are the same: over a thousand frames they differ by a tenth of one."""


@dataclass(frozen=True)
class Track:
    """The frames of a source at the rate they are taken."""

    frames: int
    """how many there are"""
    stride: float = 1.0
    """frames of the source from one to the next"""
    fps: float | None = None
    """the rate, where it is not the source's own"""
    even: bool = True
    """whether the time of each frame of the source is known without looking: a resampled clip of variable rate can
    only be taken from its beginning"""

    def last_start(self, length: int) -> int:
        """The last frame of the source that ``length`` frames can be taken from."""
        return max(0, math.floor((self.frames - length) * self.stride + 1e-9)) if self.even else 0

    def __str__(self) -> str:
        rate = "" if self.fps is None else f" at {self.fps:g} fps"
        return f"{self.frames} frame{'s' * (self.frames != 1)}{rate}"


def track(dataset: Trained, facts: VideoFacts) -> Track:
    """The frames that ``dataset`` can take of a source: one of a picture or in a dataset of pictures."""
    if not isinstance(dataset, Clips) or facts.still:
        return Track(1)
    interval = dataset.video.frame_interval or 1
    stride, fps = _rate(dataset.video, facts)
    count = facts.frames if fps is None else _resampled(facts, stride)
    return Track(count // interval * interval, stride, fps, even=fps is None or not facts.variable)


def _rate(video: VideoFrames, facts: VideoFacts) -> tuple[float, float | None]:
    """Frames of the source from one that is taken to the next, and the rate where it is not the source's own."""
    if video.fps is None:
        return 1.0, None
    stride = facts.frames / facts.duration / video.fps
    same = not facts.variable and abs(stride - 1) < SAME_RATE
    return (1.0, None) if same else (stride, video.fps)


def _resampled(facts: VideoFacts, stride: float) -> int:
    """How many moments, ``stride`` frames of the source apart, surely lie before its end.

    Of a variable rate only the mean time of a frame is known, so the last frame counts as its beginning.
    """
    end = facts.frames - MARGIN * max(1.0, stride) - facts.variable
    return max(1, math.floor(end / stride) + 1)


def lengths(video: VideoFrames, spec: ModelSpec) -> tuple[int, ...]:
    """The lengths that ``frame_buckets`` or ``num_frames`` ask for as the model takes them, in frames, ascending."""
    return tuple(sorted({spec.latents.frames_allowed(each) for each in video.frame_buckets or (video.num_frames,)}))


def shortest(video: VideoFrames, spec: ModelSpec) -> int:
    """Frames that a clip must have: ``min_frames``, or the shortest length; with ``frame_buckets`` both."""
    least = lengths(video, spec)[0]
    if video.min_frames is None:
        return least
    return max(least, video.min_frames) if video.frame_buckets else video.min_frames


def fault(dataset: Clips, facts: VideoFacts, spec: ModelSpec) -> tuple[str, str] | None:
    """Why a clip's length does not do, as the kind of reason and its numbers; None when it does.

    Pictures among held-out clips are used as they are.
    """
    if facts.still and isinstance(dataset, EvalDataset):
        return None
    found = track(dataset, facts)
    least, most = shortest(dataset.video, spec), dataset.video.max_frames
    own = str(found) if found.frames == facts.frames else f"{found} of {facts.frames}"
    if found.frames < least:
        return "too short", f"{own}, {least} needed"
    if most is not None and found.frames > most:
        return "too long", f"{own}, at most {most} wanted"
    return None


def length(dataset: Trained, found: Track, spec: ModelSpec) -> int:
    """Pixel frames of a source's bucket: of ``frame_buckets`` the longest that it fills, else up to ``num_frames``."""
    if not isinstance(dataset, Clips) or found.frames == 1:
        return 1
    if dataset.video.frame_buckets:
        return max((each for each in lengths(dataset.video, spec) if each <= found.frames), default=1)
    return bucket_frames(found.frames, dataset.video.num_frames, spec.latents)


def spread(found: Track, taken: int, windows: int | None) -> tuple[int, ...]:
    """First frames, in the source, of windows of ``taken`` frames that cover a clip from its beginning to its end.

    Arguments
        windows: how many; when None as many as fit side by side. Fewer where the clip has fewer places.
    """
    count = max(1, found.frames // taken) if windows is None else windows
    last = found.last_start(taken)
    return tuple(sorted({index * last // (count - 1) for index in range(count)})) if count > 1 else (0,)
