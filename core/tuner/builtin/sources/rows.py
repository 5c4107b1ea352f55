"""From the rows of a table to files of this machine: paths looked up, addresses fetched."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from tuner.builtin.sources.credentials import shown
from tuner.builtin.sources.mirror import copies_in, fetch, found_at
from tuner.builtin.sources.places import Place, RemoteFile, connect
from tuner.builtin.sources.tables import Row
from tuner.data.source import Found, Listing, Request
from tuner.errors import DataError

NAMED = 10
"""Rows named in one note before it only counts."""
Options = Mapping[str, Mapping[str, Any]]
"""By protocol."""
ADDRESSES = "addresses"
"""Folder of what was fetched from addresses in tables."""


class Gathered:
    """Files by path with their captions, and the rows that have none."""

    def __init__(self) -> None:
        self.found: dict[str, Found] = {}
        self.captions: dict[str, tuple[str, ...]] = {}
        self.missing: dict[str, str] = {}
        """what a row names, and why there is no file"""
        self.other_kinds = 0
        """rows whose file has a suffix that is not wanted"""

    def add(self, found: Found, captions: Sequence[str]) -> None:
        """A file; a second row of the same file adds its captions."""
        self.found[found.path] = found
        merged = dict.fromkeys([*self.captions.get(found.path, ()), *captions])
        if merged:
            self.captions[found.path] = tuple(merged)

    def notes(self, table: str) -> tuple[str, ...]:
        """What was left out, one line each."""
        notes = []
        if self.missing:
            named = "; ".join(f"{name} ({reason})" for name, reason in list(self.missing.items())[:NAMED])
            more = f"; and {len(self.missing) - NAMED} more" if len(self.missing) > NAMED else ""
            notes.append(f"{table}: files that are not there: {len(self.missing)}: {named}{more}")
        if self.other_kinds:
            notes.append(f"{table}: files of another kind, left out: {self.other_kinds}")
        return tuple(notes)


def gather(rows: Iterable[Row], root: str, request: Request, options: Options, *, confined: bool = False) -> Gathered:
    """The files that rows name.

    Arguments
        root: what relative paths are relative to: a folder or an address.
        options: of the file systems behind addresses, by protocol; those under ``""`` for any other.
        confined: refuse paths that lead out of ``root``: for tables that come from someone else.
    Raises DataError for a path that leads out, and where an address cannot be fetched.
    """
    gathered = Gathered()
    remote: dict[str, list[str]] = {}
    for row in rows:
        file = row.file.removeprefix("file://")
        target = file if "://" in file else _joined(root, file)
        if _suffix(target) not in request.suffixes:
            gathered.other_kinds += 1
        elif "://" in target:
            remote.setdefault(target, []).extend(row.captions)
        elif confined and not target.startswith(root.rstrip("/") + "/"):
            raise DataError(f"line {row.line} leads out of its folder: {file!r}", where=root, remedy="take it out")
        else:
            _look_up(target, row, gathered)
    if remote:
        _fetch(remote, request, options, gathered)
    return gathered


def _joined(root: str, file: str) -> str:
    if "://" in root:
        plain = file.lstrip("/")
        return f"{root.rstrip('/')}/{quote(plain, safe='/%') if root.startswith('http') else plain}"
    return os.path.normpath(os.path.join(root, file))  # noqa: PTH118


def _suffix(target: str) -> str:
    path = urlsplit(target).path if "://" in target else target
    return os.path.splitext(path)[1].lower()  # noqa: PTH122, a path object for each of many rows takes its time


def _look_up(path: str, row: Row, gathered: Gathered) -> None:
    try:
        gathered.add(gathered.found.get(path) or found_at(path), row.captions)
    except OSError as error:
        gathered.missing[row.file] = error.strerror or str(error)


def _fetch(remote: Mapping[str, Sequence[str]], request: Request, options: Options, gathered: Gathered) -> None:
    """Fetch what is at addresses. One that was fetched before is not asked for again."""
    places: dict[str, Place] = {}
    files = {address: _remote_file(address, options, places) for address in remote}
    with copies_in(request.folder / ADDRESSES) as copies:
        gone = fetch(list(files.values()), copies, show_progress=request.show_progress)
    base = os.path.abspath(copies.root)  # noqa: PTH100
    for address, file in files.items():
        if file.name in gone:
            gathered.missing[shown(address)] = "not found"
        else:
            gathered.add(found_at(os.path.join(base, file.name)), remote[address])  # noqa: PTH118


def _remote_file(address: str, options: Options, places: dict[str, Place]) -> RemoteFile:
    """The file at an address, named after it. ``places`` keeps one open file system for each protocol."""
    protocol = address.partition("://")[0]
    if protocol not in places:
        places[protocol] = connect(address, options.get(protocol, options.get("", {})))
    path = PurePosixPath(unquote(urlsplit(address).path))
    stem = re.sub(r"[^\w.-]+", "-", path.stem).strip(".-")[:60]
    name = f"{stem or 'file'}-{hashlib.sha256(address.encode()).hexdigest()[:12]}{path.suffix.lower()}"
    return RemoteFile(name, places[protocol], str(places[protocol].file_system._strip_protocol(address)))


def listing_of(gathered: Gathered, root: Path, request: Request, table: str, *, remedy: str) -> Listing:
    """What was gathered, as a listing. Raises DataError, with ``remedy``, when there is no file at all."""
    notes = gathered.notes(table)
    if not gathered.found:
        raise DataError(
            f"dataset {request.dataset_id!r}: no file that {table} names can be used",
            where="; ".join(notes) or "it has no rows",
            allowed=sorted(request.suffixes),
            remedy=remedy,
        )
    paths = sorted(gathered.found)
    top = root if all(path.startswith(f"{root}{os.sep}") for path in paths) else Path(_common(paths))
    return Listing(top, [gathered.found[path] for path in paths], gathered.captions, notes)


def _common(paths: Sequence[str]) -> str:
    """The deepest folder that holds all the files."""
    return os.path.commonpath([os.path.dirname(path) for path in paths])  # noqa: PTH120
