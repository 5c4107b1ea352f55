"""What a store remembers of entries whose checksum was found right: their size, time and inode.

An entry whose file still has all three is looked up and not read again. The list is an optimisation: where it
cannot be read or written, entries are read instead.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import closing, suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple, TypeVar

from tuner.builtin.progress import log

NAME = "checked.sqlite3"
VERSION = 1
"""Bumped when a row means something else: a list of another version is begun afresh."""
TIMEOUT = 20
"""Seconds to wait for another process that writes."""

T = TypeVar("T")


class Stamp(NamedTuple):
    """What a file is known by: while all three are the same, nobody has written to it."""

    size: int
    """bytes"""
    mtime_ns: int
    inode: int

    @classmethod
    def of(cls, path: Path | str | int) -> Stamp:
        """The stamp of a file, by its path or descriptor, as it is now. Raises OSError."""
        status = os.stat(path)  # noqa: PTH116
        return cls(status.st_size, status.st_mtime_ns, status.st_ino)


class Stamps:
    """The list of one store, safe to use from several threads and processes: nothing is held open."""

    def __init__(self, root: Path) -> None:
        self.path = root / NAME

    def known(self) -> dict[str, Stamp]:
        """The stamp of each entry that was found whole, by key."""
        if not self.path.exists():
            return {}
        read = "SELECT key, size, mtime_ns, inode FROM checked"
        return self._do(lambda connection: {row[0]: Stamp(*row[1:]) for row in connection.execute(read)}) or {}

    def record(self, stamps: Mapping[str, Stamp]) -> None:
        """Remember these entries as whole."""
        rows = [(key, *stamp) for key, stamp in stamps.items()]
        if rows:
            write = "INSERT OR REPLACE INTO checked VALUES (?, ?, ?, ?)"
            self._do(lambda connection: connection.executemany(write, rows))

    def forget(self, keys: Collection[str]) -> None:
        """Have these entries read again at the next start."""
        if keys and self.path.exists():
            rows = [(key,) for key in keys]
            self._do(lambda connection: connection.executemany("DELETE FROM checked WHERE key = ?", rows))

    def _do(self, work: Callable[[sqlite3.Connection], T]) -> T | None:
        """The result of ``work``; None where the list is out of reach. A damaged one is put aside and begun anew."""
        for _ in range(2):
            try:
                with closing(sqlite3.connect(self.path, timeout=TIMEOUT)) as connection, connection:
                    _prepare(connection)
                    return work(connection)
            except (sqlite3.OperationalError, OSError) as error:
                _say_out_of_reach(self.path, str(error))
                return None
            except sqlite3.DatabaseError:
                self._put_aside()
        return None

    def _put_aside(self) -> None:
        aside = self.path.with_name(f"{NAME}.damaged-{int(time.time())}-{os.getpid()}")
        with suppress(FileNotFoundError):  # another process was first
            self.path.rename(aside)
            log.warning("the list of checked cache entries was damaged; it is now %s and a new one is begun", aside)


def _prepare(connection: sqlite3.Connection) -> None:
    if _version(connection) == VERSION:
        return
    connection.execute("BEGIN IMMEDIATE")
    if _version(connection) != VERSION:  # else another process was first
        connection.execute("DROP TABLE IF EXISTS checked")
        connection.execute("CREATE TABLE checked (key TEXT PRIMARY KEY, size INTEGER, mtime_ns INTEGER, inode INTEGER)")
        connection.execute(f"PRAGMA user_version = {VERSION}")
    connection.commit()


def _version(connection: sqlite3.Connection) -> int:
    version: int = connection.execute("PRAGMA user_version").fetchone()[0]
    return version


@cache
def _say_out_of_reach(path: Path, reason: str) -> None:
    log.warning(
        "the list of checked cache entries is out of reach, so all are read at every start: %s: %s", path, reason
    )
