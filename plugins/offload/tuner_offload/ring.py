"""The ring: the few device buffers through which all groups stream."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import nn

from tuner_offload.masters import Master
from tuner_offload.transfer import Copier


class Ring:
    """Device buffers of the largest group's size, and which group each of them holds.

    The parameters that view the buffers are made once, outside any forward: made in inference mode they
    could never be used in training.
    """

    def __init__(self, masters: Sequence[Master], count: int, device: torch.device, copier: Copier) -> None:
        self.masters = masters
        self._copier = copier
        size = max(master.nbytes for master in masters)
        self.buffers = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(min(count, len(masters)))]
        layouts = {master.layout: master.entries for master in masters}
        self._views = [
            {layout: [entry.view(buffer) for entry in entries] for layout, entries in layouts.items()}
            for buffer in self.buffers
        ]
        self._holds: list[int | None] = [None] * len(self.buffers)
        self._tickets: list[Any] = [None] * len(self.buffers)
        self._waited = [True] * len(self.buffers)
        self.bytes_copied = 0
        """Bytes brought to the device since the start."""

    @property
    def nbytes(self) -> int:
        """Bytes of the frozen base on the device, at any time."""
        return sum(buffer.nbytes for buffer in self.buffers)

    def holds(self, group: int) -> bool:
        """Whether ``group`` is in the ring, or on its way."""
        return group in self._holds

    def load(self, group: int, keep: Collection[int]) -> bool:
        """Start to copy ``group`` over one that is not in ``keep``; False when there is none."""
        slot = next((slot for slot, held in enumerate(self._holds) if held is None or held not in keep), None)
        if slot is None:
            return False
        master = self.masters[group]
        self._tickets[slot] = self._copier.start(self.buffers[slot][: master.nbytes], master.buffer)
        self._waited[slot] = False
        self._holds[slot] = group
        self.bytes_copied += master.nbytes
        return True

    def parameters(self, group: int) -> Sequence[nn.Parameter]:
        """The parameters of ``group`` on the device, in the order of its entries, ready to compute with."""
        slot = self._holds.index(group)
        if not self._waited[slot]:
            self._copier.wait(self._tickets[slot])
            self._waited[slot] = True
        return self._views[slot][self.masters[group].layout]
