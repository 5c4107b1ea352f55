"""Copying a saved state into tensors that exist: their storage stays, for optimizers, compilers and bit-equality."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tuner.errors import CheckpointError
from tuner.sharded import cut_like

SHOWN = 3
"""How many differing keys an error names."""


@torch.no_grad()
def copy_into(tensors: Mapping[str, Tensor], state: Mapping[str, Tensor], *, what: str) -> None:
    """Copy ``state`` into ``tensors`` in place, all of it or nothing.

    Raises CheckpointError that names the first keys that are missing, unexpected or of another shape.
    """
    missing, unexpected = sorted(set(tensors) - set(state)), sorted(set(state) - set(tensors))
    if missing or unexpected:
        raise _refusal(what, [f"{name} is missing" for name in missing] + [f"{name} is unknown" for name in unexpected])
    wrong = [
        f"{name} has shape {tuple(state[name].shape)}, not {tuple(tensor.shape)}"
        for name, tensor in tensors.items()
        if state[name].shape != tensor.shape
    ]
    if wrong:
        raise _refusal(what, wrong)
    for name, tensor in tensors.items():
        tensor.copy_(cut_like(state[name], tensor))


def _refusal(what: str, differences: list[str]) -> CheckpointError:
    shown = "; ".join(differences[:SHOWN]) + (
        f"; and {len(differences) - SHOWN} more" if len(differences) > SHOWN else ""
    )
    return CheckpointError(
        f"the saved tensors do not fit the {what}: {shown}",
        remedy="use the adapter settings (rank, targets, model) that the saved run was started with",
    )
