"""Tables of files and captions: CSV, JSON lines, JSON and Parquet, read to one shape."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuner.errors import ConfigError, DataError, nearest

FILE_COLUMNS = ("file_name", "filename", "path", "video", "image", "url")
CAPTION_COLUMNS = ("caption", "captions", "text", "prompt")
"""What columns are called where nothing is said."""
KINDS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
}
"""How a table is read, by its suffix."""
_DELIMITERS = (",", ";", "\t")
_LONGEST_CELL = 2**27

Record = tuple[int, Mapping[str, Any]]
"""A line number (in Parquet: a row number from 1) and the cells by column."""


@dataclass(frozen=True)
class Row:
    """A file, as its table names it."""

    file: str
    """a path or an address"""
    captions: tuple[str, ...]
    """alternatives; none where the cell is empty"""
    line: int
    """where it stands in the table"""


@dataclass(frozen=True)
class Table:
    """The columns of a table, and its records, read when they are asked for."""

    path: Path
    columns: tuple[str, ...]
    records: Callable[[Sequence[str]], Iterator[Record]]
    """the records with (at least) the given columns"""


def open_table(path: Path, kind: str) -> Table:
    """A table as ``csv``, ``jsonl``, ``json`` or ``parquet``.

    Raises DataError, with the line, where it is not what it should be; ConfigError where pyarrow is needed and is
    not installed.
    """
    if not path.is_file():
        raise DataError("the table does not exist", where=path, remedy="correct `manifest`")
    try:
        path.open("rb").close()
    except OSError as error:
        raise DataError(f"the table cannot be read: {error.strerror}", where=path) from error
    return {"csv": _csv, "jsonl": _jsonl, "json": _json, "parquet": _parquet}[kind](path)


def rows(table: Table, file_column: str | None = None, caption_column: str | None = None) -> list[Row]:
    """The files and captions of a table.

    Arguments
        file_column: the column of paths or addresses; the first of :data:`FILE_COLUMNS` when None.
        caption_column: the column of captions; the first of :data:`CAPTION_COLUMNS` when None, and no captions
            where there is none.
    Raises ConfigError for a column that does not exist, DataError naming a line without a file.
    """
    file = column(table, file_column, FILE_COLUMNS)
    caption = column(table, caption_column, CAPTION_COLUMNS)
    if file is None:
        raise ConfigError(
            f"the table has no column of files: none is called {', '.join(FILE_COLUMNS)}",
            where=table.path,
            allowed=table.columns,
            remedy="name it by file_column",
        )
    found = []
    for line, cells in table.records([file, *([caption] if caption else [])]):
        where = f"{table.path}, line {line}"
        name = cells.get(file)
        if not isinstance(name, str) or not name.strip():
            raise DataError(f"column {file!r} names no file", where=where, remedy="fill it in, or take the line out")
        found.append(Row(name.strip(), captions(cells.get(caption) if caption else None, where), line))
    return found


def column(table: Table, wanted: str | None, usual: Sequence[str]) -> str | None:
    """The wanted column; where none is wanted the first usual one that exists, or None.

    Raises ConfigError when the wanted one does not exist.
    """
    if wanted is not None and wanted not in table.columns:
        raise ConfigError(
            f"the table has no column {wanted!r}",
            where=table.path,
            allowed=table.columns,
            nearest=nearest(wanted, table.columns),
        )
    return wanted or next((name for name in usual if name in table.columns), None)


def captions(cell: Any, where: object) -> tuple[str, ...]:
    """The alternatives in a cell: a text is one, a list (in CSV written as JSON) several, nothing none.

    Raises DataError for anything else.
    """
    if isinstance(cell, str) and cell.lstrip().startswith("["):
        cell = _list_in(cell)
    if cell is None or cell != cell:  # pandas writes NaN for nothing
        return ()
    each = cell if isinstance(cell, list | tuple) else [cell]
    if not all(isinstance(text, str | int | float) and not isinstance(text, bool) for text in each):
        raise DataError("a caption is no text", where=where, allowed="a text, or a list of texts")
    return tuple(dict.fromkeys(text for part in each if (text := str(part).strip())))


def _list_in(text: str) -> Any:
    """The JSON list in a text; the text itself where it is none: a caption may begin with a bracket."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if all(isinstance(each, str) for each in value) else text


