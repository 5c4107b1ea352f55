"""Copies of files from elsewhere: fetched once, whole or not at all, and known by what they were fetched as."""

from __future__ import annotations

import hashlib
import os
import re
import sqlite3
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

from tuner.builtin.progress import log, progress
from tuner.builtin.sources.attempts import Missing, RemoteError, Unreachable
from tuner.builtin.sources.credentials import shown
from tuner.builtin.sources.places import AT_ONCE, RemoteFile, connect, download, measured, media_in
from tuner.data.source import Found, Listing, Request
from tuner.errors import DataError
from tuner.files import TEMPORARY, atomic_path

WRITE_FILES = 32
WRITE_BYTES = 2**26
"""What a killed process may have to fetch again, whichever is reached first."""
_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS copies (name TEXT PRIMARY KEY, identity TEXT, size INTEGER)",
    "CREATE TABLE IF NOT EXISTS listed (kind TEXT, name TEXT)",
)


class Copies:
    """A folder of copies and the index of it. Made by :func:`copies_in`."""

    def __init__(self, root: Path, index: sqlite3.Connection) -> None:
        self.root = root
        self._index = index
        rows = index.execute("SELECT name, identity, size FROM copies")
        self._known: dict[str, tuple[str, int]] = {name: (identity, size) for name, identity, size in rows}
        self._unwritten: list[tuple[str, str, int]] = []

    def holds(self, file: RemoteFile) -> bool:
        """Whether the copy of ``file`` is here and is still what the server has."""
        identity, size = self._known.get(file.name, ("", -1))
        return identity == file.identity and self._size(file.name) == size

    def record(self, file: RemoteFile) -> None:
        """Remember a copy that has just been fetched."""
        size = (self.root / file.name).stat().st_size
        self._known[file.name] = (file.identity, size)
        self._unwritten.append((file.name, file.identity, size))
        if len(self._unwritten) >= WRITE_FILES or sum(size for *_, size in self._unwritten) >= WRITE_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what was recorded."""
        with self._index:
            self._index.executemany("INSERT OR REPLACE INTO copies VALUES (?, ?, ?)", self._unwritten)
        self._unwritten.clear()

    def finish(self, kind: str, names: Iterable[str]) -> None:
        """Remember that these are all the files of ``kind``, and that they are here."""
        with self._index:
            self._index.execute("DELETE FROM listed WHERE kind = ?", (kind,))
            self._index.executemany("INSERT INTO listed VALUES (?, ?)", ((kind, name) for name in names))

    def finished(self, kind: str) -> list[str] | None:
        """The files of ``kind`` when all of them are here from before; else None."""
        names = [name for (name,) in self._index.execute("SELECT name FROM listed WHERE kind = ?", (kind,))]
        whole = names and all(self._size(name) == self._known.get(name, ("", -1))[1] for name in names)
        return names if whole else None

    def keep_aside(self, name: str) -> None:
        """Rename a copy that someone has changed since it was fetched: it is not ours to overwrite."""
        recorded = self._known.get(name)
        if recorded and (size := self._size(name)) is not None and size != recorded[1]:
            path = self.root / name
            aside = path.with_name(f"{path.name}.changed-{int(time.time())}")
            path.rename(aside)
            log.warning(
                "%s was changed here since it was fetched: it is now %s, and is fetched again", path, aside.name
            )

    def _size(self, name: str) -> int | None:
        try:
            return os.stat(self.root / name).st_size  # noqa: PTH116
        except OSError:
            return None


@contextmanager
def copies_in(root: Path) -> Iterator[Copies]:
    """The copies in a folder; other processes that want them wait until this one is done.

    Raises DataError when the folder or its index cannot be written.
    """
    index = root.with_name(f"{root.name}.sqlite3")
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root.with_name(f"{root.name}.lock")), closing(sqlite3.connect(index)) as connection:
            for line in _SCHEMA:
                connection.execute(line)
            copies = Copies(root, connection)
            try:
                yield copies
            finally:
                copies.flush()
    except sqlite3.Error as error:
        raise DataError(
            f"the index of copies cannot be used: {error}",
            where=index,
            remedy="free the disk; or move the index away, and everything is fetched again",
        ) from error
    except OSError as error:
        raise DataError(
            f"copies cannot be written: {error}",
            where=root,
            remedy="free the disk or choose another cache_dir_vae; what is fetched already stays",
        ) from error


def folder_for(address: str) -> str:
    """A folder name for the copies of an address: another address, another folder."""
    plain = shown(address).rstrip("/")  # another signature or password is no other place
    stem = re.sub(r"\W+", "-", plain.rpartition("/")[2]).strip("-")
    return f"{stem[:40] or 'files'}-{hashlib.sha256(plain.encode()).hexdigest()[:8]}"


def fetch(files: Sequence[RemoteFile], copies: Copies, *, show_progress: bool = True) -> dict[str, str]:
    """Fetch the files that are not here yet, several at once.

    Returns the reasons, by name, of those that the server does not have. Raises DataError naming the first file
    that cannot be fetched; what was fetched before stays.
    """
    new = [file for file in files if not copies.holds(file)]
    missing: dict[str, str] = {}
    if new:
        _clear_leftovers(copies.root)
    with (
        progress("fetching files", len(new), show=show_progress) as advance,
        ThreadPoolExecutor(AT_ONCE) as pool,
    ):
        pending: dict[Future[None], RemoteFile] = {pool.submit(_fetch_one, file, copies): file for file in new}
        try:
            for done in as_completed(list(pending)):
                file = pending.pop(done)
                try:
                    done.result()
                    copies.record(file)
                except Missing as error:
                    missing[file.name] = str(error)
                except RemoteError as error:
                    raise _cannot_fetch(file, error) from error
                advance(1)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            # What was under way when another one failed is here all the same.
            for done, file in pending.items():
                if not done.cancelled() and done.exception() is None:
                    copies.record(file)
    return missing


def _clear_leftovers(root: Path) -> None:
    """Remove the half files of a killed process; whoever holds the lock knows that no other is at work."""
    for path in list(root.rglob(f"{TEMPORARY}*")):
        path.unlink(missing_ok=True)


def _fetch_one(file: RemoteFile, copies: Copies) -> None:
    target = copies.root / file.name
    copies.keep_aside(file.name)
    with atomic_path(target) as temporary:
        download(file, temporary)


def _cannot_fetch(file: RemoteFile, error: RemoteError) -> DataError:
    return DataError(
        f"{file.name} cannot be fetched: {error}",
        where=file.place.address,
        remedy="start again when the connection is better: what is fetched already stays"
        if isinstance(error, Unreachable)
        else "look at the file there, or correct the login",
    )


def mirrored(address: str, options: Mapping[str, Any], request: Request) -> Listing:
    """The wanted files at an address, all of them copied to ``request.folder``.

    Where the address cannot be reached and all its files are here from before, these are listed, with a note.
    Raises ConfigError or DataError.
    """
    place = connect(address, options)
    kind = ",".join(sorted(request.suffixes))
    notes: tuple[str, ...] = ()
    with copies_in(request.folder / folder_for(address)) as copies:
        try:
            files = media_in(place, request.suffixes)
        except RemoteError as error:
            known = copies.finished(kind) if isinstance(error, Unreachable) else None
            if known is None:
                raise _cannot_list(place.address, request, error) from error
            names = known
            notes = (f"{place.address} cannot be reached ({error}); the copies from before are used",)
        else:
            names = [file.name for file in files]
            gone = fetch(_measured(files), copies, show_progress=request.show_progress)
            if gone:
                raise DataError(f"files went away while they were fetched: {', '.join(gone)}", where=place.address)
            copies.finish(kind, names)
    found = listed(copies.root, names, request.suffixes)
    if not found:
        raise DataError(
            f"dataset {request.dataset_id!r} has no files of its kind at {place.address}",
            allowed=sorted(request.suffixes),
            remedy="correct the address, or dataset_type",
        )
    return Listing(copies.root, found, notes=notes)


def _measured(files: Sequence[RemoteFile]) -> list[RemoteFile]:
    """The files with sizes and versions, asked for one by one where the listing did not say."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(_measure, files))


def _measure(file: RemoteFile) -> RemoteFile:
    try:
        return measured(file)
    except RemoteError as error:
        raise _cannot_fetch(file, error) from error


def listed(root: Path, names: Iterable[str], suffixes: Collection[str]) -> list[Found]:
    """The files with one of ``suffixes`` among ``names`` below ``root``, as a listing has them."""
    base = os.path.abspath(root)  # noqa: PTH100
    wanted = tuple(suffixes)
    paths = (os.path.join(base, *name.split("/")) for name in names if name.lower().endswith(wanted))  # noqa: PTH118
    return sorted(found_at(path) for path in paths)


def found_at(path: str) -> Found:
    """A file as a listing has it. Raises OSError when it is not there."""
    status = os.stat(path)  # noqa: PTH116
    return Found(path, status.st_size, status.st_mtime_ns)


def _cannot_list(address: str, request: Request, error: RemoteError) -> DataError:
    remedies = {
        Missing: "correct the address",
        Unreachable: "look at the connection; there is no whole copy from before",
    }
    return DataError(
        f"dataset {request.dataset_id!r}: {address} cannot be listed: {error}",
        remedy=remedies.get(type(error), "correct the login: storage_options, or the machine's own"),
    )
