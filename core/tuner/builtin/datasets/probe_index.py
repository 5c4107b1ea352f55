"""The index of probed files: a small SQLite database that says what is in each file, or why it cannot be decoded."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from tuner.builtin.datasets.probe_file import VideoFacts
from tuner.builtin.datasets.probe_pack import PACK_COLUMNS, Pack, packed, root_of, unpacked
from tuner.builtin.datasets.scanning import Files
from tuner.builtin.garbage import uncollected
from tuner.builtin.progress import log
from tuner.data.source import Found
from tuner.errors import DataError

INDEX_NAME = "probe.sqlite3"
INDEX_VERSION = 2
"""Bumped when probing learns something new: an index of another version is filled afresh."""
Row = tuple[Any, ...]
"""path, size, mtime_ns, reason or None, then the fields of :class:`VideoFacts`"""
_COLUMNS = "path TEXT PRIMARY KEY, size INTEGER, mtime_ns INTEGER, reason TEXT, sha256 TEXT, width INTEGER, \
height INTEGER, frames INTEGER, fps REAL, duration REAL, variable INTEGER, container TEXT"
_REASON, _FACTS, _VARIABLE = 3, 4, 10


class Index:
    """An open index."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def rows(self) -> dict[str, Row]:
        """Everything that is known, by path."""
        with uncollected():
            return {row[0]: row for row in self._connection.execute("SELECT * FROM files")}

    def record(self, results: Iterable[tuple[Found, VideoFacts | str]]) -> None:
        """Remember what was probed."""
        empty = [None] * len(VideoFacts._fields)
        rows = [
            (*found, result, *empty) if isinstance(result, str) else (*found, None, *result)
            for found, result in results
        ]
        with self._connection:
            self._connection.executemany(
                f"INSERT OR REPLACE INTO files VALUES ({', '.join('?' * (_FACTS + len(empty)))})", rows
            )

    def forget(self, paths: Iterable[str]) -> None:
        """Drop what is known of these."""
        with self._connection:
            self._connection.executemany("DELETE FROM files WHERE path = ?", ((path,) for path in paths))
            if self._has_packs():
                self._connection.execute("DELETE FROM packs")

    def pack(self, files: Files, results: Sequence[VideoFacts | str]) -> None:
        """Remember what is in these files as one row beside theirs. Where that cannot be written, it is said."""
        if not files:
            return
        row = packed(files, results)
        try:
            with self._connection:
                self._connection.execute(f"CREATE TABLE IF NOT EXISTS packs ({PACK_COLUMNS})")
                self._connection.execute(f"INSERT OR REPLACE INTO packs VALUES ({', '.join('?' * len(row))})", row)
        except sqlite3.OperationalError as error:  # such as a disk that is only read: nothing is lost but time
            log.info("the index of probed files stays as it is (%s): the next start reads it file by file", error)

    def unpack(self, files: Files) -> Pack | None:
        """What is in these files, when not one has changed since they were packed."""
        if not self._has_packs():
            return None
        row = self._connection.execute("SELECT * FROM packs WHERE root = ?", (root_of(files),)).fetchone()
        return None if row is None else unpacked(row, files)

    def _has_packs(self) -> bool:
        """Whether the index is none of before there were packs."""
        return bool(self._connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'packs'").fetchone())


def result_of(row: Row) -> VideoFacts | str:
    """What a row says: facts, or the reason why there are none."""
    reason: str | None = row[_REASON]
    return (
        VideoFacts._make((*row[_FACTS:_VARIABLE], row[_VARIABLE] != 0, row[_VARIABLE + 1]))
        if reason is None
        else reason
    )


def missing(rows: Iterable[str], files: Sequence[Found], root: Path) -> list[str]:
    """Those paths under ``root`` that are not among ``files``, and are not there at all."""
    listed = {each.path for each in files}
    inside = os.path.join(root, "")  # noqa: PTH118
    return [path for path in rows if path not in listed and path.startswith(inside) and not os.path.lexists(path)]


@contextmanager
def open_index(folder: Path) -> Iterator[Index]:
    """The index in ``folder``, made or renewed where needed. A damaged one is put aside: it can be made again.

    Raises DataError when it cannot be read or written, here or later on.
    """
    path = folder / INDEX_NAME
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            connection = _connect(path)
        except sqlite3.OperationalError:
            raise
        except sqlite3.DatabaseError:
            aside = path.with_name(f"{path.name}.damaged-{int(time.time())}")
            with suppress(FileNotFoundError):  # another process was first
                path.rename(aside)
            log.warning("the index of probed files was damaged; it is now %s and a new one is made", aside)
            connection = _connect(path)
        with closing(connection):
            yield Index(connection)
    except (sqlite3.Error, OSError) as error:
        raise DataError(
            f"the index of probed files cannot be written: {error}",
            where=path,
            remedy="free the disk or choose another cache_dir_vae",
        ) from error


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=60)
    try:
        if connection.execute("PRAGMA user_version").fetchone()[0] != INDEX_VERSION:
            connection.execute("BEGIN IMMEDIATE")
            if connection.execute("PRAGMA user_version").fetchone()[0] != INDEX_VERSION:  # nor has another process
                connection.execute("DROP TABLE IF EXISTS files")
                connection.execute("DROP TABLE IF EXISTS packs")
                connection.execute(f"CREATE TABLE files ({_COLUMNS})")
                connection.execute(f"PRAGMA user_version = {INDEX_VERSION}")
            connection.commit()
    except BaseException:
        connection.close()
        raise
    return connection
