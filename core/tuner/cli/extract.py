"""``tuner extract``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tuner.cli import adapters, options

Place = "a folder in the diffusers layout, a denoiser's own folder, or a .safetensors file."


def extract(
    base: Annotated[Path, typer.Argument(help=f"The base model: {Place}")],
    tuned: Annotated[Path, typer.Argument(help=f"The fine-tune of it: {Place}")],
    out: adapters.Out,
    rank: Annotated[int, typer.Option("--rank", min=1, help="Rank of the LoRA.", show_default=False)],
    to: adapters.To = "comfyui",
    network: adapters.Network = None,
    force: adapters.Force = False,
    debug: options.Debug = False,
) -> None:
    """Make a LoRA of what a fine-tune changed, by singular value decomposition."""
    from tuner.builtin.adapter_formats import extract as extracting

    with adapters.progress("decomposing") as progress:
        done = extracting.extract(base, tuned, out, rank=rank, to=to, network=network, force=force, progress=progress)
    adapters.print_errors(done.errors, f"as LoRA of rank {rank}")
    if done.left_out:
        print(f"note: {len(done.left_out)} tensors that are no matrices changed, too, which a LoRA cannot hold:")
        largest = sorted(done.left_out.items(), key=lambda each: -each[1][0])[:3]
        print("  " + ", ".join(f"{name} by {norm:.2e}" for name, (norm, _) in largest))
    print(f"wrote {done.path} ({to}, {done.modules} modules of rank {rank})")
