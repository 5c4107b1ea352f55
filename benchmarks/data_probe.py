"""How fast files are probed, and how soon a second start knows that nothing changed.

    python benchmarks/data_probe.py --files 100000 --clips 200

Probing is timed against ``av.open`` and one frame decoded, in one process, over the same clips. The second start is
timed over empty files and an index that was filled by hand: every file is stat'ed, none is opened.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import av
from rich.console import Console
from rich.table import Table

from tuner.builtin.datasets.probe import probe
from tuner.builtin.datasets.probe_file import VideoFacts, probe_file
from tuner.builtin.datasets.probe_index import open_index
from tuner.builtin.datasets.scanning import VIDEO_SUFFIXES, local_listing
from tuner.testing.clips import render_clip

FOLDERS = 100
FACTS = VideoFacts("0" * 64, 1280, 720, 81, 24.0, 3.375, False, "mp4")


def best(work: Callable[[], object], rounds: int) -> float:
    """Seconds of the fastest of several calls."""
    times: list[float] = []
    for _ in range(rounds):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)


def touch(folder: Path, count: int) -> None:
    """Empty files in a hundred folders."""
    for number in range(count):
        path = folder / f"{number % FOLDERS:02d}" / f"clip {number:06d}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def second_start(folder: Path, count: int, rounds: int) -> Table:
    """What a start costs on ``count`` files that are all known."""
    touch(folder / "files", count)
    listing = local_listing(folder / "files", VIDEO_SUFFIXES)
    with open_index(folder / "index") as index:
        index.record((found, FACTS) for found in listing.files)
    table = Table("second start", "seconds", title=f"{count} files")
    table.add_row("bare os.stat of each", f"{best(lambda: [Path(each.path).stat() for each in listing.files], 1):.2f}")
    table.add_row("scanning", f"{best(lambda: local_listing(folder / 'files', VIDEO_SUFFIXES), rounds):.2f}")
    whole = best(lambda: probe(local_listing(folder / "files", VIDEO_SUFFIXES), folder / "index"), rounds)
    table.add_row("scanning, comparing", f"{whole:.2f}")
    facts = best(lambda: list(probe(local_listing(folder / "files", VIDEO_SUFFIXES), folder / "index")), rounds)
    table.add_row("scanning, comparing, facts about each", f"{facts:.2f}")
    return table


def open_each(paths: Sequence[Path]) -> None:
    """Open each with PyAV and decode one frame."""
    for path in paths:
        with av.open(str(path)) as container:
            next(container.decode(video=0))


def first_start(folder: Path, count: int, rounds: int) -> Table:
    """Probing ``count`` clips, against opening them."""
    original = folder / "clip.mp4"
    render_clip(original, width=640, height=352, frames=49, fps=16, seed=1)
    paths = [folder / "clips" / f"{number:04d}.mp4" for number in range(count)]
    (folder / "clips").mkdir()
    for path in paths:
        shutil.copy(original, path)
    opened = best(lambda: open_each(paths), rounds)
    probed = best(lambda: [probe_file(path) for path in paths], rounds)
    indexes = iter(range(rounds))
    listing = local_listing(folder / "clips", VIDEO_SUFFIXES)
    whole = best(lambda: probe(listing, folder / f"index {next(indexes)}", show_progress=False), rounds)
    table = Table("first start", "files/s", "ratio", title=f"{count} clips")
    table.add_row("av.open and one frame", f"{count / opened:.0f}", "1.00")
    table.add_row("probed here", f"{count / probed:.0f}", f"{opened / probed:.2f}")
    table.add_row("probed in processes, their start included", f"{count / whole:.0f}", f"{opened / whole:.2f}")
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--clips", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args(arguments)
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        console.print(first_start(Path(folder), given.clips, given.rounds))
        console.print(second_start(Path(folder) / "many", given.files, given.rounds))


if __name__ == "__main__":
    main()
