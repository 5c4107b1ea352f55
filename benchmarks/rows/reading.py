"""Many files and the cache, beside the least that the system can do."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from data_probe import FACTS, touch

from rows.row import Paired, Row, paired
from tuner.builtin.datasets.probe import Probed, probe
from tuner.builtin.datasets.probe_index import open_index
from tuner.builtin.datasets.scanning import VIDEO_SUFFIXES, local_listing
from tuner.builtin.encoding.store import Store, make_key
from tuner.data.source import Listing


def measure(folder: Path, *, tiny: bool) -> list[Row]:
    """Rows of scanning and of cache reads."""
    files, pairs = (100, 1) if tiny else (100_000, 5)
    return [*scanning(folder, files, pairs), *(cache(folder, 4, 1) if tiny else cache(folder, 50, 40))]


def stat_all(folder: str) -> int:
    """A bare loop of scandir and stat: bytes of all files."""
    total = 0
    with os.scandir(folder) as entries:
        for entry in entries:
            total += stat_all(entry.path) if entry.is_dir() else entry.stat().st_size
    return total


def scanning(folder: Path, count: int, pairs: int) -> list[Row]:
    """A first scan; one when everything is known; and what that is followed by, looking at the facts of each file."""
    where = folder / "many"
    touch(where, count)
    with open_index(folder / "index") as index:
        index.record((found, FACTS) for found in local_listing(where, VIDEO_SUFFIXES).files)

    def listed() -> Listing:
        return local_listing(where, VIDEO_SUFFIXES)

    def again() -> Sequence[Probed]:
        return probe(listed(), folder / "index")  # the first call, which is not timed, ends the first start

    def facts() -> None:
        for each in again():
            assert each.facts

    named: dict[str, tuple[Callable[[], object], float | None]] = {
        "first scan": (listed, 1.5),
        "rescan": (again, 1.5),
        "rescan, and facts about each": (facts, None),
    }
    return [
        _scanned(count, name, paired(work, lambda: stat_all(str(where)), pairs), goal)
        for name, (work, goal) in named.items()
    ]


def _scanned(count: int, name: str, found: Paired, goal: float | None) -> Row:
    note = f"{found.one.wall:.2f} and {found.other.wall:.2f} s; on the clock {found.wall:.2f}"
    return Row(f"{count} files, {name} / scandir + stat, CPU time", round(found.cpu, 2), goal, note=note)


def cache(folder: Path, entries: int, pairs: int) -> list[Row]:
    """Reading entries of a clip and its text beside the files' bytes; the median is of later readings, not hashed."""
    store = Store(folder / "store")
    keys = [make_key(number) for number in range(entries)]
    for key in keys:
        tensors = {"latents": torch.randn(16, 21, 54, 60), "states": torch.randn(512, 4096).bfloat16()}
        store.write(key, tensors, {})
    paths = [store.path(key) for key in keys]
    size = sum(path.stat().st_size for path in paths)

    def raw() -> None:
        for path in paths:
            path.read_bytes()

    def read() -> None:
        for key in keys:
            store.read(key)

    found = paired(raw, read, pairs)
    speeds = f"{size / found.one.wall / 1e9:.1f} and {size / found.other.wall / 1e9:.1f} GB/s"
    note = f"{speeds}, both from the page cache; a first reading is hashed"
    return [Row("cache reads / raw reads", round(found.wall, 3), 0.9, "least", note=note)]
