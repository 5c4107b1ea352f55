"""The tables of a dataset repository: metadata beside clips, lists of addresses, Parquet files with clips in them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import cast

from filelock import FileLock

from tuner.builtin.progress import progress
from tuner.builtin.sources.keys import HubKeys
from tuner.builtin.sources.mirror import found_at
from tuner.builtin.sources.rows import Gathered, gather
from tuner.builtin.sources.shards import Shard, embedded, embedded_columns, extract, known_shard, record_name, row_count
from tuner.builtin.sources.tables import (
    CAPTION_COLUMNS,
    FILE_COLUMNS,
    KINDS,
    Row,
    Table,
    column,
    open_table,
    rows,
)
from tuner.data.source import Request
from tuner.errors import ConfigError, DataError

EMBEDDED = "embedded"
"""Folder of the files that were inside Parquet files."""


@dataclass(frozen=True)
class Opened:
    """A table of the repository, and the columns that count."""

    name: str
    table: Table
    file: str
    caption: str | None
    holds_files: bool
    """whether the file column has the files' bytes, rather than their names"""


def gather_tables(
    folder: Path, names: Sequence[str], everything: Collection[str], wanted: Collection[str], request: Request
) -> tuple[Gathered, list[str]]:
    """The files that a repository's tables name or hold, and what is to be said of the tables.

    Arguments
        folder: the repository's files.
        names: its tables.
        everything: all its files; ``wanted``: those of the split.
    Raises ConfigError when a column that the entry names is in none of them, DataError for a broken one.
    """
    opened, notes = _open_all(folder, names, request)
    shards = [each for each in opened if each.holds_files]
    named: list[Row] = []
    for each in opened:
        if not each.holds_files:
            named += _placed(rows(each.table, each.file, each.caption), each.name, everything, wanted)
    taken = _extract_all(shards, request)
    for each, shard in zip(shards, taken, strict=True):
        named += _placed([Row(*reference) for reference in shard.references], each.name, everything, wanted)
    gathered = gather(named, str(folder), request, {}, confined=True)
    for shard in taken:
        gathered.other_kinds += shard.unknown
        for name, captions in shard.files:
            gathered.add(found_at(str(request.folder.absolute() / EMBEDDED / name)), captions)
    return gathered, notes


def _open_all(folder: Path, names: Sequence[str], request: Request) -> tuple[list[Opened], list[str]]:
    keys = cast("HubKeys", request.keys)
    asked = keys.video_column or keys.image_column
    opened, unused = [], []
    tables = {name: open_table(folder / name, KINDS[PurePosixPath(name).suffix.lower()]) for name in names}
    for name, table in tables.items():
        file = _file_column(table, asked, request)
        caption = keys.caption_column if keys.caption_column in table.columns else None
        caption = caption or (column(table, None, CAPTION_COLUMNS) if keys.caption_column is None else None)
        if file is None:
            unused.append(name)
        else:
            holds = table.path.suffix.lower() == ".parquet" and embedded(table.path, file)
            opened.append(Opened(name, table, file, caption, holds))
    _refuse_unknown(tables, opened, asked, keys.caption_column)
    notes = [f"tables without a column of files, not used: {', '.join(unused[:5])}"] if unused else []
    return opened, notes


def _file_column(table: Table, asked: str | None, request: Request) -> str | None:
    if asked is not None:
        return asked if asked in table.columns else None
    first = "image" if request.entry.get("dataset_type") == "image" else "video"
    usual = column(table, None, (first, *FILE_COLUMNS))
    if usual is None and table.path.suffix.lower() == ".parquet":
        return next(iter(embedded_columns(table.path)), None)
    return usual


def _refuse_unknown(tables: dict[str, Table], opened: Sequence[Opened], asked: str | None, caption: str | None) -> None:
    """Raise when a column that was asked for is in no table."""
    if not tables:
        if asked or caption:
            raise ConfigError(f"there is no table with the column {asked or caption!r}: the repository has no table")
        return
    first = next(iter(tables.values()))
    if asked and not opened:
        column(first, asked, ())
    if caption and not any(each.caption for each in opened):
        column(opened[0].table if opened else first, caption, ())


def _placed(found: Sequence[Row], table: str, everything: Collection[str], wanted: Collection[str]) -> Iterator[Row]:
    """The rows with names relative to the repository; those of files of other splits are left out."""
    for row in found:
        if "://" in row.file:
            yield row
            continue
        beside = (PurePosixPath(table).parent / row.file).as_posix()
        name = next((each for each in (beside, row.file) if each in everything), beside)
        if name in wanted or name not in everything:
            yield Row(name, row.captions, row.line)


def _extract_all(shards: Sequence[Opened], request: Request) -> list[Shard]:
    """What each Parquet file holds, taken out where it was not yet."""
    if not shards:
        return []
    folder = request.folder / EMBEDDED
    records = [
        request.folder
        / f"{EMBEDDED}-records"
        / record_name(each.table.path, each.name, (each.file, each.caption), request.suffixes)
        for each in shards
    ]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(request.folder / f"{EMBEDDED}.lock"):
            known = [known_shard(record, folder) for record in records]
            total = sum(row_count(each.table.path) for each, old in zip(shards, known, strict=True) if old is None)
            with progress("taking files out of Parquet", total, show=request.show_progress) as advance:
                return [
                    old
                    or extract(
                        each.table.path,
                        each.file,
                        each.caption,
                        folder=folder,
                        record=record,
                        suffixes=request.suffixes,
                        advance=advance,
                    )
                    for each, old, record in zip(shards, known, records, strict=True)
                ]
    except OSError as error:
        raise DataError(
            f"files cannot be taken out of Parquet: {error}",
            where=folder,
            remedy="free the disk or choose another cache_dir_vae; what is out already stays",
        ) from error
