"""What a ``validate`` hook answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Validation:
    """Numbers and files a validation made."""

    metrics: Mapping[str, float] = field(default_factory=dict)
    """Reported as ``plugin/key``."""
    media: Sequence[Path] = ()
    """Videos and pictures, inside the run's output folder."""
    of_weights: bool = True
    """Whether it depends on the weights in place; otherwise its metrics have no ``@name`` of other weights."""
