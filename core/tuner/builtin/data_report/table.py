"""The data report on the screen: a table, the notes, and the files that are left out."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tuner.data.report import DataReport, DatasetReport, Dropped, summary

LISTED = 20
"""Files named on screen for each reason; more are counted."""


def show_report(report: DataReport, console: Console | None = None) -> None:
    """Print the table of datasets, the notes, and the files that were left out; plain lines without a terminal."""
    console = console or Console()
    if console.is_terminal:
        console.print(_table(report))
    for line in [*([] if console.is_terminal else _plain(report)), *lines(report)]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _table(report: DataReport) -> Table:
    table = Table(title="data", title_justify="left")
    table.add_column("dataset")
    table.add_column("used", justify="right")
    table.add_column("left out")
    table.add_column("buckets (samples)")
    for dataset in report.datasets:
        buckets = "\n".join(f"{bucket} ({count})" for bucket, count in dataset.buckets)
        table.add_row(Text(dataset.dataset_id), used(dataset), summary(dataset.reasons), buckets)
    return table


def used(dataset: DatasetReport) -> str:
    """How many samples an epoch shows, as a person would say it."""
    if dataset.held_out:
        return f"{dataset.kept} held out"
    return f"{dataset.kept} x {dataset.repeats + 1}" if dataset.repeats else str(dataset.kept)


def _plain(report: DataReport) -> list[str]:
    """The table as lines, for log files."""
    return [
        f"dataset {each.dataset_id}: {used(each)}{'' if each.held_out else ' kept'}, "
        f"left out: {summary(each.reasons)}, "
        f"buckets: {'; '.join(f'{bucket} ({count})' for bucket, count in each.buckets)}"
        for each in report.datasets
    ]


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
