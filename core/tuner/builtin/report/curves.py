"""Curves of bounded size: however long a run is, a curve is drawn with at most ``MOST`` points."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

MOST = 2000
"""Points of one curve; a full one merges each pair of neighbours, so that its points stand twice as far apart."""
MOST_CURVES = 300
"""Names that are drawn; what comes after them stands in the log alone."""
NOT_DRAWN = frozenset({"step", "epoch", "samples"})


@dataclass
class Point:
    """One or several neighbouring values as one."""

    step: float
    """the last step it stands for"""
    total: float
    count: int
    low: float
    high: float


@dataclass
class Curve:
    """The values of one name over steps. Adding costs the same at any length."""

    points: list[Point] = field(default_factory=list)
    values_per_point: int = 1
    _open: int = 0
    """values in the last point while it is not full"""

    def add(self, step: float, value: float) -> None:
        """Append the value of ``step``, which follows those before it."""
        if self._open:
            last = self.points[-1]
            last.step, last.total, last.count = step, last.total + value, last.count + 1
            last.low, last.high = min(last.low, value), max(last.high, value)
        else:
            self.points.append(Point(step, value, 1, value, value))
        self._open = (self._open + 1) % self.values_per_point
        if len(self.points) >= MOST and not self._open:
            pairs = zip(self.points[::2], self.points[1::2], strict=True)
            self.points = [_merged(*pair) for pair in pairs]
            self.values_per_point *= 2

    def as_json(self) -> dict[str, list[float]]:
        """Columns ``step`` and ``mean``; ``low`` and ``high`` where points stand for several values."""
        columns = {
            "step": [point.step for point in self.points],
            "mean": [_short(point.total / point.count) for point in self.points],
        }
        if self.values_per_point > 1:
            columns["low"] = [_short(point.low) for point in self.points]
            columns["high"] = [_short(point.high) for point in self.points]
        return columns


@dataclass
class Curves:
    """All numbers of the log, by name."""

    by_name: dict[str, Curve] = field(default_factory=dict)
    latest: dict[str, Any] = field(default_factory=dict)
    """The last line."""
    seconds: float = 0.0
    """Of all steps that were logged."""
    unread: set[str] = field(default_factory=set)
    """Names that are not drawn, as there are too many."""

    def add(self, line: Mapping[str, Any]) -> None:
        """Take one line of the log; what is no finite number is left out."""
        step = line.get("step")
        if not finite(step):
            return
        self.latest = dict(line)
        for name, value in line.items():
            if name in NOT_DRAWN or not finite(value):
                continue
            if name not in self.by_name and len(self.by_name) >= MOST_CURVES:
                self.unread.add(name)
                continue
            self.by_name.setdefault(name, Curve()).add(step, value)  # type: ignore[arg-type]
        if finite(line.get("seconds")):
            self.seconds += line["seconds"]


def _merged(first: Point, second: Point) -> Point:
    return Point(
        second.step,
        first.total + second.total,
        first.count + second.count,
        min(first.low, second.low),
        max(first.high, second.high),
    )


def finite(value: object) -> bool:
    """Whether this is a number that can be drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _short(value: float) -> float:
    """Six digits: more than a screen shows."""
    return float(f"{value:.6g}")
