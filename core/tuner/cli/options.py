"""Options that the commands on a config share, and the way from them to an assembly."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tuner.builtin.garbage import uncollected
from tuner.cli.completion import plugin_names

if TYPE_CHECKING:
    from tuner.assembly import Assembly

Config = Annotated[
    Path | None,
    typer.Option("--config", help="JSON, TOML or YAML file; config/config.json when absent.", show_default=False),
]
Plugins = Annotated[
    str | None,
    typer.Option(
        "--plugins",
        help="Load exactly these plugins, comma-separated, beside the built-in ones.",
        show_default=False,
        autocompletion=plugin_names,
    ),
]
Without = Annotated[
    list[str] | None,
    typer.Option(
        "--without",
        help="Leave these plugins out, comma-separated.",
        show_default=False,
        autocompletion=plugin_names,
    ),
]
Strict = Annotated[bool, typer.Option("--strict", help="Make keys of plugins that are not loaded an error.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def names(given: str | Sequence[str] | None) -> list[str] | None:
    """Plugin names from comma-separated options; None when the option was not given."""
    if given is None:
        return None
    parts = [given] if isinstance(given, str) else given
    return [name.strip() for part in parts for name in part.split(",") if name.strip()]


def assembly(
    context: typer.Context, config: Path | None, plugins: str | None, without: list[str] | None, strict: bool
) -> Assembly:
    """Read the config, the environment and the flags, and assemble the run. Raises TunerError."""
    import os

    with starting():
        from tuner.assembly import assemble
        from tuner.cli import allocator
        from tuner.cli.flags import read_settings
        from tuner.cli.logs import show_log
        from tuner.selection import Catalog

        show_log()
        allocator.settle(os.environ)
        catalog = Catalog()
        listed, left_out = names(plugins), names(without) or []
        settings = read_settings(config, context.args, os.environ, plugins=listed, without=left_out, catalog=catalog)
        return assemble(settings, plugins=listed, without=left_out, strict=strict or None, catalog=catalog)


@contextmanager
def starting() -> Iterator[None]:
    """While entered, nobody looks for garbage: what is made then are modules and classes, and all of it stays."""
    with uncollected():
        yield
        gc.freeze()
