"""Cheap checks that keep a run from training on nonsense without a word."""

from __future__ import annotations

from collections.abc import Set

from torch import Tensor

from tuner.errors import TrainingError
from tuner.model import Network

SHOWN = 5


def check_gradient_coverage(network: Network, reached: Set[Tensor] = frozenset()) -> None:
    """After the first backward every trainable tensor must have a gradient.

    A kernel without a backward leaves most LoRA tensors untrained while the loss looks fine. Raises
    TrainingError that lists the parameters and what rewrote the network.

    ``reached``: parameters whose gradient is gone already, because they were stepped in backward.
    """
    adapter = network.adapter
    if adapter is None:
        return
    trained = [(name, each) for group in adapter.groups for name, each in group.parameters.items()]
    without = [name for name, each in trained if each.grad is None and each not in reached]
    if without:
        raise TrainingError(
            f"{len(without)} of {len(trained)} trained tensors of network {network.name!r} got no gradient in the "
            "first step",
            where=", ".join(without[:SHOWN]) + (" …" if len(without) > SHOWN else ""),
            remedy="an attention kernel without a backward, or a plugin that rewrites modules, cuts the gradient: "
            "train with attention_mechanism: diffusers, or unload plugins one by one with --without",
        )
