"""The sources of this plugin by the value of an entry's ``type``."""

from __future__ import annotations

from collections.abc import Mapping

from tuner.builtin.sources.hub import HubSource
from tuner.builtin.sources.remote import AddressSource, BucketSource
from tuner.builtin.sources.table_source import TableSource
from tuner.data.source import Source

SOURCES: Mapping[str, Source] = {
    "fsspec": AddressSource(),
    "aws": BucketSource(),
    "huggingface": HubSource(),
    "csv": TableSource("csv"),
    "jsonl": TableSource("jsonl"),
    "parquet": TableSource("parquet"),
    "manifest": TableSource(),
}
