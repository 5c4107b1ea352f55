"""``tuner convert``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tuner.cli import adapters, options


def convert(
    file: Annotated[Path, typer.Argument(help="An adapter: LoRA, LoKr, LoHa or differences, as .safetensors.")],
    to: adapters.To,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="What to write; beside the file when absent.", show_default=False)
    ] = None,
    rank: adapters.Rank = None,
    model: adapters.Model = None,
    force: adapters.Force = False,
    debug: options.Debug = False,
) -> None:
    """Write an adapter file in the format of another program."""
    from tuner.builtin.adapter_formats.convert import convert as converted

    with adapters.progress("decomposing") as progress:
        done = converted(file, to, out, rank=rank, model=model, force=force, progress=progress)
    for note in done.notes:
        print(f"note: {note}")
    if done.errors is not None:
        adapters.print_errors(done.errors, f"as LoRA of rank {rank}")
    print(f"wrote {done.path} ({to}, {done.keys} keys), which fits {', '.join(done.fits)}")
