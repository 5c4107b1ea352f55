"""``tuner report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tuner.cli import options


def report(
    output_dir: Annotated[Path, typer.Argument(help="The output folder of a run.")],
    serve: Annotated[bool, typer.Option("--serve", help="Show it live, to this machine alone, until Ctrl+C.")] = False,
    port: Annotated[
        int, typer.Option("--port", help="With --serve: the port; 0 takes a free one.", min=0, max=65535)
    ] = 8765,
    debug: options.Debug = False,
) -> None:
    """Make the report of a run anew from its log and files, or show it while the run goes."""
    from tuner.builtin.report.page import write
    from tuner.builtin.report.story import Story

    _check(output_dir)
    if not serve:
        print(write(Story.read(output_dir)))
        return
    from tuner.builtin.report.serve import Server

    with Server(output_dir, port) as server:
        print(f"{server.address} (Ctrl+C ends it)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return


def _check(output_dir: Path) -> None:
    """Raises ConfigError where this is no output folder of a run."""
    from tuner.errors import ConfigError
    from tuner.train.log import NAME

    if not (output_dir / NAME).is_file():
        raise ConfigError(
            f"there is no {NAME}: this is not the output folder of a run that has trained",
            where=output_dir,
            remedy="name the folder that output_dir names in the run's config",
        )
