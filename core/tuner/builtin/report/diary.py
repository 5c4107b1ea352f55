"""What happened in a run beside its numbers, kept in ``output_dir/report/``: facts, and events a line each."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tuner.files import atomic_write_text
from tuner.train.checkpoint import without_secrets

FOLDER = "report"
EVENTS = "events.jsonl"
FACTS = "run.json"
MOST_WARNINGS = 500
"""Warnings that one start of a run writes down; the screen has them all."""
LONGEST = 500
"""Letters of an event's text."""


class Diary:
    """Appends events. A line is handed to the system at once, so that a killed process loses none."""

    def __init__(self, output_dir: Path) -> None:
        self._path = output_dir / FOLDER / EVENTS
        self._warnings = 0
        self._last = ""

    def write(self, kind: str, text: str, **more: Any) -> dict[str, Any]:
        """Append an event of ``kind`` (start, resume, checkpoint, validation, warning, stop, error, end); returns it.

        Logins in addresses are left out of ``text``.
        """
        plain: str = without_secrets({"text": text})["text"]
        event = {"time": round(time.time(), 1), "kind": kind, "text": plain[:LONGEST], **more}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(event, ensure_ascii=False) + "\n")
        return event

    def warning(self, text: str) -> dict[str, Any] | None:
        """Append a warning, unless it repeats the one before it or there were very many."""
        if text == self._last or self._warnings >= MOST_WARNINGS:
            return None
        self._last, self._warnings = text, self._warnings + 1
        return self.write("warning", text)


def write_facts(output_dir: Path, facts: Mapping[str, Any]) -> None:
    """Keep what the page says of the run as a whole, at once or not at all."""
    atomic_write_text(output_dir / FOLDER / FACTS, json.dumps(facts, indent=1, ensure_ascii=False, default=str) + "\n")


def read_facts(output_dir: Path) -> dict[str, Any]:
    """What was kept; without it what the newest checkpoint's manifest says, or nothing."""
    facts = _read(output_dir / FOLDER / FACTS)
    if facts:
        return facts
    steps = {path: path.parent.name.rpartition("-")[2] for path in output_dir.glob("checkpoint-*/manifest.json")}
    found = [path for path, step in steps.items() if step.isdigit()]
    if not found:
        return {}
    manifest = _read(max(found, key=lambda path: int(steps[path])))
    taken = ("config", "model", "total_steps", "packages", "plugins", "tuner")
    return {name: manifest[name] for name in taken if name in manifest}


def read_events(output_dir: Path) -> Iterator[dict[str, Any]]:
    """Every whole line; one that a kill cut short is passed over."""
    return read_lines(output_dir / FOLDER / EVENTS)


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON-lines file, one at a time; nothing where there is no file."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                found = json.loads(line)
            except ValueError:
                continue
            if isinstance(found, dict) and line.endswith("\n"):
                yield found


def newest(events: Iterator[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """The last ``most`` of them, in their order."""
    return list(deque(events, maxlen=most))


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
