"""``tuner plan``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from tuner.cli import options

if TYPE_CHECKING:
    from tuner.assembly import Assembly
    from tuner.builtin.planner.cards import Card
    from tuner.builtin.planner.fit import Fit as Fitting
    from tuner.builtin.planner.page import Plan

Shape = Annotated[
    str | None,
    typer.Option(
        "--shape",
        help="Plan for clips of width x height x frames, comma-separated, such as 832x480x81; the data are left alone.",
        show_default=False,
    ),
]
CardName = Annotated[
    str | None, typer.Option("--card", help="Card that times are for, such as H100.", show_default=False)
]
Fit = Annotated[
    str | None,
    typer.Option("--fit", help="Propose settings for a device of so much memory, such as 24G.", show_default=False),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object for programs.")]


def plan(
    context: typer.Context,
    config: options.Config = None,
    plugins: options.Plugins = None,
    without: options.Without = None,
    strict: options.Strict = False,
    shape: Shape = None,
    card: CardName = None,
    fit: Fit = None,
    json: Json = False,
    debug: options.Debug = False,
) -> None:
    """Say what a step will compute and how long it should take, without loading weights."""
    import sys
    from contextlib import nullcontext, redirect_stdout

    from tuner.cli.report import print_assembly

    with options.starting(), redirect_stdout(sys.stderr) if json else nullcontext():
        assembly = _settled(options.assembly(context, config, plugins, without, strict), shape)
        print_assembly(assembly)
        found = _planned(assembly, shape, card)
        proposed = None if fit is None else _fitted(assembly, found, fit)
    _print(found, json, proposed)


def _settled(assembly: Assembly, shape: str | None) -> Assembly:
    """With what ``memory_preset`` chooses, for the shapes that are named, or for the data."""
    from tuner.assembly import new_run, settle
    from tuner.builtin.planner import PlannerPlugin

    planner = assembly.plugins.get("planner")
    if shape is not None and isinstance(planner, PlannerPlugin) and planner.presets:
        from tuner import pipeline
        from tuner.builtin.planner.shapes import named

        run = new_run(assembly)
        planner.shapes = named(run, pipeline.describe(run, assembly.manager), options.names(shape) or [])
    return settle(assembly)


def _planned(assembly: Assembly, shape: str | None, card_name: str | None) -> Plan:
    from tuner.builtin.planner.shapes import of_data, of_words

    card = _card(assembly, card_name)
    return of_data(assembly, card) if shape is None else of_words(assembly, options.names(shape) or [], card)


def _card(assembly: Assembly, name: str | None) -> Card | None:
    from tuner.builtin.planner import PlannerPlugin
    from tuner.builtin.planner.cards import named

    if name is not None:
        return named(name, where="--card")
    planner = assembly.plugins.get("planner")
    return planner.card() if isinstance(planner, PlannerPlugin) else None


def _fitted(assembly: Assembly, found: Plan, size: str) -> tuple[Fitting, float]:
    from tuner.assembly import new_run
    from tuner.builtin.planner.candidates import Candidates
    from tuner.builtin.planner.fit import fit, size_of

    limit, run = size_of(size), new_run(assembly)
    shapes = [cost.shape for cost in next(iter(found.costs.values()))]
    run.trained_shape = found.trained_shape
    return fit(Candidates.of(run, shapes, found.card), limit), limit


def _print(found: Plan, as_json: bool, fitted: tuple[Fitting, float] | None) -> None:
    from tuner.builtin.planner import fit_page, page

    if as_json:
        import json

        proposed = {} if fitted is None else {"fit": fit_page.as_json(fitted[0])}
        print(json.dumps(page.as_json(found) | proposed, indent=2))
        return
    from rich.console import Console

    console = Console()
    for part in [*page.tables(found), *(() if fitted is None else fit_page.tables(*fitted))]:
        console.print(part)
