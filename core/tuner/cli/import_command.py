"""``tuner import``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tuner.cli import options

if TYPE_CHECKING:
    from tuner.cli.importing.draft import Draft

LONGEST = 60
"""Characters of a value in the table."""


def import_(
    files: Annotated[list[Path], typer.Argument(help="Config, dataset and script files of one run of another tool.")],
    output: Annotated[Path, typer.Option("--output", help="Folder of the files to write.")] = Path("config"),
    tool: Annotated[
        str | None,
        typer.Option(
            "--from",
            help="musubi-tuner, ai-toolkit, diffusion-pipe or simpletuner, where the files do not tell.",
            show_default=False,
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Write also where files are; these are kept under another name.")
    ] = False,
    debug: options.Debug = False,
) -> None:
    """Turn the config of another tool into ours, and list what has no counterpart."""
    from tuner.cli.importing.read import read
    from tuner.cli.importing.recognise import tool_of, translated
    from tuner.cli.importing.write import CONFIG, write
    from tuner.config.load import DEFAULT_PATH

    found = [read(path) for path in files]
    name = tool_of(found, tool)
    print(f"{name}: {', '.join(str(file.path) for file in found)}")
    draft = translated(name, found)
    written = write(draft, output, force=force)
    _print_rows(draft)
    print("\n".join(written))
    path = output / CONFIG
    named = "" if path == DEFAULT_PATH else f" --config {path}"
    print(f"next: look at what has no counterpart, then tuner check{named}, then tuner run{named}")


def _print_rows(draft: Draft) -> None:
    """What was translated, then what was not, one row a line."""
    rows = draft.table()
    with_ours = [row for row in rows if row.ours]
    without = [row for row in rows if not row.ours]
    print(f"translated ({len(with_ours)}): theirs = value -> ours")
    for row in with_ours:
        keys = [key for key in row.ours.split(", ") if key in draft.settings]
        ours = ", ".join(f"{key} = {_short(draft.settings[key])}" for key in keys) or row.ours
        print(f"  {row.theirs} = {_short(row.value)} -> {ours}" + (f"  ({row.why})" if row.why else ""))
    print(f"no counterpart ({len(without)}): theirs = value: why")
    for row in without:
        print(f"  {row.theirs} = {_short(row.value)}: {row.why}")


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"
