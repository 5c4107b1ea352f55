"""From the command to the first step, and what a checkpoint keeps waiting: the figures of start.py and saving.py."""

from __future__ import annotations

import statistics
from pathlib import Path

import saving
import start

from rows.planning import process_time
from rows.row import Row, compare


def measure(folder: Path, *, tiny: bool) -> list[Row]:
    """Rows of the start and of saving."""
    pairs = 1 if tiny else 5
    return [*helped(pairs), *([] if tiny else first_step(folder / "start", pairs)), *saved(folder / "saving", pairs)]


def helped(pairs: int) -> list[Row]:
    """``tuner --help`` beside an interpreter that does nothing."""
    found = compare([(process_time(["-m", "tuner", "--help"]), process_time(["-c", "pass"])) for _ in range(pairs)])
    note = f"on the clock {found.one.wall:.2f} s; `python -c pass` {found.other.cpu:.2f} s"
    return [Row("`tuner --help`, CPU time", round(found.one.cpu, 2), 0.15, unit="s", note=note)]


def first_step(folder: Path, pairs: int) -> list[Row]:
    """See ``start.py``."""
    folder.mkdir()
    figures = start.measure(folder, pairs)
    ours, bare = figures["ours"], figures["bare"]
    both = list(zip(ours, bare, strict=True))
    cpu = statistics.median(one["cpu"] / other["cpu"] for one, other in both)
    wall = statistics.median(one["seen"]["first step"] / other["first step"] for one, other in both)
    heavy = {name for each in ours for name in each["heavy"]}
    return [
        Row("start to first step / bare program, CPU time", round(cpu, 2), 1.3, note=f"on the clock {wall:.2f}"),
        Row("modules of pipelines and encoders imported before the first step", len(heavy), 0),
    ]


def saved(folder: Path, saves: int) -> list[Row]:
    """See ``saving.py``."""
    folder.mkdir()
    figures = saving.measure(folder, saves)
    wait = 1000 * statistics.median(figures["waits"])
    note = f"{figures['bytes'] / 1e6:.0f} MB, median of {saves}"
    return [Row("checkpoint: the loop waits", round(wait, 1), 20, unit="ms", note=note)]
