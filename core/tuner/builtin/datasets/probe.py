"""Probe a folder of clips once: what is in each file is kept in a small SQLite index.

A later start stats every file and opens none that has its old size and time. A file that cannot be
decoded is recorded with its reason, and not tried again until it changes.
"""

from __future__ import annotations

import multiprocessing
import os
import sqlite3
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, suppress
from pathlib import Path
from typing import NamedTuple

from tuner.data.probe_file import VideoFacts, probe_file
from tuner.data.progress import log, progress
from tuner.data.source import Found, Listing
from tuner.errors import DataError

VIDEO_SUFFIXES = frozenset(
    (
        ".3gp",
        ".avi",
        ".flv",
        ".gif",
        ".m2ts",
        ".m4v",
        ".mkv",
        ".mov",
        ".mp4",
        ".mpeg",
        ".mpg",
        ".mts",
        ".ogv",
        ".ts",
        ".webm",
        ".wmv",
    )
)
PICTURE_SUFFIXES = frozenset((".avif", ".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"))
INDEX_NAME = "probe.sqlite3"
INDEX_VERSION = 1
"""Bumped when probing learns something new: an index of another version is filled afresh."""
FEW = 16
"""New files up to this number are probed here: starting processes would take longer."""
WRITE_EVERY = 64
_COLUMNS = "path TEXT PRIMARY KEY, size INTEGER, mtime_ns INTEGER, reason TEXT, sha256 TEXT, width INTEGER, \
height INTEGER, frames INTEGER, fps REAL, duration REAL"


class Probed(NamedTuple):
    """A file and what is in it: facts, or the reason why there are none."""

    name: str
    """the path inside the dataset's folder"""
    facts: VideoFacts | None
    reason: str = ""


def local_listing(folder: Path, suffixes: Collection[str]) -> Listing:
    """The files of a local folder."""
    return Listing(Path(os.path.abspath(folder)), scan(folder, suffixes))  # noqa: PTH100


def scan(folder: Path, suffixes: Collection[str] = VIDEO_SUFFIXES) -> list[Found]:
    """Every file under ``folder`` with one of ``suffixes`` (hidden files and folders left out), sorted by path."""
    found: list[Found] = []
    # Not resolve(): the names of people's files are kept, where they are links too.
    pending, seen = [os.path.abspath(folder)], set()  # noqa: PTH100
    while pending:
        here = pending.pop()
        status = os.stat(here)  # noqa: PTH116
        if (status.st_dev, status.st_ino) in seen:
            continue  # a link that leads back
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(here) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                with suppress(FileNotFoundError):  # a link to nowhere
                    if entry.is_dir():
                        pending.append(entry.path)
                    elif os.path.splitext(entry.name)[1].lower() in suffixes:  # noqa: PTH122
                        status = entry.stat()
                        found.append(Found(entry.path, status.st_size, status.st_mtime_ns))
    return sorted(found)


def probe(listing: Listing, index: Path, *, processes: int = 0, show_progress: bool = True) -> list[Probed]:
    """Every file of ``listing`` with its facts, in the same order.

    Arguments
        index: folder of the index; made when absent.
        processes: how many probe new files; 0 is one per core.
    Raises DataError when the index cannot be written.
    """
    found = listing.files
    try:
        with closing(_open(index / INDEX_NAME)) as connection:
            known = _known(connection)
            new = [each for each in found if each not in known]
            with progress(f"probing {listing.root.name}", len(new), show=show_progress) as advance:
                for batch in _batched(_probe_all(new, processes, advance), WRITE_EVERY):
                    known.update(batch)
                    _record(connection, batch)
    except (sqlite3.Error, OSError) as error:
        raise DataError(
            f"the index of probed files cannot be written: {error}",
            where=index / INDEX_NAME,
            remedy="free the disk or choose another cache_dir_vae",
        ) from error
    start = len(str(listing.root).rstrip(os.sep)) + 1  # the root of the disk ends in the separator
    results = ((each.path[start:], known[each]) for each in found)
    return [Probed(name, None, result) if isinstance(result, str) else Probed(name, result) for name, result in results]


def _open(path: Path) -> sqlite3.Connection:
    """The index, made or renewed where needed. A damaged one is put aside: it can be made again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        return _connect(path)
    except sqlite3.DatabaseError as error:
        if isinstance(error, sqlite3.OperationalError):
            raise
        aside = path.with_name(f"{path.name}.damaged-{int(time.time())}")
        path.rename(aside)
        log.warning("the index of probed files was damaged; it is now %s and a new one is made", aside)
        return _connect(path)


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=60)
    try:
        if connection.execute("PRAGMA user_version").fetchone()[0] != INDEX_VERSION:
            connection.execute("DROP TABLE IF EXISTS files")
        connection.execute(f"CREATE TABLE IF NOT EXISTS files ({_COLUMNS})")
        connection.execute(f"PRAGMA user_version = {INDEX_VERSION}")
        connection.commit()
    except BaseException:
        connection.close()
        raise
    return connection


def _known(connection: sqlite3.Connection) -> dict[Found, VideoFacts | str]:
    rows = connection.execute("SELECT * FROM files")
    return {Found(*row[:3]): VideoFacts(*row[4:]) if row[3] is None else row[3] for row in rows}


def _record(connection: sqlite3.Connection, batch: Iterable[tuple[Found, VideoFacts | str]]) -> None:
    rows = [
        (*found, result, *[None] * 6) if isinstance(result, str) else (*found, None, *result) for found, result in batch
    ]
    with connection:
        connection.executemany(f"INSERT OR REPLACE INTO files VALUES ({', '.join('?' * 10)})", rows)


def _probe_all(
    new: Sequence[Found], processes: int, advance: Callable[[int], None]
) -> Iterator[tuple[Found, VideoFacts | str]]:
    """Probe each file, in other processes where that pays."""
    paths = [Path(each.path) for each in new]
    workers = min(processes or os.cpu_count() or 1, len(paths))
    if len(paths) <= FEW or workers == 1:
        yield from _counted(new, map(probe_file, paths), advance)
        return
    # spawn: the parent may hold threads and a device, which a fork would copy half
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        try:
            yield from _counted(new, pool.map(probe_file, paths, chunksize=4), advance)
        except BrokenProcessPool as error:
            raise DataError(
                "a file ended the process that probed it",
                where=paths[0].parent,
                remedy="take out the files that were added last until it is found; those probed so far are remembered",
            ) from error


def _counted(
    new: Sequence[Found], results: Iterable[VideoFacts | str], advance: Callable[[int], None]
) -> Iterator[tuple[Found, VideoFacts | str]]:
    for found, result in zip(new, results, strict=True):
        advance(1)
        yield found, result


def _batched(
    items: Iterator[tuple[Found, VideoFacts | str]], size: int
) -> Iterator[list[tuple[Found, VideoFacts | str]]]:
    batch: list[tuple[Found, VideoFacts | str]] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
