"""``tuner check``."""

from __future__ import annotations

import typer

from tuner.cli import options


def check(
    context: typer.Context,
    config: options.Config = None,
    plugins: options.Plugins = None,
    without: options.Without = None,
    strict: options.Strict = False,
    debug: options.Debug = False,
) -> None:
    """Check config, plugins, data and model files without loading weights."""
    from tuner.cli.report import print_assembly

    assembly = options.assembly(context, config, plugins, without, strict)
    print_assembly(assembly)
    from tuner import pipeline

    settled, found = pipeline.check(assembly)
    from tuner.cli import outlook

    outlook.show(settled, found)
