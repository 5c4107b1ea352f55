"""Making updates LoRA of a given rank by singular value decomposition, and saying how much was lost."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from tuner.builtin.adapter_file import AdapterFile, Shapes, Update, low_rank
from tuner.errors import CheckpointError

LARGE = 512
"""A matrix with a shorter side than this is decomposed exactly."""
OVERSAMPLED, PASSES = 32, 4
"""Of the randomised decomposition (arXiv:0909.4061): columns beyond the rank, and passes over the matrix."""
Errors = Mapping[str, tuple[float, float]]
"""Module -> (norm of what was lost, norm of the update)."""


def as_low_rank(delta: Tensor, rank: int) -> tuple[Update, tuple[float, float]]:
    """The LoRA of at most ``rank`` nearest to ``delta`` (out, in, *kernel), and (norm of the rest, norm of ``delta``).

    float32; randomised, from a seed of its own, where the matrix is large.
    """
    matrix = delta.flatten(1).float()
    rank = min(rank, *matrix.shape)
    if min(matrix.shape) > max(LARGE, 2 * (rank + OVERSAMPLED)):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            left, values, right = torch.svd_lowrank(matrix, q=rank + OVERSAMPLED, niter=PASSES)
            right = right.mT
    else:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    update = _factors(left, values, right, rank, delta.shape)
    rest = matrix - update.tensors["lora_up"].flatten(1) @ update.tensors["lora_down"].flatten(1)
    return update, (float(rest.norm()), float(matrix.norm()))


def recompressed(down: Tensor, up: Tensor, rank: int) -> tuple[Update, tuple[float, float]]:
    """The same for the product of ``up`` (out, R) and ``down`` (R, in, *kernel), which is never written out."""
    across, along = torch.linalg.qr(up.flatten(1).double()), torch.linalg.qr(down.flatten(1).double().mT)
    left, values, right = torch.linalg.svd(across.R @ along.R.mT, full_matrices=False)
    rank = min(rank, len(values))
    shape = (up.shape[0], *down.shape[1:])
    update = _factors(across.Q @ left, values, right @ along.Q.mT, rank, shape)
    return update, (float(values[rank:].norm()), float(values.norm()))


def _factors(left: Tensor, values: Tensor, right: Tensor, rank: int, shape: Iterable[int]) -> Update:
    """Both factors take the root of the singular values, so that neither is out of proportion."""
    rows, *others = shape
    root = values[:rank].sqrt()
    up, down = left[:, :rank] * root, root[:, None] * right[:rank]
    return low_rank(
        down.reshape(rank, *others).float().contiguous(),
        up.reshape(rows, rank, *[1] * (len(others) - 1)).float().contiguous(),
        alpha=float(rank),
    )


def limited(
    file: AdapterFile, shapes: Shapes, rank: int, progress: Callable[[], None] = lambda: None
) -> tuple[AdapterFile, Errors]:
    """The file with every matrix a LoRA of at most ``rank``, and what that lost, of the modules that it changed.

    Differences of vectors stay. Raises CheckpointError for a DoRA, whose difference depends on the base.
    """
    updates: dict[str, Update] = {}
    errors: dict[str, tuple[float, float]] = {}
    for module, update in file.updates.items():
        progress()
        if update.dora_scale is not None:
            raise CheckpointError(
                f"{module} is DoRA: what it adds depends on the weights of the base model",
                remedy="merge it into the base (tuner merge --into), then extract a LoRA (tuner extract)",
            )
        shape = shapes[module]
        if len(shape) < 2 or (
            update.kind == "lora" and "lora_mid" not in update.tensors and (update.rank or 0) <= rank
        ):
            updates[module] = update
        elif update.kind == "lora" and "lora_mid" not in update.tensors:
            down, up = update.tensors["lora_down"], update.tensors["lora_up"]
            updates[module], errors[module] = recompressed(down * update.scale, up, rank)
        else:
            updates[module], errors[module] = as_low_rank(update.delta(shape), rank)
    return replace(file, updates=updates), errors


def kind_of(module: str) -> str:
    """A module's name without the number of its block: ``blocks.3.attn1.to_q`` -> ``attn1.to_q``."""
    return re.sub(r"^.*?\.\d+\.", "", module)


def by_kind(errors: Errors) -> dict[str, tuple[int, float, float]]:
    """Kind of module -> (how many, relative error of all together, largest of one)."""
    grouped: dict[str, list[tuple[float, float]]] = {}
    for module, each in errors.items():
        grouped.setdefault(kind_of(module), []).append(each)
    return {
        kind: (len(all_), total_error(all_), max(lost / whole if whole else 0.0 for lost, whole in all_))
        for kind, all_ in grouped.items()
    }


def total_error(errors: Iterable[tuple[float, float]]) -> float:
    """The relative error of all updates together, in the Frobenius norm."""
    pairs = list(errors)
    whole = sum(norm**2 for _, norm in pairs) ** 0.5
    return sum(lost**2 for lost, _ in pairs) ** 0.5 / whole if whole else 0.0
