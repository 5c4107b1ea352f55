"""The data report: for each dataset what is kept, what is left out and why, and the buckets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from tuner.data.samples import Bucket


@dataclass(frozen=True)
class Dropped:
    """A file that is not trained on."""

    dataset_id: str
    path: Path
    reason: str
    """the kind of reason, such as ``too short``"""
    detail: str = ""
    """this file's own numbers or error"""


@dataclass(frozen=True)
class DatasetReport:
    """What became of one dataset."""

    dataset_id: str
    folder: Path
    kept: int
    repeats: int
    buckets: tuple[tuple[Bucket, int], ...]
    """each bucket with its number of clips"""
    dropped: tuple[Dropped, ...]
    notes: tuple[str, ...] = ()
    held_out: bool = False
    """whether its samples are never trained on"""

    @property
    def reasons(self) -> dict[str, int]:
        """Number of files left out for each reason, most frequent first."""
        return dict(Counter(each.reason for each in self.dropped).most_common())


@dataclass(frozen=True)
class DataReport:
    """What became of all datasets."""

    datasets: tuple[DatasetReport, ...]
    notes: tuple[str, ...] = ()

    @property
    def kept(self) -> int:
        """Clips in use."""
        return sum(each.kept for each in self.datasets)

    def without(self, failures: Iterable[tuple[Dropped, Bucket]]) -> DataReport:
        """The report after these kept clips had to be left out as well."""
        failures = list(failures)
        return replace(self, datasets=tuple(_without(each, failures) for each in self.datasets))


def _without(dataset: DatasetReport, failures: list[tuple[Dropped, Bucket]]) -> DatasetReport:
    own = [(dropped, bucket) for dropped, bucket in failures if dropped.dataset_id == dataset.dataset_id]
    counts = Counter(dict(dataset.buckets))
    counts.subtract(bucket for _, bucket in own)
    return replace(
        dataset,
        kept=dataset.kept - len(own),
        buckets=tuple(sorted((bucket, count) for bucket, count in counts.items() if count)),
        dropped=dataset.dropped + tuple(dropped for dropped, _ in own),
    )


def summary(reasons: dict[str, int]) -> str:
    """``3 too short, 1 cannot be decoded``; ``-`` when nothing was left out."""
    return ", ".join(f"{count} {reason}" for reason, count in reasons.items()) or "-"
