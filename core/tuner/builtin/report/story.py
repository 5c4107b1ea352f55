"""All that the page shows of a run: taken line by line while it goes, or from its files afterwards."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tuner.builtin.report.curves import Curves, finite
from tuner.builtin.report.diary import newest, read_events, read_facts, read_lines
from tuner.builtin.report.media import Media
from tuner.train.log import NAME as LOG

MOST_EVENTS = 400
"""Newest events that the page lists."""
DATA_REPORT = "data_report.html"
MEMORY = "memory.json"
ENDS = {"start": "running", "resume": "running", "end": "finished", "stop": "stopped", "error": "failed"}
"""What an event makes of the run's state."""


class Story:
    """One run as far as it is known."""

    def __init__(self, output_dir: Path) -> None:
        self.output_dir = output_dir
        self.facts: dict[str, Any] = {}
        self.curves = Curves()
        self.media = Media(output_dir)
        self.events: list[dict[str, Any]] = []
        self.state = "unknown"

    @classmethod
    def read(cls, output_dir: Path, *, up_to: int | None = None) -> Story:
        """From the files of an output folder.

        Arguments
            up_to: the last step to take from the log; all when None.
        """
        story = cls(output_dir)
        story.facts = read_facts(output_dir)
        for line in read_lines(output_dir / LOG):
            step = line.get("step")
            if up_to is None or (finite(step) and step <= up_to):  # type: ignore[operator]
                story.curves.add(line)
        story.media.scan()
        for event in newest(read_events(output_dir), MOST_EVENTS):
            story.tell(event)
        return story

    def tell(self, event: Mapping[str, Any]) -> None:
        """Take an event; the files of a validation are looked at where they are."""
        kind = str(event.get("kind", ""))
        self.state = ENDS.get(kind, self.state)
        self.events = [*self.events[-MOST_EVENTS + 1 :], dict(event)]
        if files := event.get("media"):
            self.media.add(int(event.get("step", 0)), [self.output_dir / str(path) for path in files])

    def files(self) -> frozenset[str]:
        """Paths from the output folder that the page links to: no others need be readable for it."""
        report = {DATA_REPORT} if (self.output_dir / DATA_REPORT).is_file() else set()
        return self.media.files() | report

    def as_json(self) -> dict[str, Any]:
        """What the page's script draws."""
        return {
            "name": self.output_dir.resolve().name,
            "written": round(time.time(), 1),
            "state": self.state,
            "log_written": _changed(self.output_dir / LOG),
            "facts": self.facts,
            "latest": {name: value for name, value in self.curves.latest.items() if finite(value)},
            "seconds": round(self.curves.seconds, 1),
            "curves": {name: curve.as_json() for name, curve in self.curves.by_name.items()},
            "not_drawn": len(self.curves.unread),
            "media": self.media.as_json(),
            "events": self.events,
            "memory": _memory(self.output_dir / MEMORY),
            "data_report": f"../{DATA_REPORT}" if (self.output_dir / DATA_REPORT).is_file() else None,
        }


def _memory(path: Path) -> dict[str, Any] | None:
    """Device memory by component, as the planner left it; None where it left nothing that can be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        parts = {str(name): float(size) for name, size in found["predicted"].items()}
        measured = found["measured"]
        return {"predicted": parts, "measured": None if measured is None else float(measured)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _changed(path: Path) -> float | None:
    """When a file was last written, in seconds since 1970; None where there is none."""
    try:
        return round(path.stat().st_mtime, 1)
    except OSError:
        return None
