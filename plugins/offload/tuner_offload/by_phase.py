"""Model offload: the denoiser waits on the host while another model works on the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from tuner.model import Component, Model, Network
from tuner.train import turns

if TYPE_CHECKING:
    from tuner.run import Run


def take_turns(run: Run, model: Model) -> None:
    """Let the denoiser leave the device for as long as an encoder or decoder of ``model`` is loaded."""
    for name in sorted({name for names in model.spec.encoders.values() for name in names}):
        component = model.components[name]
        model.components[name] = replace(component, around=partial(_alone, run, model, component))


@contextmanager
def _alone(run: Run, model: Model, component: Component, _: Component) -> Iterator[Any]:
    """``component``, with the frozen weights of every network that is on the device on the host meanwhile."""
    with ExitStack() as phases:
        phases.enter_context(_away(run, model))
        yield phases.enter_context(component.phase())


@contextmanager
def _away(run: Run, model: Model) -> Iterator[None]:
    away = [network for network in model.networks.values() if _is_on(network, run.device)]
    for network in away:
        turns.leave(network)
    if away and run.device.type == "cuda":
        torch.cuda.empty_cache()  # what the decoder needs are other sizes
    try:
        yield
    finally:
        for network in away:
            turns.move(network, run.device)


def _is_on(network: Network, device: torch.device) -> bool:
    """Whether frozen weights of ``network`` are on ``device``; before it is materialised they are nowhere."""
    return any(not each.requires_grad and each.device == device for each in network.module.parameters())
