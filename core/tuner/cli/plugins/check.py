"""``tuner plugins check``: the contract kit on installed plugins."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from tuner.cli import options
from tuner.cli.completion import plugin_names

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tuner.selection import Found
    from tuner.testing.contract.checks import Outcome


def check(
    names: Annotated[
        list[str] | None, typer.Argument(help="Names of plugins; all of them when absent.", autocompletion=plugin_names)
    ] = None,
    debug: options.Debug = False,
) -> None:
    """Hold installed plugins to what every plugin is held to, and say what is wrong with which."""
    from tuner.cli.logs import show_log
    from tuner.selection import Catalog

    show_log()
    catalog = Catalog()
    chosen = [catalog.find(name) for name in names or catalog.installed]
    faulty = 0
    for found in chosen:
        outcomes = list(_outcomes(found))
        wrong = [each for each in outcomes if each.wrong]
        faulty += bool(wrong)
        typer.echo(f"{found.name:<20} {len(outcomes) - len(wrong):>3} of {len(outcomes):<3}  {found.source}")
        for each in wrong:
            typer.echo(f"  {each.name}: {each.wrong}")
            if each.asked:
                typer.echo(f"    asked is: {each.asked}")
    typer.echo(f"{len(chosen) - faulty} of {len(chosen)} plugins keep the contract")
    raise typer.Exit(1 if faulty else 0)


def _outcomes(found: Found) -> Iterator[Outcome]:
    from tuner.errors import PluginError
    from tuner.selection import FAMILY
    from tuner.testing.contract.checks import Outcome, contracts_of, run

    try:
        family = FAMILY in found.load().provides
        contracts = contracts_of(found, family)
    except PluginError as error:
        yield Outcome("found_through_its_entry_point", "The package names it, and it loads.", error.what)
    except Exception as error:
        yield Outcome("contract", "Its package says what it is held to.", f"{type(error).__name__}: {error}")
    else:
        for contract in contracts:
            yield from run(contract)
