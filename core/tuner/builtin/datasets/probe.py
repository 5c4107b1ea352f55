"""Probe a folder of clips and pictures once: what is in each file is kept in a small SQLite index.

A later start stats every file and opens none that has its old size and time. A file that cannot be
decoded is recorded with its reason, and not tried again until it changes.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout

from tuner.builtin.datasets.probe_file import VideoFacts
from tuner.builtin.datasets.probe_index import Index, Row, missing, open_index, result_of, uncollected
from tuner.builtin.datasets.probe_pool import probe_all
from tuner.builtin.progress import log, progress
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
LOCK_NAME = "probe.lock"
WRITE_EVERY = 64
PATIENCE = 2.0
"""Seconds to wait for another process in silence."""


class Probed(NamedTuple):
    """A file and what is in it: facts, or the reason why there are none."""

    name: str
    """the path inside the dataset's folder"""
    facts: VideoFacts | None
    reason: str = ""


def local_listing(folder: Path, suffixes: Collection[str]) -> Listing:
    """The files of a local folder. Raises DataError when it cannot be read."""
    try:
        # Not resolve(): the names of people's files are kept, where they are links too.
        return Listing(Path(os.path.abspath(folder)), scan(folder, suffixes))  # noqa: PTH100
    except OSError as error:
        raise DataError(
            f"a folder of files cannot be read: {error.strerror or error}",
            where=error.filename or folder,
            remedy="correct instance_data_dir, or the permissions",
        ) from error


def scan(folder: Path, suffixes: Collection[str] = VIDEO_SUFFIXES) -> list[Found]:
    """Every file under ``folder`` with one of ``suffixes`` (hidden files and folders left out), sorted by path.

    Each is stat'ed, none is opened. Raises OSError for a folder that cannot be read.
    """
    found: list[Found] = []
    pending, seen = [os.path.abspath(folder)], set()  # noqa: PTH100
    with uncollected():
        while pending:
            here = pending.pop()
            status = os.stat(here)  # noqa: PTH116
            if (status.st_dev, status.st_ino) in seen:
                continue  # a link that leads back
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(here) as entries:
                for entry in entries:
                    name = entry.name
                    if name[0] == ".":
                        continue
                    try:
                        if entry.is_dir():
                            pending.append(entry.path)
                        elif name[name.rfind(".") :].lower() in suffixes:
                            status = entry.stat()
                            found.append(Found(entry.path, status.st_size, status.st_mtime_ns))
                    except FileNotFoundError:
                        pass  # a link to nowhere
        found.sort()
    return found


def probe(
    listing: Listing,
    index: Path,
    *,
    processes: int = 0,
    show_progress: bool = True,
    pictures: bool = True,
    clips: bool = True,
) -> list[Probed]:
    """Every file of ``listing`` with its facts, in the same order.

    Of several processes that probe at once into one index, one does and the others wait for what it finds.

    Arguments
        index: folder of the index; made when absent.
        processes: how many probe new files; 0 is one per core.
        pictures, clips: what is wanted; a file that is something else, whatever its name, gets that as its reason.
    Raises DataError when the index cannot be written.
    """
    with open_index(index) as opened:
        known = opened.rows()
        if _new(listing.files, known):
            with _alone(index):
                _probe_new(listing, _new(listing.files, opened.rows()), opened, processes, show_progress)
                known = opened.rows()
                if len(known) > 2 * len(listing.files):
                    opened.forget(missing(known, listing.files, listing.root))
    start = len(os.path.join(listing.root, ""))  # noqa: PTH118
    with uncollected():
        return [_probed(path[start:], known.get(path), pictures, clips) for path, _, _ in listing.files]


def forget_missing(index: Path, listing: Listing) -> int:
    """Drop from the index what it knows of files under the listing's folder that are gone; how many there were."""
    with open_index(index) as opened:
        gone = missing(opened.rows(), listing.files, listing.root)
        opened.forget(gone)
        return len(gone)


def _new(files: Sequence[Found], known: dict[str, Row]) -> list[Found]:
    """The files that are not known, or were changed since."""
    new = []
    for found in files:
        row = known.get(found[0])
        if (row is None or row[1] != found[1] or row[2] != found[2]) and _has_plain_name(found):
            new.append(found)
    return new


def _has_plain_name(found: Found) -> bool:
    """Whether the name is text. Names that are not can be kept in no index, and be written in no report."""
    try:
        found.path.encode()
    except UnicodeEncodeError:
        return False
    return True


def _probe_new(listing: Listing, new: Sequence[Found], index: Index, processes: int, show_progress: bool) -> None:
    """Probe and remember; what is done when it is interrupted is remembered too."""
    done: list[tuple[Found, VideoFacts | str]] = []
    try:
        with progress(f"probing {listing.root.name}", len(new), show=show_progress) as advance:
            for result in probe_all(new, processes):
                done.append(result)
                advance(1)
                if len(done) >= WRITE_EVERY:
                    index.record(done)
                    done.clear()
    finally:
        index.record(done)


def _probed(name: str, row: Row | None, pictures: bool, clips: bool) -> Probed:
    if row is None:
        name = name.encode(errors="backslashreplace").decode()
        return Probed(name, None, "its name is not valid UTF-8: rename it")
    result = result_of(row)
    if isinstance(result, str):
        return Probed(name, None, result)
    if result.still and not pictures:
        return Probed(name, None, f"is a picture ({result.container}), not a clip, whatever its name says")
    if not result.still and not clips:
        return Probed(name, None, f"is a clip ({result.container}), not a picture, whatever its name says")
    return Probed(name, result)


@contextmanager
def _alone(index: Path) -> Iterator[None]:
    """Hold the lock on an index, when no other process does any more."""
    lock = FileLock(index / LOCK_NAME)
    try:
        lock.acquire(timeout=PATIENCE)
    except Timeout:
        log.info("another process is probing the same files: waiting for it (%s)", index / LOCK_NAME)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
