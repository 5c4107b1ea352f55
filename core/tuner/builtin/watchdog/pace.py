"""The pace of the steps: each is compared with those before it that had as much to do."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Hashable, Iterator, Mapping
from statistics import median

KNOWN = 10
"""Steps alike, before one is judged: the first ones choose kernels and fill buffers."""
REMEMBERED = 100
WINDOW = 10
MANY = 8
"""So many slow ones of a window are no accident."""
SECONDS = 0.2
"""What a step must lose at least: nobody cares for less."""
RARE = ("save", "validate")
"""Stages that only some steps have: each is judged when it comes."""
RARE_KNOWN = 3

Stages = Mapping[str, float]
"""Seconds by stage."""


class Pace:
    """What steps took."""

    def __init__(self, factor: float) -> None:
        """``factor``: how many times as long as usual is slow."""
        self._factor = factor
        self._alike: dict[Hashable, deque[Stages]] = defaultdict(lambda: deque(maxlen=REMEMBERED))
        self._rare: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=REMEMBERED))
        self._slow: deque[tuple[Stages, Stages] | None] = deque(maxlen=WINDOW)
        """Of the last steps: each slow one beside what is usual, None for the others."""
        self._said = False

    def after(self, work: Hashable, step: int, stages: Stages) -> Iterator[str]:
        """What to say after a step.

        Arguments
            work: what the step had to do; steps of equal work are compared.
            stages: the seconds of each stage.
        """
        for stage in RARE:
            if stage in stages:
                yield from self._rarely(stage, step, stages[stage])
        yield from self._steadily(work, step, {name: each for name, each in stages.items() if name not in RARE})

    def _rarely(self, stage: str, step: int, seconds: float) -> Iterator[str]:
        before = self._rare[stage]
        if len(before) >= RARE_KNOWN and self._is_slow(seconds, median(before)):
            yield f"{stage} after step {step} took {seconds:.1f} s; it used to take {median(before):.1f} s"
        before.append(seconds)

    def _steadily(self, work: Hashable, step: int, stages: Stages) -> Iterator[str]:
        before = self._alike[work]
        usual = {name: median(each.get(name, 0.0) for each in before) for name in stages} if before else {}
        slow = len(before) >= KNOWN and self._is_slow(sum(stages.values()), sum(usual.values()))
        self._slow.append((stages, usual) if slow else None)
        if not slow:
            before.append(stages)  # what is slow does not become usual
        found = [each for each in self._slow if each is not None]
        if len(found) >= MANY and not self._said:
            self._said = True
            yield _slowed(step, found)
        elif self._said and not found and len(self._slow) == WINDOW:
            self._said = False
            yield f"step {step}: steps are as fast as before again"

    def _is_slow(self, seconds: float, usual: float) -> bool:
        return seconds > self._factor * usual and seconds > usual + SECONDS


def _slowed(step: int, found: list[tuple[Stages, Stages]]) -> str:
    """Which stage takes the time."""

    def both(name: str) -> tuple[float, float]:
        return median(now.get(name, 0.0) for now, _ in found), median(usual.get(name, 0.0) for _, usual in found)

    grown = {name: both(name) for name in found[-1][0]}
    worst = max(grown, key=lambda name: grown[name][0] - grown[name][1])
    now, usual = (sum(each[index] for each in grown.values()) for index in (0, 1))
    return (
        f"step {step}: steps take {now:.1f} s, and took {usual:.1f} s before; it is the stage {worst!r}, from "
        f"{grown[worst][1]:.1f} s to {grown[worst][0]:.1f} s"
    )
