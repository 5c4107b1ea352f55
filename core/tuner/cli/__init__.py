"""The ``tuner`` command. Importing this imports typer and nothing heavy; each command imports what it needs."""

from __future__ import annotations

import os
import sys
import time

import typer

from tuner import processes
from tuner.cli.lazy import LazyGroup
from tuner.errors import FailedElsewhere, Stopped, TunerError

app = typer.Typer(
    name="tuner",
    cls=LazyGroup,
    help="Fine-tune video diffusion models. Every config key is also a flag: --learning_rate 5e-5.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _print_version(asked: bool) -> None:
    if asked:
        from tuner import __version__

        typer.echo(f"tuner {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_print_version, is_eager=True, help="Print the version."),
) -> None:
    """Options before the command."""


def main() -> None:
    """Run the command line. What a user can mend is printed without a traceback, with the error's exit code."""
    # Pydantic looks through every installed package for plugins that watch models being checked.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    try:
        app(prog_name="tuner")
    except FailedElsewhere as error:
        # Launchers end all processes when the first one does: the one at fault must have said why.
        time.sleep(1)
        sys.exit(error.exit_code)
    except TunerError as error:
        if "--debug" in sys.argv:
            import traceback

            traceback.print_exception(error)
        elif not (isinstance(error, Stopped) and processes.launched()[0] > 0):  # all stop, and one says so
            _print_error(error)
        sys.exit(error.exit_code)


def _print_error(error: TunerError) -> None:
    from tuner.errors import ConfigErrors

    each = error.errors if isinstance(error, ConfigErrors) else [error]
    lines = [f"{one.label}: {one}" for one in each]
    lines += [f"  {note}" for note in getattr(error, "__notes__", ())]
    print("\n".join(lines), file=sys.stderr)
