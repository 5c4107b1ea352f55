"""What ``tuner plan`` predicts beside bytes counted, and how soon it says so."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rows.row import Row, Timed, compare

COUNTING = Path(__file__).parents[2] / "tests" / "planner" / "test_plan_memory.py"
"""Where steps of networks of real widths are counted on fake tensors."""
CONFIGURATIONS = 12
FUSED = (
    "1.3B, fused, full",
    "1.3B, fused, full, kernels",
    "14B, fused, selective",
    "14B, fused, offload, streamed, kernels",
)
"""Cases of a row of their own."""
LIBRARIES = "import typer, pydantic, pluggy"
UNTORCHED = """
import atexit, sys
from tuner.cli import main
atexit.register(lambda: print("torch" if "torch" in sys.modules else "no torch", file=sys.stderr))
main()
"""


def measure(folder: Path, *, tiny: bool) -> list[Row]:
    """Rows of the planner."""
    return [*memory(folder, tiny=tiny), *start(folder, 1 if tiny else 7)]


def counting() -> Any:
    """The module of tests that counts."""
    wanted = importlib.util.spec_from_file_location("counting", COUNTING)
    assert wanted is not None
    assert wanted.loader is not None
    module = importlib.util.module_from_spec(wanted)
    sys.modules["counting"] = module  # its dataclasses look themselves up
    wanted.loader.exec_module(module)
    return module


def memory(folder: Path, *, tiny: bool) -> list[Row]:
    """The largest difference between a predicted and a counted peak."""
    counts = counting()
    first = list(counts.CASES)[: 1 if tiny else CONFIGURATIONS]
    rows = [of_cases(folder, counts, first, f"{len(first)} configs")]
    return rows if tiny else [*rows, of_cases(folder, counts, FUSED, f"{len(FUSED)} configs with fused_blocks")]


def of_cases(folder: Path, counts: Any, names: Sequence[str], what: str) -> Row:
    """The row of the configs ``names``."""
    from tuner.builtin.planner.memory import CONTEXT, predict

    errors: dict[str, float] = {}
    for name in names:
        case = counts.CASES[name]
        run, spec, workload = counts.described(case, folder / "plan")
        truth = counts.counted(case, spec, run, workload)
        errors[name] = abs((predict(workload).on_device - CONTEXT) / truth - 1)
    worst = max(errors, key=lambda name: errors[name])
    note = f"worst: {worst}; mean {sum(errors.values()) / len(errors):.2%}"
    return Row(f"`tuner plan` / counted peak, {what}: off by", round(errors[worst], 4), 0.05, note=note)


def start(folder: Path, pairs: int) -> list[Row]:
    """`tuner plan` beside importing what every command of ours needs."""
    path = folder / "plan.json"
    keys = {"model_family": "wan", "model_flavour": "t2v-480p-1.3b-2.1", "max_train_steps": 1}
    path.write_text(json.dumps({**keys, "output_dir": str(folder / "output")}), encoding="utf-8")
    arguments = ["plan", "--config", str(path), "--shape", "832x480x81", "--card", "H100"]
    told = process(["-c", UNTORCHED, *arguments]).stderr
    planned = ["-m", "tuner", *arguments]
    process(planned)
    found = compare([(process_time(planned), process_time(["-c", LIBRARIES])) for _ in range(pairs)])
    note = f"{found.one.wall:.2f} and {found.other.wall:.2f} s; on the clock {found.wall:.2f}"
    return [
        Row("`tuner plan` / importing typer, pydantic, pluggy, CPU time", round(found.cpu, 2), 2.5, note=note),
        Row("`tuner plan` imports torch", int("no torch" not in told), 0),
    ]


def process(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Run Python with ``arguments``."""
    return subprocess.run([sys.executable, *arguments], check=True, capture_output=True, text=True)


def process_time(arguments: list[str]) -> Timed:
    """Time it on the clock, and its own CPU time."""
    began, before = os.times().elapsed, os.times()
    process(arguments)
    after = os.times()
    busy = after.children_user + after.children_system - before.children_user - before.children_system
    return Timed(after.elapsed - began, busy)
