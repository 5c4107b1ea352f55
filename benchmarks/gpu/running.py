"""Rows, one after the other: each in a process of its own, within a budget, and none takes another with it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

GRACE = 20.0
"""Seconds that a row may go on after the budget; then its process is ended."""


class Skipped(Exception):
    """A row that this machine or this version has nothing for. The text says why."""


@dataclass(frozen=True)
class Row:
    """One thing to measure."""

    name: str
    measure: Callable[..., Mapping[str, Any]]
    """Gives figures by name. At the top of a module: it is called in another process."""
    arguments: tuple[Any, ...] = ()
    needs: float = 8.0
    """Seconds it takes on an H100, about: it is begun where as many are left."""
    against: Mapping[str, str] = field(default_factory=dict)
    """Figure -> the row that this one is ``seconds`` of the other, over its own, times as fast as."""
    goal: Mapping[str, float] = field(default_factory=dict)
    """Figure -> the most that it should be on an H100, or the least if the name is one of ``LEAST``."""


LEAST = frozenset({"captions_per_second", "cosine", "times_bf16", "times_unrouted", "times_full", "times_streaming"})
"""Figures of which more is better."""


@dataclass(frozen=True)
class Result:
    """What a row came to."""

    row: Row
    figures: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    """Why there are no figures, or what is to be known of them."""
    took: float = 0.0
    """seconds in all"""

    @property
    def failed(self) -> bool:
        """Whether something went wrong, time and skipping aside."""
        return self.note.startswith("failed")

    def record(self) -> dict[str, Any]:
        """As JSON has it."""
        goals = {f"goal_{name}": value for name, value in self.row.goal.items()}
        return {"row": self.row.name, **self.figures, **goals, "note": self.note, "took": round(self.took, 1)}


def measured(row: Row) -> Result:
    """``row`` in this process. Whatever goes wrong comes back as a note: the others have their turn all the same."""
    began = time.time()
    try:
        figures, note = dict(row.measure(*row.arguments)), ""
        note = str(figures.pop("note", ""))
    except Skipped as reason:
        figures, note = {}, f"skipped: {reason}"
    except Exception as error:
        figures, note = {}, f"failed: {type(error).__name__}: {error}"
    return Result(row, figures, " ".join(note.split())[:400], time.time() - began)


def alone(row: Row, until: float) -> Result:
    """:func:`measured` in a process of its own, which is ended where it goes on past ``until`` (``time.time``)."""
    began, context = time.time(), get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sending, row))
    process.start()
    sending.close()
    try:
        if receiving.poll(max(0.0, until + GRACE - began)):
            figures, note = receiving.recv()
        else:
            figures, note = {}, "stopped: no time was left"
    except EOFError:  # it died: a fault in a kernel, or no host memory
        process.join()
        figures, note = {}, f"failed: its process ended with exit code {process.exitcode}"
    finally:
        receiving.close()
        process.join(GRACE / 4)
        if process.is_alive():
            process.kill()
            process.join()
    return Result(row, figures, note, time.time() - began)


def _send(connection: Connection, row: Row) -> None:
    result = measured(row)
    connection.send((result.figures, result.note))
    connection.close()


def results(rows: Sequence[Row], until: float, *, isolated: bool = True) -> Iterator[Result]:
    """Each row as it is done, with how it stands to others. A row is left out, and says so, where no time is left."""
    done: dict[str, Result] = {}
    for row in rows:
        if time.time() + row.needs > until:
            result = Result(row, note=f"not run: no time was left (about {row.needs:.0f} s are needed)")
        else:
            result = compared(alone(row, until) if isolated else measured(row), done)
        done[row.name] = result
        yield result


def compared(result: Result, done: Mapping[str, Result]) -> Result:
    """``result`` with how many times as fast it is as the rows that it is held against."""
    own, figures = result.figures.get("seconds"), dict(result.figures)
    for name, other in result.row.against.items():
        seconds = done[other].figures.get("seconds") if other in done else None
        if own and seconds:
            figures[name] = seconds / own
    return Result(result.row, figures, result.note, result.took)


def verdicts(result: Result) -> Iterator[tuple[str, float, float, bool]]:
    """(figure, measured, goal, held) for each goal of which the figure is known."""
    for name, goal in result.row.goal.items():
        if (value := result.figures.get(name)) is not None:
            yield name, value, goal, value >= goal if name in LEAST else value <= goal
