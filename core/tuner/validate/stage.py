"""The validation stage: every ``validate`` hook, in evaluation mode, leaving no trace on the training."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import torch

from tuner import variants
from tuner.attention import Attention
from tuner.attention_switch import validation_backend
from tuner.blocks import StepContext
from tuner.model import Model

if TYPE_CHECKING:
    from tuner.manager import Manager
    from tuner.run import Run
    from tuner.train.engine import Engine


def validate(
    run: Run,
    model: Model,
    manager: Manager,
    engine: Engine,
    attention: Attention | None = None,
    asked: Collection[str] | None = None,
    weights: variants.Variants | None = None,
) -> dict[str, float]:
    """Ask every plugin what it sees, with ``attention``'s kernel; returns the numbers as ``plugin/key``.

    Other weights than the trained ones are looked at in turn: ``plugin/key@name``.

    ``asked``: names of the plugins to ask; None is all. ``weights``: those to look at; None is what is offered.
    """
    with ExitStack() as stack:
        stack.enter_context(untouched(model, engine.device))
        stack.enter_context(engine.autocast())
        for network in model.networks.values():
            if attention is not None:
                stack.enter_context(validation_backend(network, attention.inference))
        metrics: dict[str, float] = {}
        found = weights or variants.offered(run, model, manager, "validate")
        for name in found:
            with variants.in_place(run, found, name):
                metrics |= _asked(run, model, manager, asked)
    return metrics


def _asked(run: Run, model: Model, manager: Manager, asked: Collection[str] | None) -> Mapping[str, float]:
    """What the plugins see in the weights that are in place; whoever listens is told."""
    mark = f"@{run.variant}" if run.variant else ""
    metrics: dict[str, float] = {}
    for plugin, answer in manager.collect("validate", only=asked, run=run, model=model):
        if answer is None:
            continue
        own = mark if answer.of_weights else ""
        metrics |= {f"{plugin}/{key}{own}": float(value) for key, value in answer.metrics.items()}
        if run.is_main:
            manager.notify("on_validation", run=run, plugin=plugin, validation=answer)
    return metrics


@contextmanager
def untouched(model: Model, device: torch.device) -> Iterator[None]:
    """Evaluation mode without gradients, routes or checkpointing; modes, contexts and generators are restored."""
    networks = list(model.networks.values())
    before = [(network, network.trampoline.context, _modes(network.module)) for network in networks]
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        try:
            for network, _, _ in before:
                network.module.eval()
                network.trampoline.context = StepContext(residency=network.residency, sequence=network.sequence)
            yield
        finally:
            for network, context, modes in before:
                network.trampoline.context = context
                for module, training in modes:
                    module.training = training


def _modes(module: torch.nn.Module) -> list[tuple[torch.nn.Module, bool]]:
    return [(each, each.training) for each in module.modules()]
