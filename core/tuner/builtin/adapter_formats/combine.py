"""``tuner merge`` of several adapters into one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from tuner.builtin.adapter_file import AdapterFile, Shapes, Update, load, low_rank
from tuner.builtin.adapter_formats import models
from tuner.builtin.adapter_formats.compress import Errors, limited
from tuner.builtin.adapter_formats.convert import Done, check_format, check_out, write
from tuner.errors import CheckpointError, ConfigError

Weighted = Sequence[tuple[AdapterFile, float]]


def combine(
    sources: Sequence[Path],
    weights: Sequence[float] | None,
    out: Path,
    *,
    to: str = "comfyui",
    rank: int | None = None,
    model: Path | None = None,
    force: bool = False,
    progress: Callable[[], None] = lambda: None,
) -> Done:
    """Write one adapter that adds what all of ``sources`` add, each times its weight (1 where there are none).

    Exact, in float32, by stacking ranks; with ``rank`` no matrix is of a higher one. Raises as ``convert`` does, and
    CheckpointError where the sources are for different models.
    """
    check_format(to)
    check_out(out, force, *sources)
    target, weighted = read_all(sources, weights, models.targets(model))
    file = stacked(weighted, target.shapes, whole=rank is not None)
    errors: Errors | None = None
    if rank is not None:
        file, errors = limited(file, target.shapes, rank, progress)
    named = " + ".join(f"{weight:g} x {path.name}" for path, (_, weight) in zip(sources, weighted, strict=True))
    file = replace(file, metadata=_shared(weighted) | {"tuner.merged": named})
    notes = (*dict.fromkeys(note for each, _ in weighted for note in each.notes), *mixed(sources))
    return replace(write(file, target, to, out), errors=errors, notes=notes)


def read_all(
    sources: Sequence[Path], weights: Sequence[float] | None, targets: Sequence[models.Target]
) -> tuple[models.Target, list[tuple[AdapterFile, float]]]:
    """The one target that all ``sources`` fit, and each with its weight."""
    if weights is not None and len(weights) != len(sources):
        raise ConfigError(f"{len(sources)} files and {len(weights)} weights", where="--weights")
    loaded = [(path, *load(path)) for path in sources]
    first, tensors, metadata = loaded[0]
    target, _ = models.fitting(tensors, metadata, targets, first)
    # A partial file fits several models: the one that all fit is sought, and the first one's is what errors name.
    for candidate, file in models.fits(tensors, metadata, targets, first):
        others = [models.fits(each, said, [candidate], path)[0][1] for path, each, said in loaded[1:]]
        if not file.unread and not any(other.unread for other in others):
            target = candidate
            break
    read = [models.fitting(each, said, [target], path)[1] for path, each, said in loaded]
    return target, list(zip(read, weights or [1.0] * len(read), strict=True))


def mixed(sources: Sequence[Path], network: str | None = None) -> Iterator[str]:
    """A line where files say that they are for different networks, or for another than ``network``.

    Two experts have weights of the same shapes, so that nothing else tells them apart.
    """
    said = {path: str(load(path)[1].get("tuner.network") or "") for path in sources}
    networks = {each for each in (*said.values(), network) if each}
    if len(networks) > 1:
        files = ", ".join(f"{path.name} for {each}" for path, each in said.items() if each)
        yield f"these are for different networks: {files}" + (f"; merged into {network}" if network else "")


def stacked(weighted: Weighted, shapes: Shapes, *, whole: bool) -> AdapterFile:
    """The weighted sum of updates, without loss. ``whole``: what is not of low rank may become a whole difference."""
    updates: dict[str, Update] = {}
    biases: dict[str, Tensor] = {}
    for module in dict.fromkeys(module for file, _ in weighted for module in file.updates):
        parts = [(file.updates[module], weight) for file, weight in weighted if module in file.updates]
        updates[module] = _sum(module, parts, shapes[module], whole=whole)
    for module in dict.fromkeys(module for file, _ in weighted for module in file.biases):
        terms = [weight * file.biases[module].float() for file, weight in weighted if module in file.biases]
        biases[module] = torch.stack(terms).sum(0)
    return AdapterFile(updates, biases)


def _sum(module: str, parts: Sequence[tuple[Update, float]], shape: tuple[int, ...], *, whole: bool) -> Update:
    if any(update.dora_scale is not None for update, _ in parts):
        raise CheckpointError(
            f"{module} is DoRA: what it adds depends on the weights of the base model",
            remedy="merge the files into the base instead, with --into",
        )
    if all(update.kind == "lora" and "lora_mid" not in update.tensors for update, _ in parts):
        down = torch.cat([update.tensors["lora_down"].float() for update, _ in parts])
        ups = [update.tensors["lora_up"].float() * (update.scale * weight) for update, weight in parts]
        return low_rank(down, torch.cat(ups, dim=1), alpha=float(down.shape[0]))
    if not whole and len(shape) > 1 and any(update.kind != "diff" for update, _ in parts):
        raise CheckpointError(
            f"{module} is not LoRA in all files: the sum is of full rank",
            remedy="add --rank to make it a LoRA by singular value decomposition",
        )
    return Update({"diff": torch.stack([weight * update.delta(shape) for update, weight in parts]).sum(0)})


def _shared(weighted: Weighted) -> dict[str, str]:
    """What all files say alike."""
    first: Mapping[str, str] = weighted[0][0].metadata
    return {
        key: value for key, value in first.items() if all(file.metadata.get(key) == value for file, _ in weighted[1:])
    }
