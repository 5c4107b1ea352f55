"""The words of the data path: a bucket, a framing, a sample. Light on purpose: neither torch nor PyAV."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, order=True)
class Bucket:
    """The shape that all clips of a batch share: pixel frames, height and width in pixels."""

    frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}, {self.frames} frames"

    @property
    def cost(self) -> int:
        """Pixels of one clip: what a step on this bucket costs, for ordering."""
        return self.frames * self.height * self.width


@dataclass(frozen=True)
class Framing:
    """How a displayed frame becomes the bucket's picture: resize to (width, height), then cut at (left, top)."""

    width: int
    height: int
    left: int
    top: int

    def __str__(self) -> str:
        return f"resize {self.width}x{self.height} cut +{self.left}+{self.top}"


@dataclass(frozen=True)
class Sample:
    """One clip that is trained on, with all that decides what the network sees of it."""

    sample_id: str
    """``<dataset id>/<path inside the dataset's folder>``: the same on every machine and in every run"""
    dataset_id: str
    path: Path
    content_hash: str
    """SHA-256 of the file"""
    captions: tuple[str, ...]
    """alternatives; epochs take turns"""
    width: int
    """displayed width of the source in pixels: rotation and pixel aspect applied"""
    height: int
    frames: int
    """frames of the source"""
    fps: float
    bucket: Bucket
    framing: Framing
    repeats: int = 0
    """extra passes per epoch; 0 is once"""
