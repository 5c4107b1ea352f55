"""The local log of a run, for tests that compare runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CLOCK = ("seconds", "peak_memory_bytes", "_per_second", "/mfu", "/times_floor")
"""Ends of the names of times, throughput and memory: all else is equal in an interrupted and an undisturbed run."""


def timeless(line: dict[str, Any]) -> dict[str, Any]:
    """A line without what depends on the clock and on the machine."""
    return {name: value for name, value in line.items() if not name.endswith(CLOCK)}


def timeless_lines(output_dir: Path) -> list[dict[str, Any]]:
    """Every line of a run's log without that."""
    lines = (output_dir / "train.jsonl").read_text(encoding="utf-8").splitlines()
    return [timeless(json.loads(line)) for line in lines]
