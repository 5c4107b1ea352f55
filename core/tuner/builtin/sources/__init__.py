"""Places that the files of a dataset may come from beside a local folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from tuner.hookspecs import hookimpl
from tuner.plugin import Plugin, PluginConfig

if TYPE_CHECKING:
    from tuner.data.source import Source
    from tuner.run import Run


class SourcesPlugin(Plugin[PluginConfig]):
    """Datasets from addresses (fsspec), S3 buckets, Hugging Face repositories, and CSV, JSONL or Parquet tables."""

    @hookimpl
    def data_sources(self, run: Run) -> Mapping[str, Source]:
        """Sources by the value of an entry's ``type``."""
        from tuner.builtin.sources.registry import SOURCES

        return SOURCES
