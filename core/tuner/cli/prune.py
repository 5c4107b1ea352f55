"""What ``tuner cache --prune`` removes: the files of a cache that no dataset uses, and just those.

Only what has the name of an entry, in the place of an entry, is ever looked at; everything else is somebody's.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tuner import pipeline
from tuner.assembly import settle
from tuner.builtin.encoding.encodings import entries_in_use, entry_keys
from tuner.builtin.encoding.store import PACKED_SUFFIX, SUFFIX, Store
from tuner.files import TEMPORARY
from tuner.train.engine import Engine

if TYPE_CHECKING:
    from tuner.assembly import Assembly
    from tuner.model import Model

STALE = 24 * 3600
"""Seconds after which a half-written entry belongs to no process that is still alive."""
_ENTRY = re.compile(rf"([0-9a-f]{{64}})({re.escape(SUFFIX)}|{re.escape(PACKED_SUFFIX)})")
_PARTIAL = re.compile(rf"{re.escape(TEMPORARY)}\d+-(.+)")


@dataclass(frozen=True)
class Unused:
    """What may be removed from one or several stores."""

    files: Mapping[Path, int]
    """bytes of each file: entries that are not in use, and half-written ones that were left behind"""
    kept: Mapping[Path, int]
    """by root of the store: entries that are in use"""

    @property
    def size(self) -> int:
        """Bytes of all of them."""
        return sum(self.files.values())


def unused_entries(assembly: Assembly) -> Unused:
    """The entries in this config's cache folders that no clip and no caption of it uses, as encoded on this machine."""
    assembly = settle(assembly)
    found = pipeline.survey(assembly)
    Engine(found.run)
    model: Model = assembly.manager.hook.load_model(run=found.run)
    keys = entry_keys(model, found.prepared, pipeline.extra_captions(assembly, found.run))
    return find_unused(entries_in_use(found.prepared, keys))


def find_unused(used: Mapping[Path, Collection[str]], *, now: float | None = None) -> Unused:
    """Look through stores; nothing is opened.

    Arguments
        used: the keys that are in use by root of the store.
        now: seconds since 1970; the clock's when None.
    """
    now = time.time() if now is None else now
    files: dict[Path, int] = {}
    kept = dict.fromkeys(used, 0)
    for root, keys in used.items():
        for path, status in _entries(root):
            partial, entry = _PARTIAL.fullmatch(path.name), _ENTRY.fullmatch(path.name)
            if partial is not None:
                if now - status.st_mtime > STALE:
                    files[path] = status.st_size
            elif entry is not None and entry[1] in keys:
                kept[root] += 1
            else:
                files[path] = status.st_size
    return Unused(files, kept)


def remove(unused: Unused) -> None:
    """Remove these files, and what their stores remember of them."""
    for path in unused.files:
        path.unlink(missing_ok=True)
    for root in unused.kept:
        names = [_ENTRY.fullmatch(path.name) for path in unused.files if path.parent.parent == root]
        Store(root).stamps.forget([name[1] for name in names if name is not None])


def _entries(root: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Files that are entries, or half-written ones, by name and place; links are left alone."""
    for folder in sorted(root.glob("[0-9a-f][0-9a-f]")):
        if folder.is_symlink() or not folder.is_dir():
            continue
        with os.scandir(folder) as found:
            for each in sorted(found, key=lambda entry: entry.name):
                partial = _PARTIAL.fullmatch(each.name)
                name = _ENTRY.fullmatch(partial[1] if partial else each.name)
                if name and name[1].startswith(folder.name) and each.is_file(follow_symlinks=False):
                    yield Path(each.path), each.stat(follow_symlinks=False)
