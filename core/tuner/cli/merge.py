"""``tuner merge``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tuner.cli import adapters, options

Files = Annotated[list[Path], typer.Argument(help="Adapters, as .safetensors.")]
Weights = Annotated[
    str | None,
    typer.Option(
        "--weights", help="How much of each, comma-separated, such as 1,0.5; 1 when absent.", show_default=False
    ),
]
Into = Annotated[
    Path | None,
    typer.Option("--into", help="Add them to the weights of this base: a folder or a .safetensors file."),
]


def merge(
    files: Files,
    out: adapters.Out,
    weights: Weights = None,
    into: Into = None,
    to: adapters.To = "comfyui",
    rank: adapters.Rank = None,
    network: adapters.Network = None,
    model: adapters.Model = None,
    force: adapters.Force = False,
    debug: options.Debug = False,
) -> None:
    """Make one adapter of several, or a new base with adapters in its weights (--into)."""
    shares = _shares(weights)
    if into is not None:
        _refuse({"--rank": rank is not None, "--model": model is not None, "--force": force}, "--into")
        _into(files, shares, into, out, network)
        return
    _refuse({"--network": network is not None}, "an adapter")
    from tuner.builtin.adapter_formats.combine import combine

    with adapters.progress("decomposing") as progress:
        done = combine(files, shares, out, to=to, rank=rank, model=model, force=force, progress=progress)
    for note in done.notes:
        print(f"note: {note}")
    if done.errors is not None:
        adapters.print_errors(done.errors, f"as LoRA of rank {rank}")
    print(f"wrote {done.path} ({to}, {done.keys} keys), which fits {', '.join(done.fits)}")


def _into(files: list[Path], shares: list[float] | None, base: Path, out: Path, network: str | None) -> None:
    from tuner.builtin.adapter_formats.into_base import merge as merged

    with adapters.progress("merging") as progress:
        done = merged(files, shares, base, out, network=network, progress=progress)
    for note in done.notes:
        print(f"note: {note}")
    adapters.print_errors(done.rounding, "rounded to the base's dtype")
    print(f"wrote {done.path}: {done.changed} tensors of {done.network} changed")


def _shares(weights: str | None) -> list[float] | None:
    from tuner.errors import ConfigError

    try:
        return None if weights is None else [float(word) for word in weights.split(",")]
    except ValueError:
        raise ConfigError(f"--weights {weights!r} is no list of numbers", where="command line") from None


def _refuse(given: dict[str, bool], beside: str) -> None:
    from tuner.errors import ConfigError

    idle = [name for name, there in given.items() if there]
    if idle:
        raise ConfigError(f"{', '.join(idle)} does nothing beside {beside}", where="command line")
