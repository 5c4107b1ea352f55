"""What each step of a run came to beside what it had to do: numbers for the log, and a line at the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from tuner.builtin.planner.cards import Card
from tuner.builtin.planner.speed import step_seconds
from tuner.builtin.planner.wording import figures, seconds, tera
from tuner.flops import step_flops, total
from tuner.workload import Workload

GIB, TERA = 2**30, 1e12
SEEN = 1000
"""Of the last logged steps the median counts."""
KEPT = 256
"""Works that are remembered: shapes and shares of dropped tokens come again and again."""


@dataclass(frozen=True)
class Work:
    """What the micro-batches of a step ask of all processes."""

    tokens: float
    """S of a clip, on average"""
    flops: float
    """all that is computed"""
    model: float
    """what MFU counts"""
    floor: float | None
    """seconds at the least on one card, where it is known"""

    @classmethod
    def of(cls, workloads: Sequence[Workload], card: Card | None) -> Work:
        """Of the micro-batches of a step."""
        done = total(map(step_flops, workloads))
        clips = sum(each.samples for each in workloads)
        tokens = sum(each.tokens * each.samples for each in workloads) / clips
        floor = None if card is None else sum(step_seconds(each, card) for each in workloads)
        return cls(tokens, done.hardware, done.model, floor)


@dataclass
class Account:
    """The logged steps of a run."""

    card: Card | None
    processes: int = 1
    """that share each step's work"""
    planned: float | None = None
    """bytes on the device at the peak, by the plan, without CUDA's context"""
    _works: dict[Any, Work] = field(default_factory=dict)
    _seconds: list[float] = field(default_factory=list)
    _works_seen: list[Work] = field(default_factory=list)
    _dropped: list[float] = field(default_factory=list)
    _peak: float = 0.0

    def numbers(
        self, line: Mapping[str, Any], key: Any, workloads: Callable[[], Sequence[Workload]], dropped: float | None
    ) -> dict[str, float]:
        """For the log's line of a step: S, TFLOP and, where the card is known, MFU and times the floor.

        Arguments
            key: what decides the work of the step; ``workloads`` is asked once for each.
            dropped: share of the tokens' passes through blocks that were left out.
        """
        if key not in self._works:
            if len(self._works) >= KEPT:
                self._works.clear()
            self._works[key] = Work.of(workloads(), self.card)
        work, took = self._works[key], line["seconds"]
        self._remember(work, took, dropped, line.get("peak_memory_bytes", 0))
        found = {"planner/tokens": work.tokens, "planner/tflop": work.flops / TERA}
        if self.card is not None and work.floor is not None:
            found["planner/mfu"] = work.model / took / self._rate(self.card)
            found["planner/times_floor"] = took * self.processes / work.floor
        return found

    def told(self) -> str | None:
        """All of it in one line; None where no step was logged."""
        if not self._seconds:
            return None
        took = median(self._seconds)
        works = self._works_seen
        parts = [f"{figures(median(each.tokens for each in works))} tokens a clip"]
        parts.append(f"{tera(median(each.flops for each in works))} and {seconds(took)} a step")
        if self.card is not None:
            used = median(work.model / one for work, one in zip(works, self._seconds, strict=True))
            parts.append(f"MFU {used / self._rate(self.card):.0%}")
            over = self.processes * median(
                one / work.floor for work, one in zip(works, self._seconds, strict=True) if work.floor
            )
            parts.append(f"{over:.2f} times the floor of {self.card.name}")
        if self._peak:
            planned = "" if self.planned is None else f" ({self.planned / GIB:.2f} planned)"
            parts.append(f"peak {self._peak / GIB:.2f} GiB{planned}")
        if self._dropped:
            parts.append(f"{median(self._dropped):.0%} of the tokens' passes through blocks left out by routes")
        return f"speed: {', '.join(parts)}"

    def _rate(self, card: Card) -> float:
        """FLOP/s that large products reach on all cards of the run."""
        return card.matmul * TERA * self.processes

    def _remember(self, work: Work, took: float, dropped: float | None, peak: float) -> None:
        self._seconds.append(took)
        self._works_seen.append(work)
        if dropped is not None:
            self._dropped.append(dropped)
        for kept in (self._seconds, self._works_seen, self._dropped):
            del kept[:-SEEN]  # type: ignore[attr-defined]
        self._peak = max(self._peak, peak)
