"""``tuner plugins``: what is installed, what each plugin owns, and whether the config at hand loads it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tuner.cli import options
from tuner.cli.completion import plugin_names
from tuner.cli.plugins.check import check
from tuner.cli.plugins.new import new

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from tuner.selection import Catalog, Found

app = typer.Typer(
    help="List the installed plugins, check them, write a new one.", add_completion=False, rich_markup_mode=None
)


app.command("check")(check)
app.command("new")(new)


@app.callback(invoke_without_command=True)
def plugins(
    context: typer.Context,
    config: options.Config = None,
    plugins: options.Plugins = None,
    without: options.Without = None,
    debug: options.Debug = False,
) -> None:
    """List the installed plugins, and say which ones the config loads."""
    if context.invoked_subcommand is None:
        _print_list(config, plugins, without)


@app.command("list")
def list_plugins(
    config: options.Config = None,
    plugins: options.Plugins = None,
    without: options.Without = None,
    debug: options.Debug = False,
) -> None:
    """List the installed plugins, and say which ones the config loads."""
    _print_list(config, plugins, without)


def _print_list(config: Path | None, plugins: str | None, without: list[str] | None) -> None:
    from tuner.plugin import API_VERSION
    from tuner.selection import Catalog

    catalog = Catalog()
    why = _reasons(catalog, config, options.names(plugins), options.names(without) or [])
    typer.echo("\n".join(line for name in catalog.installed for line in _entry(catalog, name, why)))
    typer.echo(f"version of the hooks: {API_VERSION}")


@app.command("show")
def show(
    name: Annotated[str, typer.Argument(help="Name of the plugin.", autocompletion=plugin_names)],
    debug: options.Debug = False,
) -> None:
    """Show one plugin in full: what it does, requires, offers, its hooks and its keys."""
    from tuner.selection import Catalog

    catalog = Catalog()
    found = catalog.find(name)
    typer.echo("\n".join(_details(found, catalog)))


def _reasons(catalog: Catalog, path: Path | None, listed: list[str] | None, without: list[str]) -> Mapping[str, str]:
    """Why each plugin is loaded or not; empty when there is no config to judge by."""
    import os

    from tuner.assembly import selection_of
    from tuner.cli.flags import read_settings
    from tuner.config.load import DEFAULT_PATH
    from tuner.errors import TunerError

    if path is None and not DEFAULT_PATH.is_file():
        typer.echo(f"(no {DEFAULT_PATH} here: name a config with --config to see what it loads)")
        return {}
    try:
        settings = read_settings(path, [], os.environ, plugins=listed, without=without, catalog=catalog)
        chosen = selection_of(settings, catalog, plugins=listed, without=without)
    except TunerError as error:
        typer.echo(f"warning: the config selects no plugins:\n{error}", err=True)
        return {}
    return {
        name: f"loaded: {why}" if name in chosen.classes else f"not loaded: {why}"
        for name, why in chosen.reasons.items()
    }


def _entry(catalog: Catalog, name: str, why: Mapping[str, str]) -> Iterator[str]:
    from tuner.manager import hooks_of

    found = catalog.installed[name]
    package = "built in" if found.builtin else found.package
    yield f"{name:<14} {found.version:<10} {package:<14} {why.get(name, '')}".rstrip()
    cls = catalog.peek(name)
    if cls is None:
        yield f"  {catalog.broken[name].what}"
        return
    yield f"  {_summary(cls)}"
    yield f"  hooks: {', '.join(hooks_of(cls)) or 'none'}"
    yield f"  keys:  {', '.join(cls.Config.model_fields) or 'none'}"


def _details(found: Found, catalog: Catalog) -> Iterator[str]:
    from tuner.config.describe import allowed, facts, shown_default
    from tuner.manager import hooks_of

    cls = catalog.load(found.name)
    yield f"{found.name} ({found.source}), {found.entry_point.value}"
    yield from (f"  {line}".rstrip() for line in (cls.__doc__ or "").strip().splitlines())
    values = [f"{key}: {value}" for key, served in sorted(cls.values.items()) for value in sorted(served)]
    for label, names in (
        ("requires", sorted(cls.requires)),
        ("conflicts", sorted(cls.conflicts)),
        ("provides", sorted(cls.provides)),
        ("values", values),
        ("hooks", hooks_of(cls)),
        ("api", [str(cls.api)]),
    ):
        yield f"  {label + ':':<11}{', '.join(names) or 'none'}"
    yield "  keys:      " + ("" if cls.Config.model_fields else "none")
    for key, field in cls.Config.model_fields.items():
        known = facts(field)
        yield f"    {key} ({allowed(field)}; default {shown_default(field)})"
        yield f"      {field.description}"
        others = [*known.aliases, *([f"${known.environment}"] if known.environment else [])]
        if others:
            yield f"      also: {', '.join(others)}"


def _summary(cls: type) -> str:
    return (cls.__doc__ or "").strip().partition("\n")[0]
