"""The order of training: a pure function of (seed, epoch, position). Resuming at a step is arithmetic.

In each epoch the turns of each bucket (see ``timeline``) are shuffled and cut into micro-batches; a last one that
is not full is filled by turns of the same bucket from the start of its order. The micro-batches of all buckets are
shuffled; each optimizer step takes world x accumulation of them, and the last step of an epoch is filled by
micro-batches from the start of the epoch. So every step is full, a tiny dataset trains too, and nothing is left out
but what ``small_buckets`` says. What is repeated is said in ``notes``.
"""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING, TypeVar

from tuner import rng
from tuner.builtin.epochs.timeline import Batching, Rotation, Span, Timeline, Turn
from tuner.data.order import MicroBatch
from tuner.data.samples import Bucket, Dataset, Prepared, Sample
from tuner.errors import ConfigError, DataError

if TYPE_CHECKING:
    from tuner.config.keys import CoreConfig

T = TypeVar("T")


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
        drop_small_buckets: bool = False,
        batch_tokens: int | None = None,
        tokens: Callable[[Bucket], int] = lambda bucket: bucket.cost,
    ) -> None:
        """Plan over ``samples``; their order does not matter.

        Arguments
            datasets: how often and when each dataset is shown; once, always, when absent.
            batch_size: samples per micro-batch.
            accumulation: micro-batches per optimizer step and process.
            world: processes.
            drop_small_buckets: leave out buckets that have fewer turns in an epoch than a batch has samples.
            batch_tokens: tokens per micro-batch, where that makes more samples than ``batch_size``.
            tokens: tokens of a clip of a bucket, for ``batch_tokens``.
        Raises DataError when there is nothing to train on at the first step.
        """
        if not samples:
            raise ValueError("a plan needs at least one sample")
        self.seed, self.batch_size, self.per_step = seed, batch_size, accumulation * world
        self.batch_tokens, self._tokens = batch_tokens, tokens
        self._batching = Batching(
            {bucket: self._size(bucket) for bucket in sorted({sample.bucket for sample in samples})},
            self.per_step,
            drop_small_buckets,
        )
        by_dataset: dict[str, list[Sample]] = defaultdict(list)
        for sample in sorted(samples, key=lambda each: each.sample_id):
            by_dataset[sample.dataset_id].append(sample)
        self._rotations = [
            Rotation(each, members, ((datasets or {}).get(each) or Dataset(each)).schedule, seed)
            for each, members in sorted(by_dataset.items())
        ]
        self._timeline = Timeline(self._rotations, self._batching)
        self.steps_per_epoch = self._timeline.start(1)
        """of the first epoch; others are shorter or longer where datasets join, leave or take turns"""
        # Two epochs: where one ends, the loader's thread is in the next one already.
        self._epoch = lru_cache(maxsize=2)(self._order)

    @property
    def notes(self) -> list[str]:
        """What is not quite as asked for, so that batches and steps are full, and when datasets join or leave."""
        notes = [*self._size_notes(), *self._share_notes()]
        for span in self._timeline.spans:
            since = f"from epoch {span.epoch + 1} (step {span.step}) on: " if span.step else ""
            if len(self._timeline.spans) > 1:
                names = ", ".join(span.dataset_ids)
                notes.append(f"{since or 'at first: '}{names}; {span.start(1)} steps per epoch")
            notes += [since + note for note in self._span_notes(span)]
        return notes

    def epoch_of(self, step: int) -> int:
        """The epoch that optimizer step ``step`` belongs to; both count from 0. DataError where no data are left."""
        span, index, _ = self._timeline.at(step)
        return span.epoch + index

    def steps_until(self, epoch: int, most: int | None = None) -> int:
        """Optimizer steps before ``epoch`` (from 0), or ``most`` where that is fewer.

        Raises DataError where no dataset is trained on before that.
        """
        end = self._timeline.end
        if most is not None and (end is None or most <= end.step) and (most == 0 or self.epoch_of(most - 1) < epoch):
            return most
        return self._timeline.start(epoch)

    def epochs_in(self, total: int) -> float:
        """Epochs in a run of ``total`` steps, the last one by its share. DataError where no data are left."""
        epoch = self.epoch_of(total - 1)
        first, following = self._timeline.start(epoch), self._timeline.start(epoch + 1)
        return epoch + (total - first) / (following - first)

    @property
    def samples_per_step(self) -> tuple[int, int]:
        """The fewest and the most samples that a step may take."""
        sizes = {self._batching.sizes[bucket] for span in self._timeline.spans for bucket in span.buckets}
        return self.per_step * min(sizes), self.per_step * max(sizes)

    def check_until(self, total: int) -> None:
        """Raise DataError where no dataset is trained on at some point of a run of ``total`` steps."""
        end = self._timeline.end
        if end is not None and end.step < total:
            raise end.error

    def never_shown(self, total: int) -> list[str]:
        """One line for each dataset that has no part in a run of ``total`` steps."""
        return [
            f"dataset {rotation.dataset_id!r} is not trained on: the run ends after {total} steps, before it joins"
            for rotation in self._rotations
            if not any(rotation.dataset_id in span.dataset_ids for span in self._timeline.spans if span.step < total)
        ]

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """The micro-batches of optimizer step ``step`` (from 0), the costliest first; process r takes r::world.

        Raises DataError where no data are left.
        """
        span, epoch, index = self._timeline.at(step)
        batches = self._epoch(span.epoch + epoch)[index * self.per_step : (index + 1) * self.per_step]
        batches = sorted(batches, key=lambda batch: -batch[0].sample.bucket.cost * len(batch))
        firsts = accumulate(map(len, batches), initial=0)
        return [self._micro_batch(turns, first) for turns, first in zip(batches, firsts, strict=False)]

    def _micro_batch(self, turns: Sequence[Turn], first: int) -> MicroBatch:
        return MicroBatch(
            samples=tuple(turn.sample for turn in turns),
            captions=tuple(map(self._caption, turns)),
            positions=tuple(range(first, first + len(turns))),
            views=tuple(turn.before % len(turn.sample.views) for turn in turns),
        )

    def _caption(self, turn: Turn) -> str:
        """The alternatives of a sample take turns over its appearances, from a start of its own."""
        captions = turn.sample.captions
        if len(captions) == 1:
            return captions[0]
        start = rng.derive_seed(self.seed, f"caption/{turn.sample.sample_id}")
        return captions[(start + turn.before) % len(captions)]

    def _order(self, epoch: int) -> list[list[Turn]]:
        """All micro-batches of an epoch, in order, filled to whole steps."""
        span, index = self._timeline.at_epoch(epoch)
        batches: list[list[Turn]] = []
        for bucket, turns in span.turns(index).items():
            size, order = self._batching.sizes[bucket], self._shuffled(turns, f"order/{bucket}", epoch)
            starts = range(0, len(order), size)
            batches += [[order[(start + i) % len(order)] for i in range(size)] for start in starts]
        batches = self._shuffled(batches, "batches", epoch)
        return [batches[slot % len(batches)] for slot in range(len(batches) + -len(batches) % self.per_step)]

    def _shuffled(self, items: Sequence[T], purpose: str, epoch: int) -> list[T]:
        order = list(items)
        random.Random(rng.derive_seed(self.seed, purpose, epoch)).shuffle(order)
        return order

    def _size(self, bucket: Bucket) -> int:
        """Samples in a batch of that bucket."""
        return max(self.batch_size, (self.batch_tokens or 0) // self._tokens(bucket))

    def _size_notes(self) -> Iterator[str]:
        """What ``batch_tokens`` comes to."""
        if self.batch_tokens is None:
            return
        sizes = self._batching.sizes
        for bucket, size in sizes.items():
            if size > self.batch_size:
                yield f"bucket {bucket}: {self._tokens(bucket)} tokens a clip: batches of {size} (batch_tokens)"
        if max(sizes.values()) == self.batch_size:
            yield (
                f"batch_tokens {self.batch_tokens} has no effect: a clip has {min(map(self._tokens, sizes))} tokens "
                f"or more, and train_batch_size is {self.batch_size}"
            )

    def _share_notes(self) -> Iterator[str]:
        """What ``probability`` comes to."""
        for rotation in self._rotations:
            if rotation.schedule.probability != 1:
                yield (
                    f"dataset {rotation.dataset_id!r}: probability {rotation.schedule.probability:g}: "
                    f"{rotation.turns} turns per epoch for {len(rotation.order)} samples, all in their turn"
                )

    def _span_notes(self, span: Span) -> Iterator[str]:
        """What is left out, and what is shown again to fill batches and steps."""
        when = "in every epoch" if span.period == 1 else "in the first such epoch, about as many in others"
        for bucket, count in span.dropped.items():
            yield (
                f"bucket {bucket}: {count} left out (small_buckets: drop): "
                f"too few turns for a batch of {self._batching.sizes[bucket]}"
            )
        for bucket, count in span.counts(0).items():
            padding = -count % self._batching.sizes[bucket]
            if padding:
                size = self._batching.sizes[bucket]
                yield f"bucket {bucket}: {count} in batches of {size}: {padding} {_again(padding)} {when}"
        batches = span.micro_batches(0)
        missing = -batches % self.per_step
        if missing:
            yield (
                f"an epoch has {batches} batches and a step takes {self.per_step}: {missing} {_again(missing)} {when}"
            )


def _again(count: int) -> str:
    return "is shown once more" if count == 1 else "are shown once more"


def check_keys(core: CoreConfig) -> None:
    """Refuse keys about batches that contradict each other. Raises ConfigError."""
    if core.small_buckets == "drop" and core.disable_bucket_pruning:
        raise ConfigError(
            "small_buckets: drop leaves small buckets out, and disable_bucket_pruning: true keeps them",
            remedy="remove one of the two",
        )


def check_sizes(prepared: Prepared, core: CoreConfig, processes: int = 1) -> None:
    """Refuse datasets that do not fill a step, or a batch of the VAE: one DataError for all of them.

    A dataset that is trained on needs as many samples, with its ``repeats``, as a step takes on ``processes``
    processes. Any dataset needs as many samples as ``vae_batch_size``.
    """
    trained = Counter(sample.dataset_id for sample in prepared.samples)
    held_out = Counter(sample.dataset_id for sample in prepared.held_out)
    step = core.train_batch_size * core.gradient_accumulation_steps * processes
    faults, remedies = [], []
    for dataset_id, count in trained.items():
        repeats = prepared.datasets[dataset_id].schedule.repeats
        if count * (1 + repeats) < step:
            enough = math.ceil(step / count) - 1
            faults.append(
                f"dataset {dataset_id!r}: {count} x {1 + repeats} = {count * (1 + repeats)}, a step takes {step}"
            )
            remedies.append(f"set repeats: {enough} in dataset {dataset_id!r}")
    if faults:
        sizes = (
            f"train_batch_size {core.train_batch_size} x gradient_accumulation_steps {core.gradient_accumulation_steps}"
        )
        faults.insert(0, f"a dataset does not fill one step of {sizes} x {processes} process{'es' * (processes > 1)}")
        remedies.append("or lower train_batch_size or gradient_accumulation_steps")
    small = {name: count for name, count in (trained + held_out).items() if count < core.vae_batch_size}
    faults += [
        f"dataset {name!r}: {count} samples, vae_batch_size is {core.vae_batch_size}" for name, count in small.items()
    ]
    if small:
        remedies.append(f"set vae_batch_size: {min(small.values())}")
    if faults:
        raise DataError("\n".join(faults), remedy="; ".join(remedies))
