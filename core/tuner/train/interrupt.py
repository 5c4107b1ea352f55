"""Stopping a run kindly: the first SIGINT or SIGTERM finishes the step, saves and leaves; the second leaves now."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from tuner import processes

SIGNALS = (signal.SIGINT, signal.SIGTERM)
FORWARDED = 5.0
"""Seconds in which a second signal to one of several processes is the first one again, sent on by the launcher."""


class Interrupt:
    """Whether someone asked the run to stop."""

    def __init__(self) -> None:
        self.requested: str | None = None
        self._since = 0.0

    def handle(self, number: int, _frame: FrameType | None) -> None:
        """Signal handler."""
        now = time.monotonic()
        if self.requested is None:
            self.requested, self._since = signal.Signals(number).name, now
        elif processes.launched()[1] == 1 or now - self._since > FORWARDED:
            raise KeyboardInterrupt


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
