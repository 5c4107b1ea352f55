"""``tuner doctor``."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from tuner.cli import options

if TYPE_CHECKING:
    from tuner.cli.diagnosis import Line

PATIENCE = 60
"""Seconds that one group of questions may take: importing torch from a slow disk takes long, a driver may hang."""
MARKS = {"well": "ok", "note": "--", "bad": "BAD"}


def doctor(
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object for programs.")] = False,
    debug: options.Debug = False,
) -> None:
    """Say what this machine has for training, what is missing, and print a block for a bug report."""
    import json as writer

    from tuner.cli.diagnosis import GROUPS

    found = {group: asked(group) for group in GROUPS}
    bad = [line for lines in found.values() for line in lines if line[0] == "bad"]
    if json:
        print(writer.dumps({"well": not bad, "groups": found}, indent=2))
    else:
        _print(found)
    raise typer.Exit(1 if bad else 0)


def asked(group: str) -> list[Line]:
    """The answers of one group, from a process of its own: what hangs or crashes there is said and costs no more."""
    import json as writer
    import subprocess

    command = [sys.executable, "-m", "tuner.cli.diagnosis", group]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
        return [(each[0], each[1], each[2]) for each in writer.loads(done.stdout.splitlines()[-1])]
    except subprocess.TimeoutExpired:
        return [("bad", group, f"no answer within {PATIENCE} s")]
    except (IndexError, ValueError):
        last = (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1]
        return [("bad", group, f"could not be asked: {last}")]


def _print(found: dict[str, list[Line]]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    shown = {group: lines for group, lines in found.items() if lines}
    for group, lines in shown.items():
        table = Table(show_header=False, title=group, title_justify="left", title_style="bold")
        for mark, name, said in lines:
            table.add_row(MARKS[mark], name, said)
        console.print(table)
    bad = [f"{name}: {said}" for lines in found.values() for mark, name, said in lines if mark == "bad"]
    print("\n".join(["", *(f"to mend: {each}" for each in bad)]) if bad else "\nNothing stands in the way of training.")
    print("\nFor a bug report (no secrets are in it):\n\n```")
    for group, lines in shown.items():
        print(f"{group}: " + "; ".join(_short(group, line) for line in lines))
    print("```")


def _short(group: str, line: Line) -> str:
    """A line for a bug report: of a package that is not there no more than that."""
    mark, name, said = line
    return f"no {name}" if group == "optional" and mark == "note" else f"{name} {said}"
