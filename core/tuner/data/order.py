"""What the core asks of an order of training: which samples each optimizer step trains on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from tuner.data.samples import Bucket, Sample


@dataclass(frozen=True)
class MicroBatch:
    """Samples of one bucket that go through the network together."""

    samples: tuple[Sample, ...]
    captions: tuple[str, ...]
    """the caption of each sample in this epoch"""
    positions: tuple[int, ...]
    """position of each sample in the global batch of its optimizer step"""
    views: tuple[int, ...]
    """which of its views each sample is shown in"""

    @property
    def bucket(self) -> Bucket:
        """The shape that all its samples share."""
        return self.samples[0].bucket


class Order(Protocol):
    """The order of training, for any number of processes: what the hook ``plan_epochs`` answers.

    A pure function of (seed, step): the same in every process and in every run over the same samples. Asked by
    several threads. Steps and epochs count from 0.
    """

    per_step: int
    """micro-batches of an optimizer step, over all processes"""

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of the first epoch."""

    @property
    def samples_per_step(self) -> tuple[int, int]:
        """The fewest and the most samples of an optimizer step."""

    @property
    def notes(self) -> list[str]:
        """What people should know of the batches, one line each."""

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """The micro-batches of optimizer step ``step``, the costliest first; process r takes r::world."""

    def epoch_of(self, step: int) -> int:
        """The epoch that optimizer step ``step`` belongs to."""

    def steps_until(self, epoch: int, most: int | None = None) -> int:
        """Optimizer steps before ``epoch`` begins, counted to ``most`` at the utmost."""

    def epochs_in(self, total: int) -> float:
        """How many epochs ``total`` optimizer steps are."""

    def check_until(self, total: int) -> None:
        """Raise DataError where nothing is trained on before ``total`` optimizer steps are done."""

    def never_shown(self, total: int) -> list[str]:
        """What of the data ``total`` optimizer steps do not come to, one line each."""
