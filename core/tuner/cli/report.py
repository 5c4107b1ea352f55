"""What a command says first: the plugins of the run, what was set aside, what will have no effect."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tuner.assembly import Assembly


def print_assembly(assembly: Assembly) -> None:
    """Print plugins, notes and warnings, once for all processes of a run: plain lines, in colour on a terminal."""
    if int(os.environ.get("RANK", "0")):
        return
    loaded = ", ".join(_named(assembly, name) for name in sorted(assembly.plugins))
    lines = [("bold", "plugins: ", loaded)]
    lines += [("cyan", "note: ", note) for note in assembly.notes]
    lines += [("yellow", "warning: ", warning) for warning in assembly.warnings]
    if not sys.stdout.isatty():
        print("\n".join(label + text for _, label, text in lines), flush=True)
        return
    from rich.console import Console
    from rich.text import Text

    console = Console()
    for style, label, text in lines:
        console.print(Text(label, style=style) + Text(text))


def _named(assembly: Assembly, name: str) -> str:
    source = assembly.found[name].source if name in assembly.found else "unknown"
    idle = "" if assembly.plugins[name].is_active(assembly.core) else ", idle"
    return f"{name} ({source}{idle})"
