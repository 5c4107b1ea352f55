"""Probe a folder of clips and pictures once: what is in each file is kept in a small SQLite index.

A later start stats every file and opens none that has its old size and time. A file that cannot be
decoded is recorded with its reason, and not tried again until it changes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import repeat
from pathlib import Path
from typing import NamedTuple, overload

from filelock import FileLock, Timeout

from tuner.builtin.datasets.probe_file import VideoFacts
from tuner.builtin.datasets.probe_index import Index, Row, missing, open_index, result_of
from tuner.builtin.datasets.probe_pack import Pack, made
from tuner.builtin.datasets.probe_pool import probe_all
from tuner.builtin.datasets.scanning import Files
from tuner.builtin.garbage import uncollected
from tuner.builtin.progress import log, progress
from tuner.data.source import Found, Listing

LOCK_NAME = "probe.lock"
WRITE_EVERY = 64
PATIENCE = 2.0
"""Seconds to wait for another process in silence."""
UNNAMEABLE = "its name is not valid UTF-8: rename it"


class Probed(NamedTuple):
    """A file and what is in it: facts, or the reason why there are none."""

    name: str
    """the path inside the dataset's folder"""
    facts: VideoFacts | None
    reason: str = ""


class Known(Sequence[Probed]):
    """Files of which none has changed. The facts about each are made when they are looked at, and not kept."""

    def __init__(self, names: Sequence[str], pack: Pack, pictures: bool, clips: bool) -> None:
        self._names, self._pack, self._wanted = names, pack, (pictures, clips)
        refused = [] if pictures and clips else enumerate(pack.fps())
        self._others = {*pack.reasons, *(at for at, fps in refused if not (clips if fps else pictures))}

    def __len__(self) -> int:
        return len(self._names)

    def __iter__(self) -> Iterator[Probed]:
        probed = made(Probed, self._names, self._pack.facts(), repeat(""))
        return self._judged(probed) if self._others else probed

    @overload
    def __getitem__(self, index: int) -> Probed: ...
    @overload
    def __getitem__(self, index: slice) -> list[Probed]: ...
    def __getitem__(self, index: int | slice) -> Probed | list[Probed]:
        return list(self)[index]

    def _judged(self, probed: Iterator[Probed]) -> Iterator[Probed]:
        """With the reasons against those that are not what is wanted."""
        for position, each in enumerate(probed):
            reason = self._pack.reasons.get(position, each.facts)
            yield _probed(each.name, reason, *self._wanted) if position in self._others else each


def probe(
    listing: Listing,
    index: Path,
    *,
    processes: int = 0,
    show_progress: bool = True,
    pictures: bool = True,
    clips: bool = True,
) -> Sequence[Probed]:
    """Every file of ``listing`` with its facts, in the same order; not to be changed.

    Of several processes that probe at once into one index, one does and the others wait for what it finds.

    Arguments
        index: folder of the index; made when absent.
        processes: how many probe new files; 0 is one per core.
        pictures, clips: what is wanted; a file that is something else, whatever its name, gets that as its reason.
    Raises DataError when the index cannot be written.
    """
    files = Files.of(listing)
    with open_index(index) as opened:
        with uncollected():
            if pack := opened.unpack(files):
                return Known(files.names, pack, pictures, clips)
        known = opened.rows()
        if _new(files, known):
            with _alone(index):
                _probe_new(listing, _new(files, opened.rows()), opened, processes, show_progress)
                known = opened.rows()
                if len(known) > 2 * len(files):
                    opened.forget(missing(known, files, listing.root))
        with uncollected():
            results = [UNNAMEABLE if (row := known.get(path)) is None else result_of(row) for path, _, _ in files]
            if not _new(files, known):  # nor did another process find one changed meanwhile
                opened.pack(files, results)
            return [_probed(*each, pictures, clips) for each in zip(files.names, results, strict=True)]


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


def _probed(name: str, result: VideoFacts | str | None, pictures: bool, clips: bool) -> Probed:
    if result is None or isinstance(result, str):
        return Probed(name.encode(errors="backslashreplace").decode(), None, result or UNNAMEABLE)
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
