"""Where epochs begin and end, and whose turn it is in each: arithmetic, and no walk through a run's past.

A dataset's samples stand in a fixed order and take turns; an epoch holds the next so many of them. With a
``probability`` below 1 that is a part of the order, and the next epoch goes on where it stopped. Epochs with
the same datasets make a span; a span ends where a dataset joins or leaves, inside an epoch too.
"""

from __future__ import annotations

import math
import random
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from threading import Lock
from typing import NamedTuple

from tuner import rng
from tuner.data.samples import Bucket, Sample, Schedule
from tuner.errors import DataError


class Turn(NamedTuple):
    """One appearance of a sample in an epoch."""

    sample: Sample
    before: int
    """turns that the sample had before this one, in this epoch and in those before"""


@dataclass(frozen=True)
class Batching:
    """How the turns of an epoch become micro-batches and steps."""

    sizes: Mapping[Bucket, int]
    """samples per micro-batch"""
    per_step: int
    """micro-batches per optimizer step, over all processes"""
    drop: bool = False
    """leave a bucket out that has fewer turns in an epoch than its batches have samples"""


class Rotation:
    """The samples of a dataset in the order of their turns, and how many turns an epoch holds."""

    def __init__(self, dataset_id: str, samples: Sequence[Sample], schedule: Schedule, seed: int) -> None:
        """``samples`` in an order that is the same on every machine."""
        self.dataset_id, self.schedule = dataset_id, schedule
        self.order = _spread(samples, random.Random(rng.derive_seed(seed, f"rotation/{dataset_id}")))
        self.turns = max(1, round(schedule.probability * len(samples) * (1 + schedule.repeats)))
        self.period = len(samples) // math.gcd(self.turns, len(samples))
        """epochs after which they repeat"""
        self._places: dict[Bucket, list[int]] = defaultdict(list)
        for place, sample in enumerate(self.order):
            self._places[sample.bucket].append(place)

    @property
    def mean_turns(self) -> dict[Bucket, float]:
        """Turns of each bucket in an epoch, on average."""
        return {bucket: self.turns * len(places) / len(self.order) for bucket, places in self._places.items()}

    def samples_in(self, bucket: Bucket) -> int:
        """Number of its samples in that bucket."""
        return len(self._places.get(bucket, ()))

    def epoch(self, number: int) -> list[Turn]:
        """The turns of the dataset's own epoch ``number`` (from 0)."""
        first, length = number * self.turns, len(self.order)
        return [Turn(self.order[turn % length], turn // length) for turn in range(first, first + self.turns)]

    def counts(self, number: int) -> Counter[Bucket]:
        """The number of these turns in each bucket, without listing them."""
        first = number * self.turns
        return Counter(
            {bucket: self._before(first + self.turns, bucket) - self._before(first, bucket) for bucket in self._places}
        )

    def active(self, epoch: int, step: int) -> bool:
        """Whether an epoch (from 0) that begins at ``step`` holds the dataset."""
        own = self.schedule
        last_epoch = math.inf if own.end_epoch is None else own.end_epoch
        last_step = math.inf if own.end_step is None else own.end_step
        return own.start_epoch <= epoch + 1 <= last_epoch and own.start_step <= step < last_step

    def _before(self, turn: int, bucket: Bucket) -> int:
        """Turns in ``bucket`` before that turn."""
        rounds, place = divmod(turn, len(self.order))
        places = self._places[bucket]
        return rounds * len(places) + bisect_left(places, place)


def _spread(samples: Sequence[Sample], source: random.Random) -> list[Sample]:
    """A shuffle in which each bucket is spread evenly, so that any part of it has its share of every bucket."""
    by_bucket: dict[Bucket, list[Sample]] = defaultdict(list)
    for sample in samples:
        by_bucket[sample.bucket].append(sample)
    placed: list[tuple[float, Sample]] = []
    for _, members in sorted(by_bucket.items()):
        source.shuffle(members)
        phase = source.random()
        placed += [((index + phase) / len(members), sample) for index, sample in enumerate(members)]
    return [sample for _, sample in sorted(placed, key=lambda each: each[0])]


@dataclass(frozen=True)
class Span:
    """Epochs that follow one another with the same datasets."""

    epoch: int
    """the first, from 0"""
    step: int
    """its first optimizer step"""
    members: tuple[tuple[Rotation, int], ...]
    """each dataset, with the number of epochs it was in before"""
    batching: Batching
    _starts: list[int] = field(default_factory=lambda: [0], repr=False)
    _lock: Lock = field(default_factory=Lock, repr=False)

    @property
    def dataset_ids(self) -> tuple[str, ...]:
        """The datasets in it."""
        return tuple(rotation.dataset_id for rotation, _ in self.members)

    @cached_property
    def period(self) -> int:
        """Epochs after which their lengths repeat."""
        return math.lcm(*(rotation.period for rotation, _ in self.members))

    @cached_property
    def buckets(self) -> dict[Bucket, float]:
        """The buckets it trains on, in order, with their turns in an epoch, on average."""
        return {bucket: mean for bucket, mean in self._mean_turns().items() if not self._drops(bucket, mean)}

    @property
    def dropped(self) -> dict[Bucket, int]:
        """The number of samples in buckets that are left out for having too few turns for a batch."""
        return {
            bucket: sum(rotation.samples_in(bucket) for rotation, _ in self.members)
            for bucket, mean in self._mean_turns().items()
            if self._drops(bucket, mean)
        }

    def counts(self, index: int) -> dict[Bucket, int]:
        """Turns in each bucket of the span's epoch ``index`` (from 0)."""
        total: Counter[Bucket] = Counter()
        for rotation, before in self.members:
            total.update(rotation.counts(before + index))
        return {bucket: total[bucket] for bucket in self.buckets if total[bucket]}

    def turns(self, index: int) -> dict[Bucket, list[Turn]]:
        """The turns themselves, buckets in order."""
        by_bucket: dict[Bucket, list[Turn]] = defaultdict(list)
        for rotation, before in self.members:
            for turn in rotation.epoch(before + index):
                by_bucket[turn.sample.bucket].append(turn)
        return {bucket: by_bucket[bucket] for bucket in self.buckets if bucket in by_bucket}

    def micro_batches(self, index: int) -> int:
        """Micro-batches of the span's epoch ``index``, before its last step is filled."""
        return sum(math.ceil(count / self.batching.sizes[bucket]) for bucket, count in self.counts(index).items())

    def start(self, index: int) -> int:
        """Steps of the span before its epoch ``index``."""
        cycles, rest = divmod(index, self.period)
        with self._lock:
            self._extend(epochs=self.period if cycles else rest)
            return cycles * self._starts[-1] + self._starts[rest] if cycles else self._starts[rest]

    def locate(self, offset: int) -> tuple[int, int]:
        """The epoch of the span that holds its step ``offset``, and the step's number in that epoch."""
        with self._lock:
            self._extend(epochs=self.period, until=offset)
            cycles, rest = divmod(offset, self._starts[-1])  # more than a cycle only where a whole one is known
            index = bisect_right(self._starts, rest) - 1
            return cycles * self.period + index, rest - self._starts[index]

    def _mean_turns(self) -> dict[Bucket, float]:
        turns: dict[Bucket, float] = defaultdict(float)
        for rotation, _ in self.members:
            for bucket, mean in rotation.mean_turns.items():
                turns[bucket] += mean
        return dict(sorted(turns.items()))

    def _drops(self, bucket: Bucket, mean: float) -> bool:
        return self.batching.drop and math.ceil(mean) < self.batching.sizes[bucket]

    def _extend(self, epochs: int, until: float = math.inf) -> None:
        """Know where the first ``epochs`` epochs start, as far as step ``until``."""
        while len(self._starts) <= epochs and self._starts[-1] <= until:
            steps = math.ceil(self.micro_batches(len(self._starts) - 1) / self.batching.per_step)
            self._starts.append(self._starts[-1] + steps)


class End(NamedTuple):
    """Where there is nothing left to train on."""

    epoch: int
    step: int
    error: DataError


class Timeline:
    """The spans of a run, from its first step on; the last one has no end, unless the data end."""

    def __init__(self, rotations: Sequence[Rotation], batching: Batching) -> None:
        """Lay out the epochs. Raises DataError when there is nothing to train on at the first step."""
        self._rotations, self._batching = rotations, batching
        self.spans: list[Span] = []
        self.end: End | None = None
        joined: dict[str, int] = {}
        follows: tuple[int, int] | None = (0, 0)
        while follows is not None and self.end is None:
            follows = self._append(*follows, joined)
        if self.end is not None and not self.spans:
            raise self.end.error

    def at(self, step: int) -> tuple[Span, int, int]:
        """The span of ``step``, the epoch in it, and the step's number in that epoch; all from 0.

        Raises DataError where there are no data left.
        """
        if self.end is not None and step >= self.end.step:
            raise self.end.error
        span = self.spans[bisect_right(self.spans, step, key=lambda each: each.step) - 1]
        return span, *span.locate(step - span.step)

    def at_epoch(self, epoch: int) -> tuple[Span, int]:
        """The span of ``epoch`` (from 0), and its number in the span. Raises DataError where no data are left."""
        if self.end is not None and epoch >= self.end.epoch:
            raise self.end.error
        span = self.spans[bisect_right(self.spans, epoch, key=lambda each: each.epoch) - 1]
        return span, epoch - span.epoch

    def start(self, epoch: int) -> int:
        """The first step of ``epoch``. Raises DataError where no data are left before it."""
        if self.end is not None and epoch == self.end.epoch:
            return self.end.step
        span, index = self.at_epoch(epoch)
        return span.step + span.start(index)

    def _append(self, epoch: int, step: int, joined: dict[str, int]) -> tuple[int, int] | None:
        """Add the span that begins there; returns where the next one does."""
        active = [rotation for rotation in self._rotations if rotation.active(epoch, step)]
        members = tuple((each, epoch - joined.setdefault(each.dataset_id, epoch)) for each in active)
        span = Span(epoch, step, members, self._batching)
        if not active:
            self.end = End(epoch, step, _nothing_active(self._rotations, epoch, step))
        elif not span.buckets:
            self.end = End(epoch, step, _all_dropped(span))
        if self.end is not None:
            return None
        self.spans.append(span)
        return self._next(span)

    def _next(self, span: Span) -> tuple[int, int] | None:
        """(epoch, step) where the datasets are no longer those of ``span``; None when that never comes."""
        for step, epoch, inside in sorted(self._events(span)):
            if tuple(each.dataset_id for each in self._rotations if each.active(epoch, step)) != span.dataset_ids:
                return epoch + inside, step
        return None

    def _events(self, span: Span) -> Iterator[tuple[int, int, bool]]:
        """(step, its epoch, whether it is inside the epoch) of all that may change after the span's start."""
        for own in (each.schedule for each in self._rotations):
            for epoch in (own.start_epoch - 1, own.end_epoch):
                if epoch is not None and epoch > span.epoch:
                    yield span.step + span.start(epoch - span.epoch), epoch, False
            for step in (own.start_step, own.end_step):
                if step is not None and step > span.step:
                    index, inside = span.locate(step - span.step)
                    yield step, span.epoch + index, inside > 0


def _nothing_active(rotations: Sequence[Rotation], epoch: int, step: int) -> DataError:
    return DataError(
        f"no dataset is trained on from epoch {epoch + 1} on, after {step} steps",
        where="; ".join(
            f"dataset {each.dataset_id!r}: {', '.join(_limits(each.schedule, epoch, step))}" for each in rotations
        ),
        remedy="let a dataset join earlier or leave later"
        + (f", or let the run end there: max_train_steps: {step}" if step else ""),
    )


def _limits(schedule: Schedule, epoch: int, step: int) -> Iterator[str]:
    """The keys that keep a dataset out of an epoch (from 0) that begins at ``step``."""
    if epoch + 1 < schedule.start_epoch:
        yield f"start_epoch: {schedule.start_epoch}"
    if step < schedule.start_step:
        yield f"start_step: {schedule.start_step}"
    if schedule.end_epoch is not None and epoch + 1 > schedule.end_epoch:
        yield f"end_epoch: {schedule.end_epoch}"
    if schedule.end_step is not None and step >= schedule.end_step:
        yield f"end_step: {schedule.end_step}"


def _all_dropped(span: Span) -> DataError:
    buckets = "; ".join(
        f"{bucket}: {count} in batches of {span.batching.sizes[bucket]}" for bucket, count in span.dropped.items()
    )
    return DataError(
        f"small_buckets: drop leaves no bucket to train on from epoch {span.epoch + 1} on, after {span.step} steps",
        where=buckets,
        remedy="set small_buckets: pad, raise the datasets' repeats, or lower train_batch_size or batch_tokens",
    )
