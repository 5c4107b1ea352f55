"""The page of commands has every command and no other; `tuner train` is `tuner run`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from tuner.cli import app

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
    registered = {each.name: each.callback for each in app.registered_commands}
    assert registered["train"] is registered["run"]
