"""Calls to one service outside the run, made in a thread of its own: the run never waits for them.

One thread for each service, so that one that hangs holds up no other; one at a time and in order, as some libraries
keep what is open by thread.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence

LIMIT = 1000
"""Messages that wait at most."""
PATIENCE = 30.0
"""Seconds that the end of a run waits for what is still on its way."""

Call = Callable[[], None]


class Outbox:
    """Messages to one service. What is wrong with it is said once, and how many were lost at the end."""

    def __init__(self, name: str, log: logging.Logger, opening: Call, closing: Call, *, limit: int = LIMIT) -> None:
        """Begin.

        Arguments
            name: what messages call the service, such as ``report_to wandb``.
            opening: the first call; where it fails, nothing else is tried.
            closing: the last one.
            limit: messages that wait at most.
        """
        self.name, self.lost = name, 0
        self._log, self._opening, self._closing = log, opening, closing
        self._limit = limit
        self._waiting: queue.SimpleQueue[Call | None] = queue.SimpleQueue()
        self._said = self._shut = False
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def put(self, call: Call) -> None:
        """Have it called soon; it is lost where the service is too slow or could not be opened."""
        if self._shut:
            self.lost += 1
        elif self._waiting.qsize() < self._limit:
            self._waiting.put(call)
        else:
            self._lose(f"fell behind: {self._limit} messages wait, and new ones are dropped")

    def end(self) -> None:
        """Nothing more will come: it closes when all is sent."""
        self._waiting.put(None)

    def finish(self, until: float) -> None:
        """Wait until it has closed, at the longest until the clock ``time.monotonic`` shows ``until``."""
        self._thread.join(max(0.0, until - time.monotonic()))
        lost = self.lost
        if self._thread.is_alive():
            lost += max(0, self._waiting.qsize() - 1)  # the end itself is no message
            self._log.warning("%s does not answer: the run ends without it", self.name)
        if lost:
            self._log.warning("%s: messages lost: %d; train.jsonl is whole", self.name, lost)

    def _work(self) -> None:
        try:
            self._opening()
        except BaseException as error:  # libraries of trackers also exit
            self._shut = True
            self._lose(f"could not be opened: {_said(error)}", messages=0)
        while (call := self._waiting.get()) is not None:
            self._call(call)
        if not self._shut:
            self._call(self._closing)

    def _call(self, call: Call) -> None:
        if self._shut:
            self.lost += 1
            return
        try:
            call()
        except BaseException as error:
            self._lose(f"failed: {_said(error)}")

    def _lose(self, why: str, messages: int = 1) -> None:
        self.lost += messages
        if not self._said:
            self._said = True
            self._log.warning("%s %s; the run goes on, train.jsonl is whole", self.name, why)


def finish(outboxes: Sequence[Outbox], *, at_once: bool) -> None:
    """Wait for all of them together, as long as :data:`PATIENCE`, or not at all."""
    for outbox in outboxes:
        outbox.end()
    until = time.monotonic() + (0.0 if at_once else PATIENCE)
    for outbox in outboxes:
        outbox.finish(until)


def _said(error: BaseException) -> str:
    """An error on one line."""
    return " ".join(str(error).split()) or type(error).__name__
