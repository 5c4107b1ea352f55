"""What the first steps of a run took, beside what they should take."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median

from tuner.builtin.planner.cards import Card
from tuner.builtin.planner.speed import step_seconds
from tuner.builtin.planner.wording import seconds, tera
from tuner.flops import StepFlops, step_flops, total
from tuner.workload import Workload

LEFT_OUT = 3
"""Steps at the start that are not counted: kernels are chosen and compiled, buffers are allocated."""
COUNTED = 20
FEW = 3
"""Fewer routed, or unrouted, steps than this are not compared."""


@dataclass(frozen=True)
class Timed:
    """One step: what it took, and what it had to do."""

    seconds: float
    flops: StepFlops
    unrouted: StepFlops
    """without token routes"""
    expected: float | None
    """seconds, where the card is known"""


class Window:
    """The steps that are measured, once in a run."""

    def __init__(self, card: Card | None) -> None:
        self.card = card
        self.steps: list[Timed] = []
        self._seen = 0

    @property
    def full(self) -> bool:
        """Whether all its steps are done."""
        return len(self.steps) == COUNTED

    def add(self, seconds: float, workloads: Callable[[], Sequence[Workload]]) -> None:
        """Count a step that took ``seconds``; ``workloads`` gives those of its micro-batches."""
        self._seen += 1
        if self._seen <= LEFT_OUT or self.full:
            return
        done = workloads()
        unrouted = [replace(each, dropped=()) for each in done]
        expected = None if self.card is None else sum(step_seconds(each, self.card) for each in done)
        self.steps.append(Timed(seconds, total(map(step_flops, done)), total(map(step_flops, unrouted)), expected))

    def report(self) -> Iterator[str]:
        """What was measured, in a line, and in another how routed and unrouted steps compare, if there were both."""
        rate = median(step.flops.hardware / step.seconds for step in self.steps)
        line = f"measured over {len(self.steps)} steps: {seconds(median(step.seconds for step in self.steps))} a step"
        utilised = ""
        if self.card is not None:
            used = median(step.flops.model / step.seconds for step in self.steps)
            expected = median(step.expected for step in self.steps if step.expected is not None)
            line += f" (expected on {self.card.name}: {seconds(expected)} at least)"
            utilised = f", MFU {used / (self.card.matmul * 1e12):.0%} of {self.card.matmul:.0f} TFLOP/s"
        yield f"{line}, {tera(rate)}/s{utilised}"
        yield from self._routes()

    def _routes(self) -> Iterator[str]:
        """Each step is held against its own work without routes, so that shapes of several sizes compare."""
        routed = [step for step in self.steps if step.flops.hardware < step.unrouted.hardware]
        plain = [step for step in self.steps if step.flops.hardware == step.unrouted.hardware]
        if min(len(routed), len(plain)) < FEW:
            return
        took, without = (median(step.seconds / step.unrouted.hardware for step in part) for part in (routed, plain))
        expected = median(step.unrouted.hardware / step.flops.hardware for step in routed)
        yield (
            f"{len(routed)} steps with token routes were {without / took:.2f} times as fast as {len(plain)} without "
            f"({expected:.2f} by FLOP)"
        )


def as_routed(workload: Workload, dropped: float | None) -> Workload:
    """``workload`` in a step that left out the share ``dropped`` of all tokens' passes through blocks; None is as
    configured."""
    most = sum(workload.dropped) / workload.network.blocks
    if dropped is None or not most:
        return workload
    return replace(workload, dropped=tuple(share * dropped / most for share in workload.dropped))
