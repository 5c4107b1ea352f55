"""What is in all the files of a folder, as one row of the index: unchanged folders are compared as columns.

A pack says nothing that the index does not say row by row. It is used when name, size and time of every file are what
they were, and made again when any is not.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Mapping, Sequence
from itertools import repeat
from typing import Any, NamedTuple, TypeVar, cast

from tuner.builtin.datasets.probe_file import VideoFacts
from tuner.builtin.datasets.scanning import Files

PACK_COLUMNS = "root BLOB PRIMARY KEY, names BLOB, sizes BLOB, times BLOB, reasons TEXT, sha256 BLOB, width BLOB, \
height BLOB, frames BLOB, fps BLOB, duration BLOB, variable BLOB, container BLOB"
_KINDS = ("text", "q", "q", "q", "d", "d", "?", "text")
"""Of the fields of VideoFacts: text, a type code of :mod:`array`, or truth values."""
_FPS = VideoFacts._fields.index("fps")
_Made = TypeVar("_Made", bound=tuple[Any, ...])
_NOTHING = VideoFacts("", 0, 0, 0, 0.0, 0.0)


class Pack(NamedTuple):
    """What is in the files of a listing, in its order."""

    columns: Sequence[Sequence[Any]]
    """the fields of VideoFacts, each for all files"""
    reasons: Mapping[int, str]
    """by position: why there are no facts about a file, and its columns hold nothing"""

    def facts(self) -> Iterable[VideoFacts]:
        """Facts about each file, in order; nothing real where there is a reason."""
        return made(VideoFacts, *self.columns)

    def fps(self) -> Sequence[float]:
        """Frames per second of each file, 0 for a picture."""
        return self.columns[_FPS]


def made(kind: type[_Made], *columns: Iterable[Any]) -> Iterable[_Made]:
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
        decoded = [_decoded(column, kind) for column, kind in zip(columns, _KINDS, strict=True)]
        found = {int(position): str(reason) for position, reason in json.loads(reasons).items()}
    except (ValueError, TypeError, AttributeError):
        return None
    return Pack(decoded, found) if all(len(each) == len(files) for each in decoded) else None


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
