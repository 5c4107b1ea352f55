"""The card, and which settings make a run fit it: what the planner says, as settings and as lines for a person."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tuner.builtin.planner import cards, preset
from tuner.builtin.planner.candidates import Candidates, Choice
from tuner.builtin.planner.fit import SIZE, size_of
from tuner.errors import TunerError

if TYPE_CHECKING:
    from tuner.builtin.planner.costs import Shape
    from tuner.run import Run
    from tuner.selection import Catalog

GIB = 2**30
CLEAR = 0.005
"""Share of a phase's memory that is worth a word."""
NONE = "none"
"""The card of a machine that has none that counts its memory."""
ALSO = ("gradient_checkpointing", "vae_enable_tiling", "train_batch_size")
"""Core keys that decide about memory."""


@dataclass(frozen=True)
class Machine:
    """What is trained on."""

    card: cards.Card | None
    bytes_free: float | None
    """None where memory is not counted, and nothing is chosen"""


def detected() -> str:
    """The card of this machine as an answer: a name that the planner knows, a size such as ``24G``, or ``none``."""
    import torch

    if not torch.cuda.is_available():
        return NONE
    facts = torch.cuda.get_device_properties(0)
    known = cards.of_device(facts.name, facts.total_memory / GIB)
    return f"{facts.total_memory / GIB:.1f}G" if known is None else known.name


def machine(answer: str) -> Machine:
    """The card that an answer names, less what an allocator rounds. Raises ConfigError for what is neither."""
    if answer.casefold() == NONE:
        return Machine(None, None)
    if SIZE.fullmatch(answer.strip()):
        return Machine(None, (1 - preset.LEFT) * size_of(answer, "--card"))
    card = cards.named(answer, where="--card")
    return Machine(card, (1 - preset.LEFT) * card.memory * GIB)


@dataclass(frozen=True)
class Planned:
    """What the planner says of a config."""

    machine: Machine
    candidates: Candidates
    present: Choice
    """as the config will be written"""
    chosen: Mapping[str, Any] = field(default_factory=dict)
    """levers that the planner adds"""
    why: Mapping[str, str] = field(default_factory=dict)
    problem: TunerError | None = None
    """why nothing fits"""

    @property
    def line(self) -> str:
        """How much of the card is used, and in which phase most."""
        used = f"{self.present.device / GIB:.1f}"
        if self.machine.bytes_free is None:
            return f"needs about {used} GiB, most in {self.present.worst}; no card is named, so no levers are chosen"
        return f"{used} of {self.machine.bytes_free / GIB:.1f} GiB, most in {self.present.worst}"

    def hours(self, steps: int, batch: int) -> float | None:
        """Hours of training on the card, where its rates are known; validation is not among them."""
        return None if self.machine.card is None else self.present.work * steps * batch / 3600

    def effect(self, changes: Mapping[str, Any]) -> str:
        """What ``changes`` would do to memory and time."""
        try:
            other = self.candidates.assess({**self.chosen, **changes})
        except TunerError as error:
            return error.what
        pairs = [(str(phase), self.present.within(str(phase)), other.within(str(phase))) for phase in other.phases]
        moved = [
            f"{phase} {before / GIB:.1f} -> {after / GIB:.1f} GiB"
            for phase, before, after in pairs
            if abs(after - before) > CLEAR * before
        ]
        slower = round(100 * (other.work / self.present.work - 1))
        return ", ".join([*(moved or ["no less memory"]), *([f"{slower:+d} % time"] if slower else [])])


def planned(run: Run, shapes: Sequence[Shape], chosen_for: Machine) -> Planned:
    """The planner's choice for the config of ``run``: keys that it sets are left as they are."""
    candidates = Candidates.of(run, shapes, chosen_for.card, fixed=True)
    if chosen_for.bytes_free is None:
        return Planned(chosen_for, candidates, candidates.assess({}))
    try:
        candidates, found = preset.choose(run, shapes, chosen_for.card, chosen_for.bytes_free)
    except TunerError as error:
        return Planned(chosen_for, candidates, candidates.assess({}), problem=error)
    best = found.choices[0]
    why: dict[str, str] = {}
    for lever in preset.parts(candidates, best):
        rest = {name: value for name, value in best.changes.items() if name not in lever}
        said = f"without it {preset.without(candidates, rest, best, chosen_for.bytes_free)}"
        why |= dict.fromkeys(lever, said)
    return Planned(chosen_for, candidates, best, best.changes, why)


def levers(catalog: Catalog, family: str) -> Iterator[Mapping[str, Any]]:
    """What installed plugins and the core offer to save memory with; of families the one at hand."""
    for name in catalog.installed:
        cls = catalog.peek(name)
        if cls is not None and ("model-family" not in cls.provides or name == family):
            yield from (lever for lever in cls.levers if "optimizer" not in lever)
    yield {"gradient_checkpointing": "selective"}
    yield {"gradient_checkpointing": False}
    yield {"vae_enable_tiling": True}


def keys(catalog: Catalog, family: str) -> list[str]:
    """Keys of the page on memory: those of the levers, and what belongs to them."""
    found = dict.fromkeys([*ALSO, "base_model_precision", "text_encoder_1_precision"])
    for name in catalog.installed:
        cls = catalog.peek(name)
        offered = (
            [] if cls is None else [key for lever in cls.levers for key in lever if key in cls.Config.model_fields]
        )
        if cls is None or not offered or ("model-family" in cls.provides and name != family):
            continue
        whole = "model-family" not in cls.provides
        found |= dict.fromkeys(cls.Config.model_fields if whole else offered)
    return list(found)


def written(lever: Mapping[str, Any]) -> str:
    """The value of the lever's first key, and what goes with it."""
    (_, value), *more = lever.items()
    beside = ", ".join(f"{name}: {json.dumps(other)}" for name, other in more)
    return json.dumps(value) + (f" with {beside}" if beside else "")
