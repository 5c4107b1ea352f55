"""Whose turn it is, where a model has several networks to train: one is resident, and they take turns.

Pure arithmetic on the global step: a resumed run asks the same network. Each network counts its own steps, so its
learning-rate curve is that of a run of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from tuner.model import Network


@dataclass(frozen=True)
class Turns:
    """Networks in turn, ``every`` optimizer steps each."""

    networks: tuple[str, ...]
    every: int

    def at(self, step: int) -> str:
        """The network that optimizer step ``step`` (from 0) trains."""
        return self.networks[step // self.every % len(self.networks)]

    def steps_of(self, network: str, step: int) -> int:
        """How many of the steps before ``step`` train ``network``."""
        cycles, rest = divmod(step, self.every * len(self.networks))
        before = self.networks.index(network) * self.every
        return cycles * self.every + min(max(rest - before, 0), self.every)


def hand_over(leaving: Network | None, entering: Network, device: torch.device) -> None:
    """Bring the frozen weights of ``entering`` to ``device`` once those of ``leaving`` have gone to the host.

    Trained parameters stay where they are, and so do weights that a residency keeps on the host.
    """
    if leaving is not None and leaving is not entering:
        leave(leaving)
    move(entering, device)


def leave(network: Network) -> None:
    """Move the frozen weights of ``network`` to the host."""
    move(network, torch.device("cpu"))


def move(network: Network, device: torch.device) -> None:
    """Move the frozen weights and buffers of ``network`` to ``device``, but those that its residency moves."""
    if network.sharding is not None:
        return  # each process holds little of it
    groups = network.adapter.groups if network.adapter is not None else ()
    staying = {id(each) for group in groups for each in group.parameters.values()}
    if network.residency is not None:
        staying |= network.residency.streamed
    for module in network.module.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in staying and parameter.device != device:
                moved = parameter.to(device)  # not by its data: a quantised weight is made of several tensors
                kept = moved if isinstance(moved, nn.Parameter) else nn.Parameter(moved, requires_grad=False)
                module._parameters[name] = kept
        for name, buffer in module._buffers.items():
            if buffer is not None and id(buffer) not in staying and buffer.device != device:
                module._buffers[name] = buffer.to(device)
