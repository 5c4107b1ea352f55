"""Progress of long work: a bar with the time left on a terminal, a line now and then in a log file."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tuner.console import console

if TYPE_CHECKING:
    from rich.console import Console

log = logging.getLogger("tuner")

QUIET_SECONDS = 2.0
"""Work shorter than this shows nothing."""
LINE_SECONDS = 30.0
"""Time between lines where there is no terminal."""


@contextmanager
def progress(description: str, total: int, *, show: bool = True) -> Iterator[Callable[[int], None]]:
    """Yield ``advance(n)``, to be called as items are done. Nothing is shown for work of less than two seconds.

    Arguments
        description: what is being done, such as ``encoding clips``.
        total: items in all.
        show: False in processes that must stay quiet.
    """
    screen = console()
    if not show or total == 0:
        yield lambda _: None
    elif screen.is_terminal:
        yield from _bar(screen, description, total)
    else:
        yield from _lines(description, total)


def _bar(screen: Console, description: str, total: int) -> Iterator[Callable[[int], None]]:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    bar = Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=screen)
    task = bar.add_task(description, total=total)
    began = time.monotonic()

    def advance(count: int) -> None:
        bar.advance(task, count)
        if not bar.live.is_started and time.monotonic() - began > QUIET_SECONDS:
            bar.start()

    try:
        yield advance
    finally:
        if bar.live.is_started:
            bar.stop()


def _lines(description: str, total: int) -> Iterator[Callable[[int], None]]:
    began = said = time.monotonic()
    done = 0

    def advance(count: int) -> None:
        nonlocal done, said
        done += count
        now = time.monotonic()
        if now - said > LINE_SECONDS:
            said = now
            log.info("%s: %d of %d, about %d s left", description, done, total, (now - began) / done * (total - done))

    yield advance
