"""How far the run is: a bar with ETA in a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time

from tuner.console import console

LINE_EVERY = 15.0
"""Seconds between plain lines."""
SPEED_OVER = 3600.0
"""Seconds that the time left is estimated from: a step of a video model may take minutes."""


class TrainProgress:
    """Shows steps, loss, learning rate and the time that is left."""

    def __init__(self, done: int, total: int) -> None:
        self.start, self.total = done, total
        self.began = self.shown = time.monotonic()
        self._bar = self._task = None
        if console().is_terminal and not console().is_dumb_terminal:
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                Progress,
                TextColumn,
                TimeElapsedColumn,
                TimeRemainingColumn,
            )

            self._bar = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=console(),
                speed_estimate_period=SPEED_OVER,
            )
            self._task = self._bar.add_task("training", total=total, completed=done, note="")
            self._bar.start()

    def update(self, done: int, loss: float, rate: float) -> None:
        """Show that ``done`` steps are over."""
        note = f"loss {loss:.4f}  lr {rate:.2e}"
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, note=note)
            return
        now = time.monotonic()
        if now - self.shown >= LINE_EVERY or done == self.total:
            self.shown = now
            left = (now - self.began) / max(1, done - self.start) * (self.total - done)
            print(f"step {done}/{self.total}  {note}  {left:.0f} s left", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
