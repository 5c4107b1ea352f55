"""Which settings make a run fit: every combination of what plugins offer, really assembled, then estimated."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

from tuner.builtin.planner.candidates import TRAINING, Candidates, Choice
from tuner.builtin.planner.cards import Card
from tuner.builtin.planner.costs import Shape
from tuner.errors import ConfigError, TunerError

if TYPE_CHECKING:
    from tuner.run import Run

SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(?:(G|M)(i?)B?)?", re.IGNORECASE)
ENOUGH = 8
"""Choices that are brought below the limit in phases beside training, the fastest ones first."""


@dataclass(frozen=True)
class Fit:
    """What was tried."""

    present: Choice
    choices: tuple[Choice, ...]
    """those that fit, the fastest first; where none does, all of them, the smallest first"""
    fits: bool
    refused: Mapping[str, Mapping[str, Any]]
    """reason -> the first combination that it refuses"""


def advice(run: Run, shapes: Sequence[Shape], card: Card | None) -> list[str]:
    """What saves memory by itself, the cheapest in time first, a line each with where it saves what, and its cost.

    What saves in training comes before what saves in other phases alone.
    """
    candidates = Candidates.of(run, shapes, card)
    present = candidates.assess({})
    found = [(each.saves(present), each) for each in candidates.alone()]
    useful = [(TRAINING not in saved, each.rank[0], each.device, each, saved) for saved, each in found if saved]
    return [_line(each, present, saved) for *_, each, saved in sorted(useful, key=lambda entry: entry[:3])]


def _line(choice: Choice, present: Choice, saved: Sequence[str]) -> str:
    settings = ", ".join(f"{name}: {json.dumps(value)}" for name, value in choice.changes.items())
    phase = TRAINING if TRAINING in saved else max(saved, key=present.within)
    size, cost = present.within(phase) - choice.within(phase), 100 * (choice.work / present.work - 1)
    where = "" if phase == TRAINING else f" in {phase}"
    return f"{settings} (saves {size / 2**30:.1f} GiB{where}, costs {max(0.0, cost):.0f} % of the time)"


def size_of(word: str, where: str = "--fit") -> float:
    """Bytes of ``24G`` or ``24GiB`` (2^30), ``24GB`` (10^9), ``8192M``, or of a bare number. Raises ConfigError."""
    match = SIZE.fullmatch(word.strip())
    if match is None:
        raise ConfigError(f"{word!r} is no size of memory", where=where, remedy="write 24G, 24GiB or 24GB")
    number, unit, binary = match.groups()
    decimal = word.strip().upper().endswith("B") and not binary
    power = {"": 0, "M": 2, "G": 3}[(unit or "").upper()]
    base: int = 1000 if decimal else 1024
    return float(number) * float(base**power)


def fit(candidates: Candidates, limit: float) -> Fit:
    """Try everything that saves memory, alone and together, and rank what stays below ``limit`` bytes by its time.

    In every phase: what saves in training is tried in all combinations; to those whose training fits is added what
    caching and validation need. Raises what assembling the present config raises.
    """
    present = candidates.assess({})
    alone = [(each.saves(present), each.changes) for each in candidates.alone()]
    beside = [changes for saved, changes in alone if saved and TRAINING not in saved]
    refused: dict[str, Mapping[str, Any]] = {}
    found = [present]
    for changes in _combinations(candidates, [changes for saved, changes in alone if TRAINING in saved]):
        try:
            found.append(candidates.assess(changes))
        except TunerError as error:
            refused.setdefault(error.what, changes)
    fitting = [each for each in found if each.device <= limit]
    trains = sorted(
        (each for each in found if each.within(TRAINING) <= limit < each.device), key=lambda each: each.rank
    )
    completed = [_completed(candidates, each, beside, limit) for each in trains[:ENOUGH]]
    fitting += [each for each in completed if each.device <= limit]
    if fitting:
        return Fit(present, tuple(sorted(fitting, key=lambda each: each.rank)), True, refused)
    nearest = min(found, key=lambda each: (each.within(TRAINING), each.work))
    found += [*completed, _completed(candidates, nearest, beside, limit)]
    return Fit(present, tuple(sorted(found, key=lambda each: (each.device, each.work))), False, refused)


def _combinations(candidates: Candidates, saving: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Every choice of at most one of the levers ``saving``, and of those that make a step faster, for each key."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for lever in [*candidates.faster(), *saving]:
        groups.setdefault(next(iter(lever)), []).append(lever)
    for chosen in product(*([{}, *group] for group in groups.values())):
        merged = {name: value for lever in chosen for name, value in lever.items()}
        if merged:
            yield merged


def _completed(candidates: Candidates, choice: Choice, beside: Sequence[Mapping[str, Any]], limit: float) -> Choice:
    """``choice`` with those of ``beside``, one after the other, that help a phase which takes more than ``limit``."""
    for lever in beside:
        if choice.device <= limit:
            return choice
        try:
            more = candidates.assess({**choice.changes, **lever})
        except TunerError:
            continue  # does not go with the others
        if any(choice.within(phase) > limit for phase in more.saves(choice)):
            choice = more
    return choice
