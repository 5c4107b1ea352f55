"""Entries of a list of datasets, for tests: what one does not care about has a value that does nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from tuner.builtin.datasets.entries import Trained

E = TypeVar("E", bound=Trained)


def make_entry(kind: type[E], **values: Any) -> E:
    """An entry of ``kind`` with the id ``d``; ``values`` stand above what is filled in."""
    filled: dict[str, Any] = {
        "id": "d",
        "cache_dir_vae": Path("cache"),
        "resolution": 64,
        "resolution_type": "pixel",
        "minimum_image_size": 0,
        "aspect_bucket_rounding": 2,
        "aspect_bucket_alignment": None,
    }
    return kind(**(filled | values))
