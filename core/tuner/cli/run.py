"""``tuner run``."""

from __future__ import annotations

import typer

from tuner.cli import options


def run(
    context: typer.Context,
    config: options.Config = None,
    plugins: options.Plugins = None,
    without: options.Without = None,
    strict: options.Strict = False,
    debug: options.Debug = False,
) -> None:
    """Train: prepare the data, build the cache, train, validate and save."""
    from tuner.cli.report import print_assembly

    assembly = options.assembly(context, config, plugins, without, strict)
    print_assembly(assembly)
    from tuner import pipeline

    pipeline.run(assembly)
