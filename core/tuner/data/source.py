"""What a source of files is: the registry behind an entry's ``type``. ``local`` is always there."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from tuner.plugin import PluginConfig


class Found(NamedTuple):
    """A file, and what it is known by: while all three are the same, so is its content."""

    path: str
    """absolute; text and not a Path, because there may be a hundred thousand of them"""
    size: int
    """bytes"""
    mtime_ns: int


@dataclass(frozen=True)
class Listing:
    """The files of a dataset, all of them on this machine."""

    root: Path
    """what the names of the files are relative to"""
    files: Sequence[Found]
    """sorted by path"""
    captions: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """by path, where the source knows them: alternatives, at least one"""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Request:
    """What a source is asked for."""

    dataset_id: str
    entry: Mapping[str, Any]
    """the common keys of the entry, such as ``instance_data_dir``"""
    keys: PluginConfig
    """the source's own keys: an instance of :attr:`Source.keys`"""
    suffixes: Collection[str]
    """which files are wanted, such as ``.mp4``; lower case"""
    folder: Path
    """where copies may be kept; the source makes what is missing, and fetches nothing twice"""
    show_progress: bool = True


class Source(Protocol):
    """Where files come from. Offered through the hook ``data_sources`` under the name that ``type`` gives."""

    @property
    def keys(self) -> type[PluginConfig]:
        """What an entry of this type may say beside the common keys."""

    def listing(self, request: Request) -> Listing:
        """The files, fetched where they are elsewhere. Raises ConfigError or DataError."""