def _csv(path: Path) -> Table:
    csv.field_size_limit(_LONGEST_CELL)
    first = _lines(path)
    header = next(first, (0, ""))[1]
    delimiter = max(_DELIMITERS, key=lambda each: len(next(csv.reader([header], delimiter=each), [])))
    columns = tuple(name.strip() for name in next(csv.reader([header], delimiter=delimiter), []))
    if not any(columns):
        raise DataError("the table is empty", where=path, remedy="its first line names the columns")

    def records(_: Sequence[str]) -> Iterator[Record]:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            try:
                next(reader)
                for cells in reader:
                    if cells:
                        yield reader.line_num, _paired(columns, cells, f"{path}, line {reader.line_num}")
            except (csv.Error, UnicodeDecodeError) as error:
                raise _unreadable(path, reader.line_num, error) from error

    return Table(path, columns, records)


def _paired(columns: Sequence[str], cells: Sequence[str], where: str) -> dict[str, str]:
    if len(cells) != len(columns):
        raise DataError(
            f"the line has {len(cells)} cells, and there are {len(columns)} columns",
            where=where,
            remedy='put cells that hold a separator in quotes: "…"',
        )
    return dict(zip(columns, cells, strict=True))


def _jsonl(path: Path) -> Table:
    parsed = [(line, _parsed(path, line, text)) for line, text in _lines(path) if text.strip()]
    return _of_objects(path, parsed)


def _json(path: Path) -> Table:
    values = _parsed(path, 1, "".join(text for _, text in _lines(path)))
    if not isinstance(values, list):
        raise DataError("the table is no list of objects", where=path, allowed="[{…}, {…}]")
    return _of_objects(path, list(enumerate(values, 1)))


def _of_objects(path: Path, values: Sequence[tuple[int, Any]]) -> Table:
    wrong = next((line for line, value in values if not isinstance(value, dict)), None)
    if wrong is not None:
        raise DataError("an entry is no object", where=f"{path}, line {wrong}", allowed='such as {"file_name": "…"}')
    columns = tuple(dict.fromkeys(name for _, value in values for name in value))
    if not columns:
        raise DataError("the table is empty", where=path)
    return Table(path, columns, lambda _: iter(values))


def _parsed(path: Path, line: int, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise _unreadable(path, line, error) from error


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Each line with its number, without a byte-order mark."""
    number = 0
    with path.open(encoding="utf-8-sig") as file:
        try:
            for number, text in enumerate(file, 1):
                yield number, text
        except UnicodeDecodeError as error:
            raise _unreadable(path, number + 1, error) from error


def _unreadable(path: Path, line: int, error: Exception) -> DataError:
    return DataError(
        f"the table cannot be read: {error}",
        where=f"{path}, line {line}",
        remedy="save it as UTF-8" if isinstance(error, UnicodeDecodeError) else "mend the line",
    )


def parquet_file(path: Path) -> Any:
    """A ``pyarrow.parquet.ParquetFile``. Raises ConfigError without pyarrow, DataError for a broken file."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ConfigError(
            "Parquet files cannot be read: pyarrow is not installed",
            where=path,
            remedy="pip install 'difftuner[parquet]'",
        ) from error
    try:
        return parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"the Parquet file cannot be read: {error}", where=path) from error


def _parquet(path: Path) -> Table:
    names = tuple(parquet_file(path).schema_arrow.names)
    return Table(path, names, lambda columns: parquet_records(path, columns))


def parquet_records(path: Path, columns: Iterable[str], *, at_once: int = 1024) -> Iterator[Record]:
    """Each row of a Parquet file, from 1, with the given columns; ``at_once`` rows are in memory at a time."""
    import pyarrow

    number = 0
    with parquet_file(path) as file:
        try:
            for batch in file.iter_batches(batch_size=at_once, columns=list(columns)):
                for cells in batch.to_pylist():
                    number += 1
                    yield number, cells
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"the Parquet file cannot be read: {error}", where=f"{path}, row {number + 1}") from error
