"""``memory_preset``: the settings that fit the device, chosen before a run begins, and kept when it goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuner.builtin.planner import costs
from tuner.builtin.planner.candidates import Candidates, Choice, quiet, settings_of
from tuner.builtin.planner.cards import Card
from tuner.builtin.planner.costs import Shape, most_frequent
from tuner.builtin.planner.fit import Fit, fit, size_of
from tuner.errors import ConfigError, TunerError

if TYPE_CHECKING:
    import torch
    from rich.table import Table

    from tuner.run import Run

KEY = "memory_preset"
AUTO = "auto"
LEFT = 0.05
"""Share of a device's free memory that ``auto`` leaves: what the allocator rounds, and fragments."""
GIB = 2**30


def check(word: str) -> None:
    """Raise ConfigError for what is neither ``auto`` nor a size."""
    if word != AUTO:
        size_of(word, KEY)


def limit(word: str) -> float:
    """Bytes that a run may take on the device. Raises ConfigError for ``auto`` on a device that counts no memory."""
    if word != AUTO:
        return size_of(word, KEY)
    import torch

    if not torch.cuda.is_available():
        raise ConfigError(
            "memory_preset auto takes the size of the device's memory, and there is no CUDA device here",
            where=KEY,
            allowed="a size, such as 12G",
        )
    return (1 - LEFT) * torch.cuda.mem_get_info()[0]


def device() -> torch.device:
    """The device that a run would take."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def choose(run: Run, shapes: Sequence[Shape], card: Card | None, bytes_free: float) -> tuple[Candidates, Fit]:
    """The settings for a run on ``shapes`` within ``bytes_free``; no key that the user set is changed.

    Raises ConfigError, with the least that was reached, when nothing fits.
    """
    candidates = Candidates.of(run, shapes, card, fixed=True)
    found = fit(candidates, bytes_free)
    if found.fits:
        return candidates, found
    least = found.choices[0]
    settings = json.dumps(dict(least.changes)) if least.changes else "the config as it is"
    raise ConfigError(
        f"nothing fits {bytes_free / GIB:.1f} GiB: the least is {least.device / GIB:.1f} GiB, in {least.worst}, with "
        f"{settings}",
        where=f"{KEY}: {_preset_of(run)}",
        remedy="train smaller or shorter clips, leave keys open that the config sets, or take a larger device",
    )


def show(candidates: Candidates, chosen: Choice, bytes_free: float) -> None:
    """Print what was set and why."""
    from rich.console import Console

    if chosen.changes:
        Console().print(table(candidates, chosen, bytes_free))
    else:
        print(f"{_title(chosen, bytes_free)}; it fits as it is, and nothing is set")


def table(candidates: Candidates, chosen: Choice, bytes_free: float) -> Table:
    """What was set and why: what a run would take without each of the settings, the others being as they are."""
    from rich.table import Table

    made = Table(title=_title(chosen, bytes_free), title_justify="left", box=None, padding=(0, 2, 0, 0), pad_edge=False)
    made.add_column("set")
    made.add_column("without it")
    for lever in parts(candidates, chosen):
        rest = {name: value for name, value in chosen.changes.items() if name not in lever}
        made.add_row(written(lever), without(candidates, rest, chosen, bytes_free))
    return made


def _title(chosen: Choice, bytes_free: float) -> str:
    return f"{KEY}: {chosen.device / GIB:.1f} of {bytes_free / GIB:.1f} GiB, most in {chosen.worst}"


def parts(candidates: Candidates, chosen: Choice) -> Iterator[Mapping[str, Any]]:
    """The levers that a choice is made of."""
    left = dict(chosen.changes)
    for lever in [*candidates.levers(), *candidates.faster()]:
        if lever.items() <= left.items():
            yield lever
            left = {name: value for name, value in left.items() if name not in lever}


def without(candidates: Candidates, rest: Mapping[str, Any], chosen: Choice, bytes_free: float) -> str:
    """What a run would take with ``rest`` of the settings alone, beside what it takes as ``chosen``."""
    try:
        other = candidates.assess(rest)
    except TunerError as error:
        return error.what
    if other.device > bytes_free:
        return f"{other.device / GIB:.1f} GiB in {other.worst}: too much"
    slower = 100 * (other.work / chosen.work - 1)
    return f"{other.device / GIB:.1f} GiB, {max(0.0, slower):.0f} % slower"


def written(settings: Mapping[str, Any]) -> str:
    """Settings in a line, as a config has them."""
    return ", ".join(f"{name}: {json.dumps(value)}" for name, value in settings.items()) or "nothing is set"


def kept(run: Run) -> tuple[Path, dict[str, Any]] | None:
    """(checkpoint, settings) of the run that goes on, where it had the same preset; else None.

    Its numbers must not change because another size is free today. Keys that the user sets now are not taken. The
    manifest is read as it stands: the core judges the checkpoint afterwards.
    """
    from tuner.train.checkpoint import MANIFEST, existing

    wanted = run.config.resume_from_checkpoint
    if wanted is None:
        return None
    latest = [path for _, path in reversed(existing(run.output_dir))]
    for folder in latest if wanted == "latest" else [Path(wanted)]:
        with suppress(OSError, ValueError, KeyError):
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            if manifest["config"][KEY] != _preset_of(run):
                return None
            proposed = dict(manifest["proposed"])
            return folder, {name: value for name, value in proposed.items() if name not in run.explicit}
    return None


def _preset_of(run: Run) -> str:
    return str(getattr(run.plugins["planner"].config, KEY))


def shapes_of(run: Run, named: Sequence[Shape] | None) -> tuple[Sequence[Shape], tuple[int, int, int] | None]:
    """What a run of this config trains on, and the shape of most clips: what is ``named``, or as its data are.

    Raises what assembling the config and preparing its data raise.
    """
    if named is not None:
        return named, most_frequent(named)
    from tuner import pipeline
    from tuner.assembly import assemble, new_run
    from tuner.train import schedules

    with quiet():
        assembly = assemble(settings_of(run))
        plain, hook = new_run(assembly), assembly.manager.hook
        spec = pipeline.describe(plain, assembly.manager)
        data = hook.prepare_data(run=plain, spec=spec)
        plan = hook.plan_epochs(run=plain, spec=spec, data=data, processes=run.replica_count)
        shapes = costs.shapes_of(plan, schedules.total_steps(plain.config, plan))
    return shapes, pipeline.most_frequent_shape(data)
