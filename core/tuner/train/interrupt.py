"""Stopping a run kindly: the first SIGINT or SIGTERM finishes the step, saves and leaves; the second leaves now."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupt:
    """Whether someone asked the run to stop."""

    def __init__(self) -> None:
        self.requested: str | None = None

    def handle(self, number: int, _frame: FrameType | None) -> None:
        """Signal handler."""
        if self.requested is not None:
            raise KeyboardInterrupt
        self.requested = signal.Signals(number).name


@contextmanager
def watch() -> Iterator[Interrupt]:
    """Listen for SIGINT and SIGTERM; the former handlers are back afterwards."""
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt  # signals reach the main thread only
        return
    former: dict[signal.Signals, Any] = {each: signal.signal(each, interrupt.handle) for each in SIGNALS}
    try:
        yield interrupt
    finally:
        for each, handler in former.items():
            signal.signal(each, handler)
