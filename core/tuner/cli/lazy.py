"""The group of ``tuner``'s commands: each is imported when it is used, and help is printed without any."""

from __future__ import annotations

import importlib
from collections import UserDict
from collections.abc import Iterator
from typing import Any, NamedTuple

import typer
from typer.core import TyperGroup

from tuner.cli.completion import KeysAsFlags

AS_FLAGS: dict[str, Any] = {
    "cls": KeysAsFlags,
    "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True},
}


class Entry(NamedTuple):
    """Where a command is, and what help says of it."""

    target: str
    """``module:function`` in this package, or ``module:app``"""
    summary: str
    keys: bool = False
    """whether every config key is a flag of it"""
    hidden: bool = False


COMMANDS = {
    "configure": Entry("configure:configure", "Ask what to teach, look at clips and card, write a config.", keys=True),
    "run": Entry("run:run", "Train: data, cache, training, validation, files.", keys=True),
    "train": Entry("run:run", "The same as run.", keys=True, hidden=True),
    "launch": Entry("launch:launch", "Train on several GPUs, of one machine or of many.", keys=True),
    "cache": Entry("cache:cache", "Encode clips and captions, and stop.", keys=True),
    "check": Entry("check:check", "Say what is wrong and what will happen, without weights.", keys=True),
    "plan": Entry("plan:plan", "Say what a step costs in time and memory, and what fits.", keys=True),
    "sample": Entry("sample:sample", "Render clips from LoRA files, or from the base alone.", keys=True),
    "import": Entry("import_command:import_", "Turn another trainer's config into ours."),
    "convert": Entry("convert:convert", "Write an adapter file in another program's format."),
    "merge": Entry("merge:merge", "Make one adapter of several, or put them into a base."),
    "extract": Entry("extract:extract", "Make a LoRA of what a fine-tune changed."),
    "inspect": Entry("inspect:inspect", "Say what an adapter file is and which model it fits."),
    "report": Entry("report_command:report", "Make the report of a run anew, or show it live."),
    "doctor": Entry("doctor:doctor", "Say what this machine has for training, and what is broken."),
    "plugins": Entry("plugins:app", "List installed plugins, check them, write a new one."),
    "config": Entry("config_command:app", "List every config key; a JSON schema for editors."),
}


def load(name: str) -> Any:
    """The command ``name``, imported."""
    entry = COMMANDS[name]
    module, _, attribute = entry.target.partition(":")
    found = getattr(importlib.import_module(f"tuner.cli.{module}"), attribute)
    if isinstance(found, typer.Typer):
        command = typer.main.get_command(found)
    else:
        single = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
        single.command(name, **(AS_FLAGS if entry.keys else {}), hidden=entry.hidden)(found)
        command = typer.main.get_command(single)
    command.name = name
    return command


class Commands(UserDict[str, Any]):
    """Name to command, each imported when it is looked up."""

    def __init__(self) -> None:
        super().__init__(dict.fromkeys(COMMANDS))

    def __getitem__(self, name: str) -> Any:
        if self.data[name] is None:
            self.data[name] = load(name)
        return self.data[name]


class LazyGroup(TyperGroup):
    """A group with the commands above."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands = Commands()

    def list_commands(self, ctx: Any) -> list[str]:
        """Their names, in the order of the table."""
        return [name for name, entry in COMMANDS.items() if not entry.hidden]

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write names and summaries; nothing is imported."""
        with formatter.section("Commands"):
            formatter.write_dl(list(self._rows()))

    def _rows(self) -> Iterator[tuple[str, str]]:
        for name, entry in COMMANDS.items():
            if not entry.hidden:
                yield name, entry.summary
