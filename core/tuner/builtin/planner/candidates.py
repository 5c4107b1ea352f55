"""One config, really assembled with changes, and what a run of it holds in each phase."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from math import log as ln
from typing import TYPE_CHECKING, Any

from tuner.builtin.planner.cards import Card
from tuner.builtin.planner.costs import Shape, cost_of
from tuner.builtin.planner.memory_phases import Phase, of_run
from tuner.errors import TunerError
from tuner.run import log

if TYPE_CHECKING:
    from tuner.run import Run
    from tuner.selection import Catalog

WORTH, MUCH = 0.01, 0.05
"""What saves less than this share of a phase's memory is no lever for it: in training, and in other phases."""
FASTER: tuple[dict[str, Any], ...] = ({"gradient_checkpointing": "selective"}, {"gradient_checkpointing": False})
"""What costs memory and saves time: to be had where there is room."""
TRAINING = "training"


@dataclass(frozen=True)
class Choice:
    """Settings, and what a run takes with them, on the shapes that take most."""

    changes: Mapping[str, Any]
    phases: Sequence[Phase]
    work: float
    """seconds of an average step on the card for each clip, or FLOP where no card is known"""
    weight_bytes: float = 2.0
    """per element of the base's matrices"""

    @property
    def worst(self) -> Phase:
        """The phase that holds most on the device."""
        return max(self.phases, key=lambda phase: phase.memory.on_device)

    @property
    def device(self) -> float:
        """Bytes on the device in that phase."""
        return self.worst.memory.on_device

    @property
    def host(self) -> float:
        """Bytes on the host in the phase that holds most there."""
        return max(phase.memory.on_host for phase in self.phases)

    def within(self, phase: str) -> float:
        """Bytes on the device in ``phase``."""
        return next((each.memory.on_device for each in self.phases if str(each) == phase), 0.0)

    def saves(self, present: Choice) -> list[str]:
        """The phases in which this choice holds clearly less than ``present``."""
        return [
            str(each)
            for each in present.phases
            if self.within(str(each)) < (1 - (WORTH if each.name == TRAINING else MUCH)) * each.memory.on_device
        ]

    @property
    def rank(self) -> tuple[float, float, int, float]:
        """What is a hundredth faster comes first; of equals what keeps most of the weights, then what changes least."""
        return round(100 * ln(self.work)), -self.weight_bytes, len(self.changes), self.host


@dataclass(frozen=True)
class Candidates:
    """A config, and what it is to train on."""

    settings: Mapping[str, Any]
    """the keys that are set"""
    shapes: Sequence[Shape]
    trained_shape: tuple[int, int, int] | None
    """(frames, height, width) of most clips, which validation renders where nothing else is said"""
    card: Card | None
    catalog: Catalog
    fixed: bool = False
    """whether keys that are set must stay as they are"""
    _known: dict[str, Choice | TunerError] = field(default_factory=dict)

    @classmethod
    def of(cls, run: Run, shapes: Sequence[Shape], card: Card | None, *, fixed: bool = False) -> Candidates:
        """Those of the config of ``run``. Imports the entry modules of all installed plugins."""
        from tuner.selection import Catalog

        return cls(settings_of(run), shapes, run.trained_shape, card, Catalog(), fixed)

    def levers(self) -> Iterator[dict[str, Any]]:
        """What installed plugins, loaded or not, and the core offer to save memory with, beyond what is set already."""
        classes = (self.catalog.peek(name) for name in self.catalog.installed)
        offered = [lever for cls in classes if cls is not None for lever in cls.levers]
        offered.append({"vae_enable_tiling": True})
        if self.settings.get("train_batch_size", 1) > 1:
            offered.append({"train_batch_size": 1})
        return self._left(offered)

    def faster(self) -> Iterator[dict[str, Any]]:
        """What takes memory for speed, in the same way."""
        return self._left(FASTER)

    def _left(self, offered: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
        """What each of ``offered`` would change; nothing of those that what is set forbids."""
        for lever in offered:
            changes = {name: value for name, value in lever.items() if self.settings.get(name) != value}
            if changes and not (self.fixed and changes.keys() & self.settings.keys()):
                yield changes

    def alone(self) -> Iterator[Choice]:
        """Every lever by itself, where it is one."""
        for lever in self.levers():
            with suppress(TunerError):
                yield self.assess(lever)

    def assess(self, changes: Mapping[str, Any]) -> Choice:
        """What a run takes with ``changes``. Raises TunerError where they do not go together."""
        known = repr(sorted(changes.items()))
        if known not in self._known:
            try:
                with quiet():
                    self._known[known] = self._assess(changes)
            except TunerError as error:
                self._known[known] = error
        found = self._known[known]
        if isinstance(found, TunerError):
            raise found
        return found

    def _assess(self, changes: Mapping[str, Any]) -> Choice:
        from tuner import pipeline
        from tuner.assembly import assemble, new_run
        from tuner.train import optimizers

        assembly = assemble({**self.settings, **changes}, catalog=self.catalog)
        run = new_run(assembly)
        run.trained_shape = self.trained_shape
        if "optimizer" in changes:
            run.optimizers = assembly.manager.registry("optimizers", run)
            optimizers.check(run)
        spec = pipeline.describe(run, assembly.manager)
        assert run.estimate is not None
        batch = changes.get("train_batch_size")
        asked = [shape if batch is None else replace(shape, samples=min(batch, shape.samples)) for shape in self.shapes]
        costs = [cost_of(run.estimate, network, shape, self.card) for network in spec.networks for shape in asked]
        share = sum(cost.shape.share for cost in costs)
        return Choice(
            dict(changes),
            of_run(run, spec, [cost.workload for cost in costs]),
            sum(cost.shape.share * cost.work / cost.shape.samples for cost in costs) / share,
            min(cost.workload.weight_bytes for cost in costs),
        )


def settings_of(run: Run) -> dict[str, Any]:
    """The keys that are set, as a config file has them, and the plugins that flags name; without ``memory_preset``."""
    values: dict[str, Any] = run.config.model_dump(mode="json")
    for plugin in run.plugins.values():
        values |= plugin.config.model_dump(mode="json")
    flags = {"plugins" if run.config.plugins is not None else "", "without" if run.config.without else ""}
    return {name: values[name] for name in sorted((run.explicit | flags) - {"memory_preset"}) if name in values}


@contextmanager
def quiet() -> Iterator[None]:
    """What plugins say of combinations that nobody chose is not for the user."""
    before = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(before)
