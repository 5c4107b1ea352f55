"""The words of the data path: a bucket, a view, a sample. Light on purpose: neither torch nor PyAV."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from tuner.data.report import DataReport
    from tuner.spec import ModelSpec


@dataclass(frozen=True, order=True)
class Bucket:
    """The shape that all clips of a batch share: pixel frames, height and width in pixels."""

    frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}, {self.frames} frame{'s' * (self.frames > 1)}"

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
class View:
    """What is taken of a source: which of its frames, and which part of each."""

    framing: Framing
    start: int = 0
    """the first frame taken, counted in the source from 0"""
    fps: float | None = None
    """take the frames shown at this rate (by timestamp, from the first one on); None takes every frame as it is"""
    still: bool = False
    """take the first frame alone, and show it throughout"""

    def __str__(self) -> str:
        rate = "" if self.fps is None else f" at {self.fps:g} fps"
        return f"{self.framing} from frame {self.start}{rate}{', still' * self.still}"


@dataclass(frozen=True)
class Companion:
    """A file that belongs to a sample: its mask, a first or a last frame."""

    role: str
    """``mask``, ``first_frame``, ``last_frame``"""
    path: Path
    content_hash: str
    """SHA-256 of the file"""


@dataclass(frozen=True)
class Sample:
    """One clip or picture (a clip of one frame), with all that decides what the network sees of it."""

    sample_id: str
    """``<dataset id>/<path inside the dataset's folder>``, with ``#<n>`` for the n-th window of a clip that gives
    several: the same on every machine and in every run"""
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
    """frames per second of the source; 0 for a picture"""
    bucket: Bucket
    views: tuple[View, ...]
    """at least one; epochs take turns, and all of them are encoded up front"""
    cache: Path
    """root of the store that holds its encodings"""
    companions: tuple[Companion, ...] = ()
    image_cache: Path | None = None
    """root of the store that holds the embeddings of its frames; None where the model takes none"""

    def companion(self, role: str) -> Companion | None:
        """The file of that role, if there is one."""
        return next((each for each in self.companions if each.role == role), None)


class Decode(Protocol):
    """From a file to pixels. Called from several threads."""

    def __call__(self, path: Path, view: View, bucket: Bucket) -> Tensor:
        """(3, F, H, W) float32 in [-1, 1], F, H and W as ``bucket`` says; a picture is repeated F times.

        Raises DataError naming the file when it cannot be decoded or ends too early.
        """


class Weigh(Protocol):
    """From a mask to how much each place counts. Called from the process's main thread."""

    def __call__(self, file: Companion, view: View, bucket: Bucket, spec: ModelSpec) -> tuple[Tensor, Tensor]:
        """Weights (1, F', h, w) float32 in [0, 1], above 0 somewhere, and (S,) bool: tokens that no route may drop.

        Raises DataError naming the file when there is no such mask in it.
        """


@dataclass(frozen=True)
class Schedule:
    """How often, and when, the samples of a dataset are shown."""

    repeats: int = 0
    """extra passes per epoch; 0 is once"""
    probability: float = 1.0
    """share of the passes that an epoch holds: 0.5 shows another half of them in every epoch"""
    start_epoch: int = 1
    """the first epoch, counted from 1"""
    end_epoch: int | None = None
    """the last epoch; None is never"""
    start_step: int = 0
    """optimizer steps done before it joins"""
    end_step: int | None = None
    """optimizer steps done when it leaves; None is never"""


@dataclass(frozen=True)
class Dataset:
    """What holds for all samples of a dataset alike."""

    dataset_id: str
    schedule: Schedule = Schedule()
    caption_dropout: float | None = None
    """probability of the empty caption; None is the run's own"""
    regularisation: bool = False
    """its samples hold the model to what the base predicts"""


@dataclass(frozen=True)
class Prepared:
    """The data of a run, ready to be encoded: what the hook ``prepare_data`` answers."""

    samples: tuple[Sample, ...]
    """trained on, in order of dataset and path"""
    datasets: Mapping[str, Dataset]
    """by id: those of ``samples`` and of ``held_out``"""
    text_cache: Path
    """root of the store of encoded captions"""
    report: DataReport
    decode: Decode
    """reads the files of the samples and of their companions"""
    weigh: Weigh | None = None
    """reads their masks; None where no sample has one"""
    held_out: tuple[Sample, ...] = ()
    """never trained on: for the loss on clips the model has not seen"""
    caches: tuple[Path, ...] = field(default=())
    """every folder that may hold encodings of these datasets, those of datasets without a sample too"""
    text_write_batch_size: int = 128
    """encoded captions that may wait to be written while the next ones are encoded"""
    extra: tuple[Sample, ...] = ()
    """encoded beside them, for plugins: such as what validation clips start from"""

    @property
    def encoded(self) -> tuple[Sample, ...]:
        """All that is encoded."""
        return (*self.samples, *self.held_out, *self.extra)
