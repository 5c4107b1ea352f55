"""Rendering with both experts of Wan 2.2: one on the device at a time, exchanged once, at the boundary."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from tuner.model import Network
from tuner.train import turns

HOST = torch.device("cpu")


@dataclass(frozen=True)
class Expert:
    """One denoiser, and how its weights are moved."""

    module: nn.Module
    move: Callable[[torch.device], object]

    @classmethod
    def of(cls, network: Network) -> Expert:
        """A network of the model: what is trained of it stays where it is."""
        return cls(network.module, partial(turns.move, network))


@dataclass(frozen=True)
class Pair:
    """The expert of high noise and that of low noise, and the level at which the first hands over."""

    high: Expert
    low: Expert
    boundary: float


@contextmanager
def one_resident(pair: Pair, device: torch.device, *, then: Expert | None) -> Iterator[None]:
    """Within, whichever expert is called is on ``device`` and the other on the host; ``then`` is on it afterwards.

    The high-noise expert, which a sampler calls first, is brought at once: a pipeline takes its device from it.
    """
    resident: list[Expert] = []

    def bring(expert: Expert) -> None:
        if resident == [expert]:
            return
        for other in (pair.high, pair.low):
            if other is not expert:
                other.move(HOST)
        expert.move(device)
        resident[:] = [expert]

    handles = [_before(expert, bring) for expert in (pair.high, pair.low)]
    try:
        bring(pair.high)
        yield
    finally:
        for handle in handles:
            handle.remove()
        if then is not None:
            bring(then)


def _before(expert: Expert, bring: Callable[[Expert], None]) -> Any:
    def hook(module: nn.Module, arguments: Sequence[Any]) -> None:
        bring(expert)

    return expert.module.register_forward_pre_hook(hook)
