"""The local log: one JSON line per logged step, exact across resumes.

After a resume at step s the lines beyond s are dropped and written anew, so that no step stands twice
and none is missing. But for times, throughput and memory the lines of an interrupted and of an
undisturbed run are equal.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tuner.files import atomic_write_text

NAME = "train.jsonl"


class StepLog:
    """Appends to ``output_dir/train.jsonl``."""

    def __init__(self, output_dir: Path, *, resumed_at: int) -> None:
        self.path = output_dir / NAME
        kept = [line for step, line in _lines(self.path) if step <= resumed_at]
        atomic_write_text(self.path, "".join(kept))
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, line: Mapping[str, Any]) -> None:
        """Append one line and hand it to the operating system, so that a killed process loses none."""
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(step, line) of every whole line; a last line that a kill cut short is left out."""
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            step = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):
            continue
        if line.endswith("\n"):
            yield step, line
