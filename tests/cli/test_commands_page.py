"""The page of commands has every command and no other; `tuner train` is `tuner run`."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from tuner.cli import app
from tuner.cli.lazy import COMMANDS

PAGE = (Path(__file__).parents[2] / "docs" / "commands.md").read_text(encoding="utf-8")


def commands(group: Any, name: str = "tuner") -> Iterator[str]:
    for word, command in group.commands.items():
        if command.hidden:
            continue
        inner = getattr(command, "commands", {})
        yield from commands(command, f"{name} {word}") if inner else [f"{name} {word}"]


def test_the_table_is_complete() -> None:
    ours = PAGE.partition("## If you come")[0]
    listed = re.findall(r"`(tuner [a-z ]+)`", "\n".join(line.split(" | ")[0] for line in ours.splitlines()))
    assert sorted(listed) == sorted(commands(typer.main.get_command(app)))


def test_train_is_run() -> None:
    group: Any = typer.main.get_command(app)
    assert group.commands["train"].callback is not None
    assert [each.name for each in group.commands["train"].params] == [
        each.name for each in group.commands["run"].params
    ]
    assert COMMANDS["train"].target == COMMANDS["run"].target


def test_help_has_a_line_for_each_and_imports_none() -> None:
    code = (
        "import sys\nfrom tuner.cli import main\nsys.argv = ['tuner', '--help']\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print(*(name for name in sys.modules if name.startswith('tuner.cli.')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert set(lines[-1].split()) == {"tuner.cli.lazy", "tuner.cli.completion"}
    for name, entry in COMMANDS.items():
        assert entry.hidden or any(line.split() == [name, *entry.summary.split()] for line in lines), name
