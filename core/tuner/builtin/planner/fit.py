"""Which settings make a step fit: every combination of what plugins offer, really assembled, then estimated."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import product
from math import log as ln
from typing import TYPE_CHECKING, Any

from tuner.builtin.planner.cards import Card
from tuner.builtin.planner.costs import Shape, cost_of
from tuner.errors import ConfigError, TunerError
from tuner.run import log

if TYPE_CHECKING:
    from tuner.run import Run
    from tuner.selection import Catalog

SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(?:(G|M)(i?)B?)?", re.IGNORECASE)
WORTH = 0.01
"""A lever that saves less than this share of the device's memory by itself is not tried."""
FASTER: tuple[dict[str, Any], ...] = ({"gradient_checkpointing": "selective"}, {"gradient_checkpointing": False})
"""What costs memory and saves time: to be had where there is room."""


@dataclass(frozen=True)
class Choice:
    """Settings, and what a step takes with them, for the shape that takes most."""

    changes: Mapping[str, Any]
    device: float
    """bytes"""
    host: float
    """bytes"""
    work: float
    """seconds of an average step on the card for each clip, or FLOP where no card is known"""
    weight_bytes: float = 2.0
    """per element of the base's matrices"""

    @property
    def rank(self) -> tuple[float, float, int, float]:
        """What is a hundredth faster comes first; of equals what keeps most of the weights, then what changes least."""
        return round(100 * ln(self.work)), -self.weight_bytes, len(self.changes), self.host


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
    """What saves memory by itself, the cheapest in time first, a line each with what it saves and costs."""
    from tuner.selection import Catalog

    catalog, settings = Catalog(), settings_of(run)
    with _quiet():
        present = _assessed(settings, {}, shapes, card, catalog)
        found = [each for each in _alone(settings, shapes, card, catalog) if each.device < (1 - WORTH) * present.device]
    return [_line(each, present) for each in sorted(found, key=lambda each: (each.rank[0], each.device))]


def _line(choice: Choice, present: Choice) -> str:
    settings = ", ".join(f"{name}: {json.dumps(value)}" for name, value in choice.changes.items())
    saved, cost = (present.device - choice.device) / 2**30, 100 * (choice.work / present.work - 1)
    return f"{settings} (saves {saved:.1f} GiB, costs {max(0.0, cost):.0f} % of the time)"


def size_of(word: str) -> float:
    """Bytes of ``24G`` or ``24GiB`` (2^30), ``24GB`` (10^9), ``8192M``, or of a bare number. Raises ConfigError."""
    match = SIZE.fullmatch(word.strip())
    if match is None:
        raise ConfigError(f"{word!r} is no size of memory", where="--fit", remedy="write 24G, 24GiB or 24GB")
    number, unit, binary = match.groups()
    decimal = word.strip().upper().endswith("B") and not binary
    power = {"": 0, "M": 2, "G": 3}[(unit or "").upper()]
    base: int = 1000 if decimal else 1024
    return float(number) * float(base**power)


def fit(run: Run, shapes: Sequence[Shape], limit: float, card: Card | None) -> Fit:
    """Try everything that saves memory, alone and together, and rank what stays below ``limit`` bytes by its time.

    Imports the entry modules of all installed plugins. Raises what assembling the present config raises.
    """
    from tuner.selection import Catalog

    catalog, settings = Catalog(), settings_of(run)
    with _quiet():
        present = _assessed(settings, {}, shapes, card, catalog)
        refused: dict[str, Mapping[str, Any]] = {}
        found = [present]
        for changes in _combinations(settings, present, shapes, card, catalog):
            try:
                found.append(_assessed(settings, changes, shapes, card, catalog))
            except TunerError as error:
                refused.setdefault(error.what, changes)
    fitting = sorted((each for each in found if each.device <= limit), key=lambda each: each.rank)
    smallest = sorted(found, key=lambda each: (each.device, each.work))
    return Fit(present, tuple(fitting or smallest), bool(fitting), refused)


def settings_of(run: Run) -> dict[str, Any]:
    """The keys that the user set, as a config file has them."""
    values: dict[str, Any] = run.config.model_dump(mode="json")
    for plugin in run.plugins.values():
        values |= plugin.config.model_dump(mode="json")
    return {name: values[name] for name in sorted(run.explicit) if name in values}


def levers(settings: Mapping[str, Any], catalog: Catalog) -> Iterator[Mapping[str, Any]]:
    """What installed plugins, loaded or not, and the core offer to save memory with, beyond what is set already."""
    classes = (catalog.peek(name) for name in catalog.installed)
    offered = [lever for cls in classes if cls is not None for lever in cls.levers]
    if settings.get("train_batch_size", 1) > 1:
        offered.append({"train_batch_size": 1})
    for lever in offered:
        if any(settings.get(name) != value for name, value in lever.items()):
            yield lever


def _alone(
    settings: Mapping[str, Any], shapes: Sequence[Shape], card: Card | None, catalog: Catalog
) -> Iterator[Choice]:
    """Every lever by itself, where it is one."""
    for lever in levers(settings, catalog):
        with suppress(TunerError):
            yield _assessed(settings, lever, shapes, card, catalog)


def _combinations(
    settings: Mapping[str, Any], present: Choice, shapes: Sequence[Shape], card: Card | None, catalog: Catalog
) -> Iterator[dict[str, Any]]:
    """Every choice of at most one lever for each key, of those that save something by themselves."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for faster in FASTER:
        groups.setdefault(next(iter(faster)), []).append(faster)
    for alone in _alone(settings, shapes, card, catalog):
        if alone.device < (1 - WORTH) * present.device:
            groups.setdefault(next(iter(alone.changes)), []).append(alone.changes)
    for chosen in product(*([{}, *group] for group in groups.values())):
        merged = {name: value for lever in chosen for name, value in lever.items()}
        if merged:
            yield merged


def _assessed(
    settings: Mapping[str, Any],
    changes: Mapping[str, Any],
    shapes: Sequence[Shape],
    card: Card | None,
    catalog: Catalog,
) -> Choice:
    """What a step takes with ``changes``. Raises TunerError where they do not go together."""
    from dataclasses import replace

    from tuner import pipeline
    from tuner.assembly import assemble, new_run

    assembly = assemble({**settings, **changes}, catalog=catalog)
    run = new_run(assembly)
    spec = pipeline.describe(run, assembly.manager)
    assert run.estimate is not None
    batch = changes.get("train_batch_size")
    asked = [shape if batch is None else replace(shape, samples=min(batch, shape.samples)) for shape in shapes]
    costs = [cost_of(run.estimate, network, shape, card) for network in spec.networks for shape in asked]
    share = sum(cost.shape.share for cost in costs)
    return Choice(
        dict(changes),
        max(cost.memory.on_device for cost in costs),
        max(cost.memory.on_host for cost in costs),
        sum(cost.shape.share * cost.work / cost.shape.samples for cost in costs) / share,
        min(cost.workload.weight_bytes for cost in costs),
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """What plugins say of combinations that nobody chose is not for the user."""
    before = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(before)
