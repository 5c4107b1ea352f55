"""The data report: for each dataset what is kept, what is left out and why, and the buckets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tuner.data.samples import Bucket

LISTED = 20
"""Files named on screen for each reason; more are counted."""


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


def show_report(report: DataReport, console: Console | None = None) -> None:
    """Print the table of datasets, the notes, and the files that were left out."""
    console = console or Console()
    table = Table(title="data", title_justify="left")
    table.add_column("dataset")
    table.add_column("kept", justify="right")
    table.add_column("left out")
    table.add_column("buckets (clips)")
    for dataset in report.datasets:
        buckets = "\n".join(f"{bucket} ({count})" for bucket, count in dataset.buckets)
        kept = f"{dataset.kept} x {dataset.repeats + 1}" if dataset.repeats else str(dataset.kept)
        table.add_row(Text(dataset.dataset_id), kept, summary(dataset.reasons), buckets)
    console.print(table) if console.is_terminal else _plain(report, console)
    for line in lines(report):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _plain(report: DataReport, console: Console) -> None:
    """The table as lines, for log files."""
    for each in report.datasets:
        buckets = "; ".join(f"{bucket} ({count})" for bucket, count in each.buckets)
        line = f"dataset {each.dataset_id}: {each.kept} kept, left out: {summary(each.reasons)}, buckets: {buckets}"
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def lines(report: DataReport) -> list[str]:
    """Notes and left-out files, one line each."""
    out = list(report.notes)
    for dataset in report.datasets:
        out += [f"{dataset.dataset_id}: {note}" for note in dataset.notes]
        for reason, count in dataset.reasons.items():
            files = [each for each in dataset.dropped if each.reason == reason]
            out += [f"{dataset.dataset_id}: {reason}: {_named(each)}" for each in files[:LISTED]]
            if count > LISTED:
                out.append(f"{dataset.dataset_id}: {reason}: and {count - LISTED} more")
    return out


def _named(dropped: Dropped) -> str:
    return f"{dropped.path} ({dropped.detail})" if dropped.detail else str(dropped.path)
