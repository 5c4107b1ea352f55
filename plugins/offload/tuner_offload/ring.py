"""The ring: the few device buffers through which all groups stream."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from tuner_offload.gradients import HostGradients
from tuner_offload.masters import Master
from tuner_offload.transfer import Copier


class Ring:
    """Device buffers of the largest group's size, and which group each of them holds.

    Networks that take turns share one ring. The tensors that view the buffers are made once, outside any forward:
    made in inference mode they could never be used in training. Each group has its own in each buffer: backward
    finds the gradient of a weight by the tensor that stood for it in the forward.
    """

    def __init__(self, count: int, device: torch.device, copier: Copier) -> None:
        self.copier = copier
        self.buffers = [torch.empty(0, dtype=torch.uint8, device=device) for _ in range(count)]
        self._masters: list[Master] = []
        self._gradients: list[HostGradients | None] = []
        self._values: list[list[Sequence[Tensor]]] = [[] for _ in self.buffers]
        self._holds: list[int | None] = []
        self._tickets: list[Any] = []
        self._waited: list[bool] = []
        self._clear()
        self.bytes_copied = 0
        """Bytes brought to the device since the start."""

    def add(self, masters: Sequence[Master]) -> int:
        """Let the groups of ``masters`` stream too; gives the number of the first of them."""
        first = len(self._masters)
        self._masters += masters
        device = self.buffers[0].device
        pinned = device.type == "cuda"
        self._gradients += [
            HostGradients(each, self.copier, pinned=pinned) if each.trained else None for each in masters
        ]
        size = max(master.nbytes for master in self._masters)
        if size > self.buffers[0].nbytes:
            self.buffers = [torch.empty(size, dtype=torch.uint8, device=device) for _ in self.buffers]
            self._values = [[] for _ in self.buffers]
        for buffer, values in zip(self.buffers, self._values, strict=True):
            values += [self._values_of(group, buffer) for group in range(len(values), len(self._masters))]
        self._clear()
        return first

    def _clear(self) -> None:
        self._holds = [None] * len(self.buffers)
        self._tickets = [None] * len(self.buffers)
        self._waited = [True] * len(self.buffers)

    def _values_of(self, group: int, buffer: Tensor) -> Sequence[Tensor]:
        master, gradients = self._masters[group], self._gradients[group]
        values = [entry.value(buffer) for entry in master.entries]
        for index, (value, hosted) in enumerate(zip(values, master.values, strict=True)):
            if gradients is not None and hosted.requires_grad:
                gradients.watch(index, value)
        return values

    @property
    def nbytes(self) -> int:
        """Bytes of the streamed weights on the device, at any time."""
        return sum(buffer.nbytes for buffer in self.buffers)

    def holds(self, group: int) -> bool:
        """Whether ``group`` is in the ring, or on its way."""
        return group in self._holds

    def forget(self, groups: range) -> None:
        """Take what the ring has of ``groups`` for stale: it is copied again when it is needed."""
        self._holds = [None if held in groups else held for held in self._holds]

    def load(self, group: int, keep: Collection[int]) -> bool:
        """Start to copy ``group`` over one that is not in ``keep``; False when there is none."""
        slot = next((slot for slot, held in enumerate(self._holds) if held is None or held not in keep), None)
        if slot is None:
            return False
        master = self._masters[group]
        self._tickets[slot] = self.copier.start(self.buffers[slot][: master.nbytes], master.buffer)
        self._waited[slot] = False
        self._holds[slot] = group
        self.bytes_copied += master.nbytes
        return True

    def values(self, group: int) -> Sequence[Tensor]:
        """The tensors of ``group`` on the device, in the order of its entries, ready to compute with."""
        slot = self._holds.index(group)
        if not self._waited[slot]:
            self.copier.wait(self._tickets[slot])
            self._waited[slot] = True
        return self._values[slot][group]
