"""Counting samples and losses by noise level, on the device they are on."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tuner import processes

BINS = 10
"""Equal parts of the noise levels from 0 to 1."""


class Histogram:
    """How many samples were trained in each part, and the sum of their losses. Reading it is the only host read."""

    def __init__(self) -> None:
        self._counts = torch.zeros(BINS, dtype=torch.float64)
        self._losses = torch.zeros(BINS, dtype=torch.float64)

    def add(self, sigmas: Tensor, losses: Tensor) -> None:
        """Count samples: noise levels (B,) in [0, 1] and losses (B,)."""
        if self._counts.device != losses.device:
            self._counts, self._losses = self._counts.to(losses.device), self._losses.to(losses.device)
        part = (sigmas.to(losses.device) * BINS).long().clamp(0, BINS - 1)
        self._counts.index_add_(0, part, torch.ones_like(part, dtype=torch.float64))
        self._losses.index_add_(0, part, losses.detach().to(torch.float64))

    def take(self) -> dict[str, float]:
        """``samples/0.3`` and ``loss/0.3`` of the part from 0.3 to 0.4, of parts that have samples; begins anew.

        Of all processes together: each of them must call it.
        """
        state = self.state()
        self._counts.zero_()
        self._losses.zero_()
        found = {}
        for part, (count, loss) in enumerate(zip(state["counts"].tolist(), state["losses"].tolist(), strict=True)):
            if count:
                found[f"samples/{part / BINS:g}"] = count
                found[f"loss/{part / BINS:g}"] = loss / count
        return found

    def state(self) -> dict[str, Tensor]:
        """What is counted in all processes together, for a checkpoint: each of them must call it."""
        everywhere = processes.gather((self._counts.cpu(), self._losses.cpu()))
        counts, losses = (torch.stack(each).sum(0) for each in zip(*everywhere, strict=True))
        return {"counts": counts, "losses": losses}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take back what :meth:`state` gave: one process does, as it is of all of them."""
        if processes.launched()[0] == 0:
            self._counts, self._losses = state["counts"].clone(), state["losses"].clone()
