"""The sources of this plugin by the value of an entry's ``type``; each is imported when something is asked of it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from importlib import import_module
from typing import cast

from tuner.data.source import Listing, Request, Source
from tuner.plugin import PluginConfig


class Later:
    """A source that is in a module of its own."""

    def __init__(self, module: str, name: str, *arguments: str) -> None:
        """The source is ``name(*arguments)`` of ``tuner.builtin.sources.<module>``."""
        self._module, self._name, self._arguments = module, name, arguments

    @cached_property
    def _source(self) -> Source:
        kind = getattr(import_module(f"tuner.builtin.sources.{self._module}"), self._name)
        return cast("Source", kind(*self._arguments))

    @property
    def keys(self) -> type[PluginConfig]:
        """See :class:`tuner.data.source.Source`."""
        return self._source.keys

    def listing(self, request: Request) -> Listing:
        """See :class:`tuner.data.source.Source`."""
        return self._source.listing(request)


SOURCES: Mapping[str, Source] = {
    "fsspec": Later("remote", "AddressSource"),
    "aws": Later("remote", "BucketSource"),
    "huggingface": Later("hub", "HubSource"),
    "csv": Later("table_source", "TableSource", "csv"),
    "jsonl": Later("table_source", "TableSource", "jsonl"),
    "parquet": Later("table_source", "TableSource", "parquet"),
    "manifest": Later("table_source", "TableSource"),
}
