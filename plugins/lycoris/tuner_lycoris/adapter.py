"""Attaching LyCORIS factors to a network, whatever the network is.

The factors are float32 whatever the base is stored in, live on the training device wherever the base lives, and are
initialised on the CPU: their start depends on neither.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lycoris.logging import logger
from torch import Tensor, nn

from tuner.builtin.adapter_state import copy_into
from tuner.model import Adapter, Network, ParameterGroup
from tuner_lycoris.factors import CONVOLUTIONS, KINDS, Factors
from tuner_lycoris.settings import LycorisSettings
from tuner_lycoris.targets import Chosen, Kind, Tree

CHILD = "lycoris"
"""Name of an update in the module that it belongs to."""


class Update(nn.Module):
    """What is added to one module's outputs.

    Arguments
        factors: the trained tensors.
        settings: multiplier and dropouts, which act in training only.
    """

    def __init__(self, factors: Factors, settings: LycorisSettings) -> None:
        super().__init__()
        self.factors, self.settings = factors, settings
        self.enabled = True

    def added(self, base: nn.Module, inputs: Tensor, outputs: Tensor) -> Tensor:
        """``outputs`` of ``base`` for ``inputs`` with the update added."""
        if not self.enabled:
            return outputs
        linear = isinstance(base, nn.Linear)
        update = self.factors.update(inputs) if linear else _convolved(base, inputs, self.factors)
        if self.training:
            update = self._dropped(update, channels=-1 if linear else 1)
        if self.settings.multiplier != 1:
            update = update * self.settings.multiplier
        return outputs + update.to(outputs.dtype)

    def _dropped(self, update: Tensor, channels: int) -> Tensor:
        """``update`` with outputs (``dropout``), rows of its matrix (``rank_dropout``) or all of it left out."""
        given = self.settings
        if given.module_dropout and torch.rand(()) < given.module_dropout:  # on the host: no synchronisation
            return update * 0  # not none: every trained tensor gets a gradient in every step
        if given.rank_dropout:
            shape = [1] * update.ndim
            shape[channels] = update.shape[channels]
            kept = (torch.rand(shape, device=update.device) > given.rank_dropout).to(update.dtype)
            update = update * (kept / kept.mean().clamp_min(1 / kept.numel()) if given.rank_dropout_scale else kept)
        return nn.functional.dropout(update, given.dropout) if given.dropout else update


def _convolved(base: nn.Module, inputs: Tensor, factors: Factors) -> Tensor:
    assert isinstance(base, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    convolve = next(function for kind, function in CONVOLUTIONS.items() if isinstance(base, kind))
    weight, bias = factors.weight(inputs.dtype), factors.bias(inputs.dtype)
    result: Tensor = convolve(inputs, weight, bias, base.stride, base.padding, base.dilation, base.groups)
    return result


def _add(base: nn.Module, arguments: tuple[Any, ...], outputs: Tensor) -> Tensor:
    """Forward hook: around whatever the base layer's forward is, that of a quantiser or an offloader too."""
    update = base._modules[CHILD]
    assert isinstance(update, Update)
    return update.added(base, arguments[0], outputs)


def tree(module: nn.Module) -> Tree:
    """``module`` by names. A quantised Linear layer is a ``Linear`` to the settings."""
    kinds: dict[str, Kind] = {}
    classes: dict[str, str] = {}
    for name, each in module.named_modules():
        classes[name] = "Linear" if isinstance(each, nn.Linear) else type(each).__name__
        if isinstance(each, nn.Linear):
            kinds[name] = "linear"
        elif isinstance(each, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            # The library looks at the first axis alone: Wan's patches, (1, 2, 2), take the options of matrices.
            kinds[name] = "linear" if each.kernel_size[0] == 1 else "kernel"
    return Tree(classes, kinds)


def attach(network: Network, chosen: Mapping[str, Chosen], settings: LycorisSettings, device: torch.device) -> Adapter:
    """Freeze ``network`` and give the modules named in ``chosen`` updates on ``device``.

    Torch's global CPU generator is drawn from.
    """
    network.module.requires_grad_(False)
    updates: dict[str, Update] = {}
    with _quiet():
        for name, options in chosen.items():
            base = network.module.get_submodule(name)
            factors = KINDS[options.algo](base, options).to(device, torch.float32)
            updates[name] = Update(factors, settings).train(base.training)
            base.add_module(CHILD, updates[name])
            base.register_forward_hook(_add)
    parameters = {
        f"{name}.{tensor}": each
        for name, update in updates.items()
        for tensor, each in update.factors.trained().items()
    }
    return Adapter(
        kind="lycoris",
        groups=(ParameterGroup("lycoris", parameters),),
        state=lambda: {name: parameter.detach() for name, parameter in parameters.items()},
        load=lambda state: copy_into(parameters, state, what=f"LyCORIS of network {network.name!r}"),
        settings={"algo": settings.algo or "lora", "rank": settings.linear_dim, "alpha": settings.linear_alpha},
        disabled=lambda: _without(list(updates.values())),
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """While entered, the library prints no warnings, such as one for each width at which LoKr is whole."""
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def updates(module: nn.Module) -> dict[str, Update]:
    """Every update in ``module``, by the name of the module that it belongs to."""
    found = ((name, each) for name, each in module.named_modules() if isinstance(each, Update))
    return {name.removesuffix("." + CHILD): each for name, each in found}


@contextmanager
def _without(found: list[Update]) -> Iterator[None]:
    """While entered, nothing is added."""
    before = [each.enabled for each in found]
    try:
        for each in found:
            each.enabled = False
        yield
    finally:
        for each, enabled in zip(found, before, strict=True):
            each.enabled = enabled
