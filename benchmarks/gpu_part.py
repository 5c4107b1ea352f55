"""One part of ``make gpu``: rows on this machine's CUDA device, as JSON lines, and a page of them.

    python benchmarks/gpu_part.py ceilings --pages docs/benchmarks
    python benchmarks/gpu_part.py 14b --smoke          the same code at tiny sizes, in this process, on any machine

Parts: ceilings, 1.3b, 14b, memory, encode. Each row is printed as JSON and appended to ``gpu-PART.jsonl`` when it is
done, and ``gpu-PART.md`` is written anew, so that a run that is cut off keeps its rows. ``ceilings`` also writes
``gpu-ceilings.json``, for ``tuner plan``.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import re
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

from gpu.running import Result, results, verdicts
from gpu_page import NONE, device, header, write

PARTS = {
    "ceilings": ("gpu.ceilings", "What the GPU can do at Wan's shapes"),
    "1.3b": ("gpu.small", "Wan 1.3B: a training step"),
    "14b": ("gpu.large", "Wan 14B: a training step"),
    "memory": ("gpu.memory", "Memory, lever by lever"),
    "encode": ("gpu.encode", "Encoding clips and captions"),
}
BUDGET = 450.0
PACKAGES = ("torch", "triton", "diffusers", "peft", "transformers", "accelerate", "numpy")


def versions() -> dict[str, str]:
    """Of Python and of what the figures may depend on, as far as it is installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def shown(value: Any) -> str:
    """A figure in a table: four digits are more than a second measurement will agree on."""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
    return "" if value is None else str(value).replace("|", "/")


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines)) + "\n"


def page(part: ModuleType, done: Sequence[Result], *, smoke: bool = False) -> str:
    """The rows, and how they stand to their goals, which tiny sizes have none of."""
    columns = [name for name in part.COLUMNS if any(name in each.figures for each in done)]
    lines = [[each.row.name, *(shown(each.figures.get(name)) for name in columns), shown(each.note)] for each in done]
    text = table(["row", *columns, "note"], lines)
    goals = [
        [each.row.name, name, shown(value), shown(float(goal)), "held" if held else "missed"]
        for each in done
        for name, value, goal, held in verdicts(each)
        if not smoke
    ]
    if goals:
        text += f"\nGoals, for an H100:\n\n{table(['row', 'figure', 'measured', 'goal', ''], goals)}"
    return text


def append(file: Path, record: dict[str, Any]) -> None:
    """One line more, on the disk when this returns."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as out:
        out.write(json.dumps(record) + "\n")
        out.flush()
        os.fsync(out.fileno())


def run(name: str, folder: Path, budget: float, *, smoke: bool, command: Sequence[str], only: str = "") -> bool:
    """Measure the rows of part ``name`` whose names the expression ``only`` finds; whether none failed."""
    until = time.time() + budget
    module, title = PARTS[name]
    part = import_module(module)
    made = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "device": device(), "smoke": smoke}
    top = header(title, command) + "\n" + ", ".join(f"{key} {value}" for key, value in versions().items()) + ".\n"
    if smoke:
        top += "\nTiny sizes, to try the code: these figures say nothing of any network.\n"
    append(folder / f"gpu-{name}.jsonl", {"part": name, **made, "versions": versions(), "command": list(command)})
    done: list[Result] = []
    for result in results([each for each in part.rows(smoke) if re.search(only, each.name)], until, isolated=not smoke):
        done.append(result)
        record = {"part": name, **made, **result.record()}
        append(folder / f"gpu-{name}.jsonl", record)
        print(json.dumps(record), flush=True)
        write(folder / f"gpu-{name}.md", f"{top}\n{page(part, done, smoke=smoke)}")
        if hasattr(part, "summary"):
            write(folder / f"gpu-{name}.json", json.dumps(part.summary(done, device().split(",")[0]), indent=2) + "\n")
    print(f"\n{page(part, done, smoke=smoke)}", flush=True)
    return not any(each.failed for each in done)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--pages", type=Path, default=Path("docs/benchmarks"), help="folder for what is written")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds after which no row is begun")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, all rows in this process, any machine")
    parser.add_argument("--only", default="", help="regular expression: only the rows whose names it finds")
    options = parser.parse_args()
    if not options.smoke and device().startswith(NONE):
        parser.error("there is no GPU here (nvidia-smi finds none): --smoke runs anywhere")
    logging.getLogger("tuner").setLevel(logging.ERROR)
    command = ["python", *sys.argv]
    how = {"smoke": options.smoke, "command": command, "only": options.only}
    sys.exit(not run(options.part, options.pages, options.budget, **how))


if __name__ == "__main__":
    main()
