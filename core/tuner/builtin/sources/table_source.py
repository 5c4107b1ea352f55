"""``type: csv``, ``jsonl``, ``parquet`` and ``manifest``: the files, and captions, that a table names."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any, cast

from tuner.builtin.sources.attempts import RemoteError, Unreachable
from tuner.builtin.sources.credentials import resolved, shown
from tuner.builtin.sources.keys import TableKeys
from tuner.builtin.sources.mirror import copies_in, fetch, folder_for
from tuner.builtin.sources.places import RemoteFile, connect, measured
from tuner.builtin.sources.rows import gather, listing_of
from tuner.builtin.sources.tables import KINDS, open_table, rows
from tuner.data.source import Listing, Request
from tuner.errors import ConfigError, DataError
from tuner.plugin import PluginConfig


class TableSource:
    """Files that a table names.

    Arguments
        kind: how the table is read; by its suffix when None.
    """

    keys: type[PluginConfig] = TableKeys

    def __init__(self, kind: str | None = None) -> None:
        self.kind = kind

    def listing(self, request: Request) -> Listing:
        """The files, those at addresses fetched, with their captions. Raises ConfigError or DataError."""
        keys = cast("TableKeys", request.keys)
        options = resolved(keys.storage_options, "storage_options")
        name = shown(keys.manifest)
        kind = self.kind or _kind(name)
        path, notes = _at_hand(keys.manifest, options, request)
        read = rows(open_table(path, kind), keys.file_column, keys.caption_column)
        root = _root(request, keys.manifest)
        gathered = gather(read, root, request, _by_protocol(options, root, keys.manifest))
        remedy = "correct instance_data_dir (what relative paths start at), file_column or dataset_type"
        listing = listing_of(gathered, Path(root), request, PurePosixPath(name).name, remedy=remedy)
        return replace(listing, notes=(*notes, *listing.notes))


def _kind(name: str) -> str:
    suffix = PurePosixPath(name).suffix.lower()
    if suffix not in KINDS:
        raise ConfigError(
            f"a table with the suffix {suffix!r} is not known",
            where=name,
            allowed=KINDS,
            remedy="rename it, or set type to csv, jsonl or parquet",
        )
    return KINDS[suffix]


def _root(request: Request, manifest: str) -> str:
    """What relative paths start at: ``instance_data_dir``, or else the table's own folder."""
    folder = request.entry.get("instance_data_dir") or manifest.partition("?")[0].rpartition("/")[0]
    return str(folder) if "://" in str(folder) else os.path.abspath(folder or ".")  # noqa: PTH100


def _by_protocol(options: Mapping[str, Any], *addresses: str) -> dict[str, Mapping[str, Any]]:
    """The options for the protocols they are meant for: those of the entry's own addresses, else any."""
    own = {address.partition("://")[0] for address in addresses if "://" in address}
    return dict.fromkeys(own or {""}, options)


def _at_hand(manifest: str, options: Mapping[str, Any], request: Request) -> tuple[Path, tuple[str, ...]]:
    """The table as a local file, fetched again where it has changed; and a note where it could not be asked for."""
    if "://" not in manifest or manifest.startswith("file://"):
        return Path(manifest.removeprefix("file://")), ()
    place = connect(manifest, options)
    file = RemoteFile(PurePosixPath(place.address).name or "table", place, place.path)
    with copies_in(request.folder / folder_for(manifest)) as copies:
        path = copies.root / file.name
        try:
            gone = fetch([measured(file)], copies, show_progress=request.show_progress)
        except RemoteError as error:
            if not (isinstance(error, Unreachable) and path.is_file()):
                raise DataError(
                    f"the table cannot be fetched: {error}", where=place.address, remedy="look at the connection"
                ) from error
            return path, (f"{place.address} cannot be reached ({error}); the copy from before is used",)
    if gone:
        raise DataError("the table does not exist", where=place.address, remedy="correct `manifest`")
    return path, ()
