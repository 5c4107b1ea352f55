"""Whose turn it is, where a model has several networks to train: one is resident, and they take turns.

Pure arithmetic on the global step: a resumed run asks the same network. Each network counts its own steps, so its
learning-rate curve is that of a run of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

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

    Trained parameters stay where they are. A network with a residency keeps its weights on the host anyway.
    """
    if leaving is not None and leaving is not entering:
        leave(leaving)
    move(entering, device)


def leave(network: Network) -> None:
    """Move the frozen weights of ``network`` to the host."""
    move(network, torch.device("cpu"))


def move(network: Network, device: torch.device) -> None:
    """Move the frozen weights and buffers of ``network`` to ``device``."""
    if network.residency is not None:
        return
    groups = network.adapter.groups if network.adapter is not None else ()
    trained = {id(each) for group in groups for each in group.parameters.values()}
    for module in network.module.modules():
        for parameter in module._parameters.values():
            if parameter is not None and id(parameter) not in trained and parameter.device != device:
                parameter.data = parameter.data.to(device)
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device != device:
                module._buffers[name] = buffer.to(device)
