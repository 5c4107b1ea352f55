"""``type: huggingface``: a dataset repository of the Hugging Face hub, in the hub's own cache."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import cast

from tuner.builtin.sources.keys import HubKeys
from tuner.builtin.sources.mirror import found_at
from tuner.builtin.sources.rows import Gathered, listing_of
from tuner.builtin.sources.tables import KINDS
from tuner.data.source import Listing, Request
from tuner.errors import ConfigError
from tuner.plugin import PluginConfig

TABLES = tuple(suffix for suffix in KINDS if suffix != ".json")
"""Suffixes of tables; JSON files of a repository are about it more often than its content."""
SPLITS = ("train", "training", "validation", "valid", "val", "dev", "test", "testing", "eval", "evaluation")
"""What splits are called, for an error."""


class HubSource:
    """Files of a dataset repository: as they are, as its tables name them, or out of its Parquet files."""

    keys: type[PluginConfig] = HubKeys

    def listing(self, request: Request) -> Listing:
        """The files, downloaded, with the captions that tables have. Raises ConfigError or DataError."""
        from tuner.builtin.sources.hub_download import download
        from tuner.builtin.sources.hub_tables import gather_tables

        keys = cast("HubKeys", request.keys)
        suffixes = [*request.suffixes, ".txt", *TABLES]
        folder, notes = download(keys, suffixes, show_progress=request.show_progress)
        everything = _names(folder)
        names = in_split(everything, keys)
        tables = [name for name in names if PurePosixPath(name).suffix.lower() in TABLES]
        media = [name for name in names if PurePosixPath(name).suffix.lower() in request.suffixes]
        gathered, said = gather_tables(folder, tables, set(everything), set(names), request)
        if gathered.found:
            left = len({str(folder / name) for name in media} - set(gathered.found))
            said += [f"files that no table names, left out: {left}"] if left else []
        else:
            _take_all(folder, media, gathered)
        listing = listing_of(
            gathered,
            folder,
            request,
            keys.dataset_name,
            remedy="correct dataset_type, split, allow_patterns or the columns",
        )
        return Listing(listing.root, listing.files, listing.captions, (*notes, *said, *listing.notes))


def _names(folder: Path) -> list[str]:
    """Every file below a snapshot that is not hidden, relative and sorted."""
    found = []
    for here, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        inner = Path(here).relative_to(folder)
        found += [(inner / name).as_posix() for name in files if not name.startswith(".")]
    return sorted(found)


def in_split(names: Sequence[str], keys: HubKeys) -> list[str]:
    """The names that belong to the wanted split, and tables called ``metadata``, which may be about any.

    A name belongs to a split when it has the split's name as a word of its own, as the hub's own rule is.
    Raises ConfigError when none does.
    """
    if keys.split is None:
        return list(names)
    found = [name for name in names if _has_word(name, keys.split)]
    if not found:
        there = [split for split in SPLITS if any(_has_word(name, split) for name in names)]
        raise ConfigError(
            f"no file of {keys.dataset_name} belongs to the split {keys.split!r}",
            allowed=there or "no split: the repository has none, leave the key out",
        )
    return sorted({*found, *(name for name in names if PurePosixPath(name).stem == "metadata")})


def _has_word(name: str, word: str) -> bool:
    return re.search(rf"(?<![A-Za-z]){re.escape(word)}(?![A-Za-z])", name) is not None


def _take_all(folder: Path, media: Iterable[str], gathered: Gathered) -> None:
    base = os.path.abspath(folder)  # noqa: PTH100
    for name in media:
        gathered.add(found_at(os.path.join(base, *name.split("/"))), ())  # noqa: PTH118
