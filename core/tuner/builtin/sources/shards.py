"""Parquet files that hold the clips themselves, as the hub's viewers make them: each is taken out once.

A file is named after its content, so that a kill half way costs nothing but the shard it was at.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from tuner.builtin.sources.tables import captions, parquet_file, parquet_records
from tuner.files import atomic_write_bytes, atomic_write_text

AT_ONCE = 8
"""Rows in memory at a time: a clip may have many megabytes."""
FORMAT = 1
_MAGIC = (
    (0, b"\x89PNG", ".png"),
    (0, b"\xff\xd8\xff", ".jpg"),
    (8, b"WEBP", ".webp"),
    (0, b"GIF8", ".gif"),
    (0, b"BM", ".bmp"),
    (4, b"ftypqt", ".mov"),
    (4, b"ftypavif", ".avif"),
    (4, b"ftyp", ".mp4"),
    (0, b"\x1aE\xdf\xa3", ".mkv"),
    (8, b"AVI ", ".avi"),
)
"""Offset, bytes and the suffix they mean, the longer ones first."""


@dataclass(frozen=True)
class Shard:
    """What a Parquet file with clips in it gave."""

    files: tuple[tuple[str, tuple[str, ...]], ...]
    """name in the folder of extracted files, captions"""
    references: tuple[tuple[str, tuple[str, ...], int], ...]
    """rows that name a file instead of holding one: the name, captions, row"""
    unknown: int
    """rows whose content is none of the wanted kinds"""


def embedded(path: Path, column: str) -> bool:
    """Whether a column holds files' bytes: binary, or an object with ``bytes``. Raises as ``parquet_file`` does."""
    with parquet_file(path) as file:
        kind = file.schema_arrow.field(column).type
    return str(kind) in ("binary", "large_binary") or (str(kind).startswith("struct<") and _has_bytes(kind))


def embedded_columns(path: Path) -> list[str]:
    """The columns that hold files' bytes."""
    with parquet_file(path) as file:
        names = list(file.schema_arrow.names)
    return [name for name in names if embedded(path, name)]


def _has_bytes(kind: Any) -> bool:
    return any(kind.field(index).name == "bytes" for index in range(kind.num_fields))


def row_count(path: Path) -> int:
    """Rows of a Parquet file, from its footer."""
    with parquet_file(path) as file:
        return int(file.metadata.num_rows)


def known_shard(record: Path, folder: Path) -> Shard | None:
    """What an earlier start took out of a shard, when all of it is still there."""
    try:
        values = json.loads(record.read_text(encoding="utf-8"))
        files = tuple((str(name), tuple(texts)) for name, texts in values["files"])
        references = tuple((str(name), tuple(texts), int(row)) for name, texts, row in values["references"])
        shard = Shard(files, references, int(values["unknown"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return shard if all((folder / name).is_file() for name, _ in files) else None


def record_name(path: Path, name: str, columns: Collection[str | None], suffixes: Collection[str]) -> str:
    """The name of the record of a shard: another content, column or kind, another record.

    The hub keeps a file under its content's hash, which the link leads to.
    """
    content = f"{path.resolve().name}/{path.stat().st_size}"
    key = json.dumps([FORMAT, name, content, list(columns), sorted(suffixes)])
    return hashlib.sha256(key.encode()).hexdigest()[:32] + ".json"


def extract(
    path: Path,
    column: str,
    caption_column: str | None,
    *,
    folder: Path,
    record: Path,
    suffixes: Collection[str],
    advance: Callable[[int], None],
) -> Shard:
    """Write the files that a column holds to ``folder`` and what they are to ``record``.

    Arguments
        suffixes: kinds that are wanted; others are counted.
        advance: called with 1 for each row.
    Raises DataError for a caption that is no text, OSError where the folder cannot be written.
    """
    files: list[tuple[str, tuple[str, ...]]] = []
    references: list[tuple[str, tuple[str, ...], int]] = []
    unknown = 0
    wanted = [column, *([caption_column] if caption_column else [])]
    for row, cells in parquet_records(path, wanted, at_once=AT_ONCE):
        texts = captions(cells.get(caption_column) if caption_column else None, f"{path.name}, row {row}")
        content, name = _content(cells.get(column))
        suffix = _suffix(content, name, suffixes) if content else ""
        if suffix:
            files.append((_write(content or b"", suffix, folder), texts))
        elif content is None and name:
            references.append((name, texts, row))
        else:
            unknown += 1
        advance(1)
    atomic_write_text(record, json.dumps({"files": files, "references": references, "unknown": unknown}))
    return Shard(tuple(files), tuple(references), unknown)


def _content(cell: Any) -> tuple[bytes | None, str]:
    """The bytes in a cell and the name they had."""
    if isinstance(cell, dict):
        return cell.get("bytes"), str(cell.get("path") or "")
    return cell, ""


def _suffix(content: bytes, name: str, suffixes: Collection[str]) -> str:
    """The wanted suffix of a file by its name, else by its first bytes; empty when it is another kind."""
    suffix = PurePosixPath(name).suffix.lower()
    if not suffix:
        suffix = next((kind for start, magic, kind in _MAGIC if content[start : start + len(magic)] == magic), "")
    return suffix if suffix in suffixes else ""


def _write(content: bytes, suffix: str, folder: Path) -> str:
    name = hashlib.sha256(content).hexdigest()[:32] + suffix
    path = folder / name
    if not (path.is_file() and path.stat().st_size == len(content)):
        atomic_write_bytes(path, content)
    return name
