"""What a shell offers after Tab: plugin names, and config keys as flags. Typer does commands and options itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from typer.core import TyperCommand


def plugin_names(incomplete: str) -> list[str]:
    """A comma-separated list of plugins with its last name completed; no plugin is imported."""
    from importlib.metadata import entry_points

    from tuner.builtin import BUILTINS
    from tuner.selection import GROUP

    done, comma, begun = incomplete.rpartition(",")
    names = {*BUILTINS, *(entry.name for entry in entry_points(group=GROUP))} - set(done.split(","))
    return [f"{done}{comma}{name}" for name in sorted(names) if name.startswith(begun)]


class KeysAsFlags(TyperCommand):
    """A command that takes every config key as a flag, and completes them."""

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        """The command's own options, and keys that begin with what is written."""
        found = super().shell_complete(ctx, incomplete)
        if incomplete.startswith("--"):
            item = type(super().shell_complete(ctx, "--")[0])  # --help at least; click's class may be typer's own copy
            found += [item(flag) for flag in sorted(_flags()) if flag.startswith(incomplete)]
        return found


def _flags() -> Iterator[str]:
    from tuner.cli.config_command import models

    for _, model in models():
        yield from (f"--{key}" for key in model.model_fields)
