"""The order of training: a pure function of (seed, epoch, position). Resuming at a step is arithmetic.

An epoch holds every sample 1 + ``repeats`` times. Each bucket's samples are shuffled and cut into
micro-batches; a last one that is not full is filled by samples of the same bucket from the start of its
order. The micro-batches of all buckets are shuffled; each optimizer step takes world x accumulation of
them, and the last step of an epoch is filled by micro-batches from the start of the epoch. So every step
is full, a tiny dataset trains too, and nothing is dropped. What is repeated is said in ``notes``.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

from tuner import rng
from tuner.data.samples import Bucket, Dataset, Sample, Schedule

T = TypeVar("T")


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


@dataclass(frozen=True)
class _Turn:
    """One appearance of a sample in an epoch."""

    sample: Sample
    repeat: int


class Plan:
    """Which samples each optimizer step trains on, for any number of processes."""

    def __init__(
        self,
        samples: Sequence[Sample],
        datasets: Mapping[str, Dataset] | None = None,
        *,
        seed: int,
        batch_size: int,
        accumulation: int = 1,
        world: int = 1,
    ) -> None:
        """Plan over ``samples``; their order does not matter.

        Arguments
            datasets: how often and when each dataset is shown; once, always, when absent.
            batch_size: samples per micro-batch.
            accumulation: micro-batches per optimizer step and process.
            world: processes.
        """
        if not samples:
            raise ValueError("a plan needs at least one sample")
        self.datasets = datasets or {}
        self.seed, self.batch_size, self.per_step = seed, batch_size, accumulation * world
        by_bucket: dict[Bucket, list[Sample]] = defaultdict(list)
        for sample in sorted(samples, key=lambda each: each.sample_id):
            by_bucket[sample.bucket].append(sample)
        self._buckets = {
            bucket: [
                _Turn(sample, repeat) for sample in members for repeat in range(1 + self._schedule(sample).repeats)
            ]
            for bucket, members in sorted(by_bucket.items())
        }
        self.micro_batches_per_epoch = sum(math.ceil(len(turns) / batch_size) for turns in self._buckets.values())
        self.steps_per_epoch = math.ceil(self.micro_batches_per_epoch / self.per_step)
        # Two epochs: where one ends, the loader's thread is in the next one already.
        self._epoch = lru_cache(maxsize=2)(self._order)

    @property
    def notes(self) -> list[str]:
        """What is shown more often than asked for, so that batches and steps are full; one line each."""
        notes = []
        for bucket, turns in self._buckets.items():
            padding = -len(turns) % self.batch_size
            if padding:
                notes.append(
                    f"bucket {bucket}: {len(turns)} in batches of {self.batch_size}: "
                    f"{padding} {'is' if padding == 1 else 'are'} shown once more in every epoch"
                )
        missing = -self.micro_batches_per_epoch % self.per_step
        if missing:
            notes.append(
                f"an epoch has {self.micro_batches_per_epoch} batches and a step takes {self.per_step}: "
                f"{missing} {'is' if missing == 1 else 'are'} shown once more in every epoch"
            )
        return notes

    def epoch_of(self, step: int) -> int:
        """The epoch that optimizer step ``step`` belongs to; both count from 0."""
        return step // self.steps_per_epoch

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """The micro-batches of optimizer step ``step`` (from 0), the costliest first; process r takes r::world."""
        epoch, index = divmod(step, self.steps_per_epoch)
        batches = self._epoch(epoch)[index * self.per_step : (index + 1) * self.per_step]
        batches = sorted(batches, key=lambda batch: -batch[0].sample.bucket.cost)
        return [self._micro_batch(turns, slot, epoch) for slot, turns in enumerate(batches)]

    def _micro_batch(self, turns: Sequence[_Turn], slot: int, epoch: int) -> MicroBatch:
        first = slot * self.batch_size
        return MicroBatch(
            samples=tuple(turn.sample for turn in turns),
            captions=tuple(self._caption(turn, epoch) for turn in turns),
            positions=tuple(range(first, first + len(turns))),
            views=tuple(self._turn(turn, epoch) % len(turn.sample.views) for turn in turns),
        )

    def _schedule(self, sample: Sample) -> Schedule:
        dataset = self.datasets.get(sample.dataset_id)
        return Schedule() if dataset is None else dataset.schedule

    def _turn(self, turn: _Turn, epoch: int) -> int:
        """How often the sample was shown before this turn, over all epochs."""
        return epoch * (1 + self._schedule(turn.sample).repeats) + turn.repeat

    def _caption(self, turn: _Turn, epoch: int) -> str:
        """The alternatives of a sample take turns over its appearances, from a start of its own."""
        captions = turn.sample.captions
        if len(captions) == 1:
            return captions[0]
        start = rng.derive_seed(self.seed, f"caption/{turn.sample.sample_id}")
        return captions[(start + self._turn(turn, epoch)) % len(captions)]

    def _order(self, epoch: int) -> list[list[_Turn]]:
        """All micro-batches of an epoch, in order, filled to whole steps."""
        batches: list[list[_Turn]] = []
        for bucket, turns in self._buckets.items():
            order = self._shuffled(turns, f"order/{bucket}", epoch)
            starts = range(0, len(order), self.batch_size)
            batches += [[order[(start + i) % len(order)] for i in range(self.batch_size)] for start in starts]
        batches = self._shuffled(batches, "batches", epoch)
        return [batches[slot % len(batches)] for slot in range(self.steps_per_epoch * self.per_step)]

    def _shuffled(self, items: Sequence[T], purpose: str, epoch: int) -> list[T]:
        order = list(items)
        random.Random(rng.derive_seed(self.seed, purpose, epoch)).shuffle(order)
        return order
