"""How far a run is: a bar in a terminal of any and of changing size, plain lines elsewhere."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest

BAR = """
import sys
from tuner.builtin.status.progress import TrainProgress
progress = TrainProgress(2, 9)
for done in range(3, 10):
    print("next", file=sys.__stdout__, flush=True)
    sys.stdin.readline()
    progress.update(done, 0.5, 1e-4)
progress.close()
"""
CODES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


class Terminal:
    """The script with its standard error on a terminal; steps are taken one at a time."""

    def __init__(self, columns: int, **environment: str) -> None:
        self.parent, child = pty.openpty()
        self.resize(columns)
        kept = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
        self.process = subprocess.Popen(
            [sys.executable, "-c", BAR],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=child,
            env={**kept, "TERM": "xterm", **environment},
            text=True,
        )
        os.close(child)

    def resize(self, columns: int) -> None:
        fcntl.ioctl(self.parent, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))

    def step(self) -> str:
        """Let one step be done; what was written since the last one, as a person reads it."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdout.readline()
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        time.sleep(0.3)  # the bar is drawn ten times a second
        return self.written()

    def written(self) -> str:
        found = b""
        os.set_blocking(self.parent, False)
        with suppress(BlockingIOError, OSError):
            while part := os.read(self.parent, 65536):
                found += part
        return CODES.sub("", found.decode()).replace("\r", "\n")  # what a bar is drawn over begins at the margin


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    made = Terminal(110)
    yield made
    made.process.kill()
    made.process.wait()
    os.close(made.parent)


def test_the_bar_follows_the_terminal_when_it_is_resized(terminal: Terminal) -> None:
    terminal.step()
    wide = terminal.step()
    assert re.search(r"training .*4/9 .* left \d:\d\d:\d\d loss 0.5000  lr 1.00e-04", wide)
    terminal.resize(60)
    terminal.step()
    narrow = terminal.step()
    assert "6/9" in narrow
    assert max(map(len, narrow.splitlines())) <= 60
    terminal.resize(130)
    assert re.search(r"7/9 .* lr 1.00e-04", terminal.step())
    for _ in range(2):
        last = terminal.step()
    assert "9/9" in last
    assert terminal.process.wait(20) == 0


def test_where_there_is_no_terminal_there_are_plain_lines() -> None:
    done = subprocess.run([sys.executable, "-c", BAR], input="\n" * 7, capture_output=True, text=True, check=True)
    assert re.fullmatch(r"step 9/9  loss 0\.5000  lr 1\.00e-04  0 s left\n", done.stderr)


def test_a_terminal_that_knows_no_codes_gets_plain_lines() -> None:
    made = Terminal(80, TERM="dumb")
    for _ in range(7):
        last = made.step()
    assert made.process.wait(20) == 0
    assert "step 9/9  loss 0.5000" in last + made.written()
    os.close(made.parent)
