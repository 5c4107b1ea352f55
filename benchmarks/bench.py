"""Exact counts and paired ratios on the CPU, beside their goals.

    make bench
    python benchmarks/bench.py --groups blocks,streaming --pages /tmp

JSON and the page are written after every group. Ratios are of CPU time, the machine being shared by other
work; each is the median of five pairs or more, the two programs in turns.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import shlex
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rows.row import Row

GROUPS = {
    "blocks": "One block, LoRA r16, checkpointed: forward, recompute and backward, counted",
    "streaming": "Streamed blocks, counted",
    "planning": "`tuner plan`",
    "reading": "Files and the cache",
    "starting": "Start and checkpoints",
    "steps": "Whole steps",
}
LIBRARIES = ("torch", "diffusers", "peft", "transformers", "accelerate")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the groups, write their JSON and the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", default=",".join(GROUPS), help="some of " + ", ".join(GROUPS))
    parser.add_argument("--tiny", action="store_true", help="the smallest form of each, which says nothing")
    parser.add_argument("--pages", type=Path, default=Path("docs/benchmarks"), help="folder for cpu.md and cpu.json")
    given = parser.parse_args(arguments)
    wanted = given.groups.split(",")
    if unknown := [name for name in wanted if name not in GROUPS]:
        parser.error(f"no group is called {', '.join(unknown)}; there are {', '.join(GROUPS)}")
    given.pages.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"machine": machine(), "groups": {}, "seconds": {}}
    for name in wanted:
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            rows = importlib.import_module(f"rows.{name}").measure(Path(folder), tiny=given.tiny)
        found["groups"][name] = [{**asdict(row), "met": row.met} for row in rows]
        found["seconds"][name] = round(time.perf_counter() - began, 1)
        (given.pages / "cpu.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        (given.pages / "cpu.md").write_text(written(found), encoding="utf-8")
        print(table(name, rows), flush=True)


def machine() -> dict[str, Any]:
    """Where, when and with what."""
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "command": shlex.join(["python", *sys.argv]),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "load": round(os.getloadavg()[0], 1),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
    }


def written(found: Mapping[str, Any]) -> str:
    """The page."""
    facts = found["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    all_rows = {name: [row_of(each) for each in rows] for name, rows in found["groups"].items()}
    met = [row.met for rows in all_rows.values() for row in rows if row.goal is not None]
    parts = [
        "# Counts and ratios on the CPU",
        "",
        f"{facts['date']}, {facts['machine']}, no GPU, load {facts['load']} at the start: `{facts['command']}`, "
        f"{sum(found['seconds'].values()):.0f} s; {versions}.",
        "",
        "Ratios are medians of pairs in turns (five or more), of CPU time unless they say otherwise: the machine is "
        "shared. Counts are exact. A unit is S * D * 2 bytes.",
        "",
        f"{sum(map(bool, met))} of {len(met)} goals are met. [tried.md](tried.md) says what was tried beside.",
        "",
        *(table(name, rows) for name, rows in all_rows.items()),
    ]
    return "\n".join(parts)


def row_of(written: Mapping[str, Any]) -> Row:
    """A row of the JSON."""
    return Row(**{name: value for name, value in written.items() if name != "met"})


def table(name: str, rows: Sequence[Row]) -> str:
    """A group as Markdown."""
    lines = [f"## {GROUPS[name]}", "", "| row | measured | goal | met | |", "|---|---|---|---|---|"]
    for row in rows:
        unit = f" {row.unit}" if row.unit else ""
        sign = "≤" if row.side == "most" else "≥"
        goal = "" if row.goal is None else f"{sign} {row.goal:g}{unit}"
        verdict = {None: "", True: "yes", False: "**no**"}[row.met]
        lines.append(f"| {row.what} | {row.measured:g}{unit} | {goal} | {verdict} | {row.note} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
