"""What the steps of a run cost: the shapes that it trains on, how often each comes, and the cost of each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tuner.builtin.planner.cards import Card
from tuner.builtin.planner.memory import Memory, predict
from tuner.builtin.planner.speed import speed_up, step_seconds
from tuner.data.order import Order
from tuner.data.samples import Bucket
from tuner.flops import StepFlops, step_flops
from tuner.spec import NetworkSpec
from tuner.workload import Workload

STEPS = 1000
"""How many steps are looked at, at most, to know how often each shape comes."""

Estimate = Callable[[NetworkSpec, Bucket, int], Workload]


@dataclass(frozen=True)
class Shape:
    """Micro-batches of one shape."""

    bucket: Bucket
    samples: int
    """clips in a micro-batch"""
    share: float = 1.0
    """of the micro-batches of an epoch"""


@dataclass(frozen=True)
class Cost:
    """What an optimizer step takes whose micro-batches are all of one shape."""

    shape: Shape
    workload: Workload
    flops: StepFlops
    seconds: float | None
    """at least, on the card; None where no card is known"""
    speed_up: float
    """How many times as fast the step is as without token routes."""
    memory: Memory
    """at its peak"""

    @property
    def work(self) -> float:
        """Seconds, or FLOP where no card is known: for weighing shapes against each other."""
        return self.flops.hardware if self.seconds is None else self.seconds


def shapes_of(plan: Order, total: int) -> list[Shape]:
    """The shapes of the first epoch (its first ``STEPS`` steps at most), or of a run of ``total`` steps if shorter."""
    counted: Counter[tuple[Bucket, int]] = Counter()
    for step in range(min(plan.steps_per_epoch, total, STEPS)):
        counted.update((batch.bucket, len(batch.samples)) for batch in plan.micro_batches(step))
    return [Shape(bucket, samples, count / counted.total()) for (bucket, samples), count in sorted(counted.items())]


def most_frequent(shapes: Sequence[Shape]) -> tuple[int, int, int]:
    """(frames, height, width) of the shape that comes most often; of several the largest."""
    bucket = max(shapes, key=lambda shape: (shape.share, shape.bucket)).bucket
    return bucket.frames, bucket.height, bucket.width


def cost_of(estimate: Estimate, network: NetworkSpec, shape: Shape, card: Card | None) -> Cost:
    """The cost of a step of ``network`` on ``shape``."""
    workload = estimate(network, shape.bucket, shape.samples)
    seconds = None if card is None else step_seconds(workload, card)
    return Cost(shape, workload, step_flops(workload), seconds, speed_up(workload, card), predict(workload))


@dataclass(frozen=True)
class Mean:
    """An average step over several shapes."""

    flops: float
    """FLOP that it computes"""
    seconds: float | None
    speed_up: float


def mean(costs: Sequence[Cost]) -> Mean:
    """The average step, each shape by its share. The speed-up is that of the average step, not an average of ratios."""
    weight = sum(cost.shape.share for cost in costs)
    work = sum(cost.shape.share * cost.work for cost in costs)
    return Mean(
        flops=sum(cost.shape.share * cost.flops.hardware for cost in costs) / weight,
        seconds=None if any(cost.seconds is None for cost in costs) else work / weight,
        speed_up=sum(cost.shape.share * cost.work * cost.speed_up for cost in costs) / work,
    )
