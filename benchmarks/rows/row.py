"""One row of the table, and how two programs are timed against each other."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Row:
    """What was measured beside what is asked for.

    Arguments
        what: the quantity, with its case.
        measured: its value.
        goal: the bound; None is a row for comparison.
        side: whether the bound is the most or the least.
        unit: of both; "" is a ratio or a count.
        note: how it was come by, or why the goal is missed.
    """

    what: str
    measured: float
    goal: float | None = None
    side: Literal["most", "least"] = "most"
    unit: str = ""
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the goal is held; None where there is none."""
        if self.goal is None:
            return None
        return self.measured <= self.goal if self.side == "most" else self.measured >= self.goal


@dataclass(frozen=True)
class Timed:
    """Seconds of one call: on the clock, and of this process's CPU time."""

    wall: float
    cpu: float


def timed(work: Callable[[], object]) -> Timed:
    """Time one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return Timed(time.perf_counter() - wall, time.process_time() - cpu)


@dataclass(frozen=True)
class Paired:
    """Two programs in turns: medians over the pairs."""

    wall: float
    """ratio of the first to the second"""
    cpu: float
    """the same of CPU seconds; NaN where the clock of the process saw nothing"""
    one: Timed
    other: Timed


def paired(one: Callable[[], object], other: Callable[[], object], pairs: int, *, warm: bool = True) -> Paired:
    """Run both in turns (A B A B …), so that what else the machine does hits both alike.

    Arguments
        warm: run both once first, untimed.
    """
    if warm:
        one()
        other()
    return compare([(timed(one), timed(other)) for _ in range(pairs)])


def compare(found: list[tuple[Timed, Timed]]) -> Paired:
    """Medians of pairs that were timed."""
    middle = statistics.median
    return Paired(
        middle(first.wall / second.wall for first, second in found),
        middle(first.cpu / second.cpu if second.cpu else float("nan") for first, second in found),
        Timed(middle(first.wall for first, _ in found), middle(first.cpu for first, _ in found)),
        Timed(middle(second.wall for _, second in found), middle(second.cpu for _, second in found)),
    )
