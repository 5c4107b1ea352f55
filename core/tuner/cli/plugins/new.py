"""``tuner plugins new``: a package with a plugin that works, to begin from."""

from __future__ import annotations

import keyword
import re
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tuner.cli import options

if TYPE_CHECKING:
    from tuner.selection import Catalog


class Kind(StrEnum):
    """What the plugin brings."""

    feature = "feature"
    family = "family"


def new(
    name: Annotated[str, typer.Argument(help="The plugin's name: lower case, digits and underscores.")],
    kind: Annotated[Kind, typer.Option("--kind", help="A feature for every model, or a model family.")] = Kind.feature,
    folder: Annotated[Path | None, typer.Option("--folder", help="Where to write; ./tuner-NAME when absent.")] = None,
    debug: options.Debug = False,
) -> None:
    """Write a package with a plugin that works: installable, with tests that pass, yours to change."""
    from tuner.cli.plugins.scaffold import write
    from tuner.selection import Catalog

    _judge(name, Catalog())
    place = folder or Path(f"tuner-{name.replace('_', '-')}")
    files = write(place, name, kind.value)
    typer.echo(f"{place}/")
    typer.echo("\n".join(f"  {each}" for each in files))
    if not find_spec("ruff"):
        typer.echo("ruff is not installed: lines that the name makes long are left as they are")
    typer.echo(f"\npip install -e {place}\ntuner plugins check {name}\npytest {place}")


def _judge(name: str, catalog: Catalog) -> None:
    """Raises PluginError for a name that no plugin can have, or that one has."""
    from tuner.errors import PluginError

    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name) or keyword.iskeyword(name):
        likely = re.sub(r"\W+|_+", "_", name.lower()).strip("_0123456789")
        raise PluginError(
            f"{name!r} is no name for a plugin: it is also that of a Python package, and the beginning of its keys",
            allowed="lower case letters, digits and single underscores, beginning with a letter; no word of Python's",
            nearest=likely if likely and not keyword.iskeyword(likely) else None,
        )
    if name in catalog.installed:
        found = catalog.installed[name]
        raise PluginError(
            f"there is a plugin {name!r} already ({found.source})",
            remedy="choose another name: two plugins of one name cannot be installed together",
        )
    if find_spec(f"tuner_{name}"):
        raise PluginError(
            f"there is a package 'tuner_{name}' already",
            remedy="choose another name: two packages of one name cannot be installed together",
        )
