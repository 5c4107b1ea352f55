"""What is sent in the background never holds up or ends a run, and what was lost is said."""

from __future__ import annotations

import logging
import threading
import time

import pytest

from tuner.builtin.outbox import Outbox

LOG = logging.getLogger("tuner")


def nothing() -> None:
    pass


def finished(outbox: Outbox, seconds: float = 20.0) -> None:
    outbox.end()
    outbox.finish(time.monotonic() + seconds)


def test_messages_arrive_in_order_between_opening_and_closing() -> None:
    seen: list[object] = []
    outbox = Outbox("x", LOG, lambda: seen.append("open"), lambda: seen.append("close"))
    for number in range(50):
        outbox.put(lambda number=number: seen.append(number))  # type: ignore[misc]
    finished(outbox)
    assert seen == ["open", *range(50), "close"]
    assert outbox.lost == 0


def test_one_that_hangs_is_said_once_and_left_at_the_end(caplog: pytest.LogCaptureFixture) -> None:
    release, seen = threading.Event(), []
    outbox = Outbox("report_to slow", LOG, lambda: release.wait(20) and None, lambda: seen.append("close"), limit=3)
    for number in range(10):
        outbox.put(lambda number=number: seen.append(number))  # type: ignore[misc]
    finished(outbox, 0.1)
    told = [record.message for record in caplog.records]
    assert len([line for line in told if "fell behind: 3 messages wait" in line]) == 1
    assert told[-2:] == [
        "report_to slow does not answer: the run ends without it",
        "report_to slow: messages lost: 10; train.jsonl is whole",
    ]
    release.set()
    assert seen == []


def test_one_that_raises_loses_that_message_alone_and_says_it_once(caplog: pytest.LogCaptureFixture) -> None:
    seen: list[int] = []

    def send(number: int) -> None:
        if number % 2:
            raise SystemExit(f"no\nroute {number}")
        seen.append(number)

    outbox = Outbox("report_to flaky", LOG, nothing, nothing)
    for number in range(6):
        outbox.put(lambda number=number: send(number))  # type: ignore[misc]
    finished(outbox)
    assert seen == [0, 2, 4]
    assert [record.message for record in caplog.records] == [
        "report_to flaky failed: no route 1; the run goes on, train.jsonl is whole",
        "report_to flaky: messages lost: 3; train.jsonl is whole",
    ]


def test_one_that_cannot_be_opened_is_not_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    seen: list[int] = []

    def refuse() -> None:
        raise ConnectionError("no network")

    outbox = Outbox("report_to far", LOG, refuse, lambda: seen.append(0))
    for _ in range(4):
        outbox.put(lambda: seen.append(1))
    finished(outbox)
    assert seen == []
    assert "report_to far could not be opened: no network" in caplog.text
    assert "messages lost: 4" in caplog.text
