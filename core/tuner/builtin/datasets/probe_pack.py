"""What is in all the files of a folder, as one row of the index: unchanged folders are compared as columns.

A pack says nothing that the index does not say row by row. It is used when name, size and time of every file are what
they were, and made again when any is not.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import repeat
from typing import Any, TypeVar, cast

from tuner.builtin.datasets.probe_file import VideoFacts
from tuner.builtin.datasets.scanning import Files

PACK_COLUMNS = "root BLOB PRIMARY KEY, names BLOB, sizes BLOB, times BLOB, reasons TEXT, sha256 BLOB, width BLOB, \
height BLOB, frames BLOB, fps BLOB, duration BLOB, variable BLOB, container BLOB"
_KINDS = ("text", "q", "q", "q", "d", "d", "?", "text")
"""Of the fields of VideoFacts: text, a type code of :mod:`array`, or truth values."""
_FPS = VideoFacts._fields.index("fps")
_Made = TypeVar("_Made", bound=tuple[Any, ...])
_NOTHING = VideoFacts("", 0, 0, 0, 0.0, 0.0)


class Pack:
    """What is in the files of a listing, in its order. What it is made of is only looked at when it is asked for.

    Arguments
        columns: the fields of VideoFacts, each for all files, as they are kept.
        reasons: by position: why there are no facts about a file, and its columns hold nothing.
        count: files.
    Raises ValueError when a column is not of so many files.
    """

    def __init__(self, columns: Sequence[bytes], reasons: Mapping[int, str], count: int) -> None:
        counts = [_count(column, kind) for column, kind in zip(columns, _KINDS, strict=True)]
        if counts != [count] * len(_KINDS):
            raise ValueError(f"columns of {counts} files, and there are {count}")
        self._columns, self.reasons = columns, reasons

    def facts(self) -> Iterator[VideoFacts]:
        """Facts about each file, in order; nothing real where there is a reason."""
        return made(VideoFacts, *map(_decoded, self._columns, _KINDS))

    def fps(self) -> Sequence[float]:
        """Frames per second of each file, 0 for a picture."""
        return _decoded(self._columns[_FPS], _KINDS[_FPS])


def made(kind: type[_Made], *columns: Iterable[Any]) -> Iterator[_Made]:
    """Named tuples of a kind from columns of its fields: no Python code runs for each."""
    return map(cast(Any, tuple.__new__), repeat(kind), zip(*columns, strict=False))


def root_of(files: Files) -> bytes:
    """What the pack of ``files`` is found by."""
    return _joined([files.root])


def packed(files: Files, results: Sequence[VideoFacts | str]) -> tuple[bytes | str, ...]:
    """The row of the index that says what is in ``files``: there is at least one."""
    facts = [_NOTHING if isinstance(each, str) else each for each in results]
    reasons = {position: each for position, each in enumerate(results) if isinstance(each, str)}
    columns = [_encoded(column, kind) for column, kind in zip(zip(*facts, strict=True), _KINDS, strict=True)]
    return (root_of(files), *_identity(files), json.dumps(reasons), *columns)


def unpacked(row: Sequence[Any], files: Files) -> Pack | None:
    """What a row says of ``files``; None when it is of other files, or damaged."""
    _, names, sizes, times, reasons, *columns = row
    if (names, sizes, times) != _identity(files):
        return None
    try:
        return Pack(
            columns, {int(position): str(reason) for position, reason in json.loads(reasons).items()}, len(files)
        )
    except (ValueError, TypeError, AttributeError):
        return None


def _identity(files: Files) -> tuple[bytes, bytes, bytes]:
    """What files are known by: while it is the same, so is their content."""
    return _joined(files.names), array("q", files.sizes).tobytes(), array("q", files.times).tobytes()


def _joined(texts: Sequence[str]) -> bytes:
    return "\0".join(texts).encode("utf-8", "surrogateescape")


def _encoded(values: Sequence[Any], kind: str) -> bytes:
    return _joined(values) if kind == "text" else bytes(values) if kind == "?" else array(kind, values).tobytes()


def _decoded(column: bytes, kind: str) -> Sequence[Any]:
    if kind == "text":
        return column.decode().split("\0")
    return list(map(bool, column)) if kind == "?" else array(kind, column).tolist()


def _count(column: bytes, kind: str) -> float:
    """How many values a column has, without making them. Raises ValueError for text that is none."""
    if kind == "text":
        return column.decode().count("\0") + 1
    return len(column) if kind == "?" else len(column) / array(kind).itemsize
