"""What the commands on adapter files share: options, progress, and the tables of what was lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from tuner.builtin.adapter_formats.compress import Errors

To = Annotated[str, typer.Option("--to", help="Format of the new file: comfyui, diffusers, kohya or lycoris.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="What to write.", show_default=False)]
Rank = Annotated[
    int | None,
    typer.Option("--rank", min=1, help="Make every matrix a LoRA of at most this rank, and say what is lost."),
]
Model = Annotated[
    Path | None,
    typer.Option("--model", help="The base that the file is for, where it is no published model.", show_default=False),
]
Network = Annotated[
    str | None,
    typer.Option("--network", help="Which denoiser of two: transformer, transformer_2.", show_default=False),
]
Force = Annotated[bool, typer.Option("--force", help="Replace the file that is there.")]


@contextmanager
def progress(what: str, total: int | None = None) -> Iterator[Callable[[], None]]:
    """A bar on standard error, where that is a terminal; call what it gives for every step."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from tuner.console import console

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console(), transient=True, disable=not console().is_terminal) as bar:
        task = bar.add_task(what, total=total)
        yield lambda: bar.advance(task)


def print_errors(errors: Errors, what: str) -> None:
    """A table of relative errors by kind of module."""
    from rich.console import Console
    from rich.table import Table

    from tuner.builtin.adapter_formats.compress import by_kind, total_error

    if not errors:
        return
    table = Table(title=f"{what} (Frobenius norm of what is lost over that of the update)", title_justify="left")
    for heading in ("module", "count", "error", "largest"):
        table.add_column(heading, justify="left" if heading == "module" else "right")
    for kind, (count, error, largest) in by_kind(errors).items():
        table.add_row(kind, str(count), f"{error:.2e}", f"{largest:.2e}")
    table.add_row("all", str(len(errors)), f"{total_error(errors.values()):.2e}", "")
    Console().print(table)
