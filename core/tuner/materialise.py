"""Giving a network its weights: block by block, tensor by tensor, so that the host never holds two copies.

A family builds its networks on the meta device and hands over a lazy source of weights. Each tensor is
read, brought to its dtype and offered to the sinks (a quantiser, then the masters of an offloader, which gets what
the first made of it); what none of them takes becomes a plain parameter on the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tuner.errors import ModelError, nearest
from tuner.heap import given_back
from tuner.model import Network, Sink

SHOWN = 5
"""How many differing keys an error lists."""


@given_back()
def materialise(network: Network, *, device: torch.device, sinks: Sequence[Sink] = ()) -> None:
    """Fill ``network`` from its weight source.

    Raises ModelError that names the first missing, unexpected or mis-shaped tensors. Storage is always
    freshly allocated (64-byte aligned by torch's allocators): on CPU other offsets would change bits.
    """
    module = network.module
    expected = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    buffers = {name for name, _ in module.named_buffers()}
    seen: set[str] = set()
    for name, tensor in network.weights():
        if name in buffers:
            continue
        if name not in expected:
            raise _unexpected(network, name, expected)
        if tuple(tensor.shape) != expected[name]:
            raise ModelError(
                f"tensor {name!r} of network {network.name!r} has shape {tuple(tensor.shape)}",
                allowed=f"{expected[name]}, by the model's config.json",
                remedy="the weights belong to another size or flavour of the model: check the paths of the base model",
            )
        seen.add(name)
        tensor = tensor.to(network.dtype_of(name))
        path, _, leaf = name.rpartition(".")
        held = module.get_submodule(path)._parameters
        left: Tensor | None = tensor
        for sink in sinks:
            if left is not None and sink.take(module, name, left):
                left = held.get(leaf)  # what became of it: a quantised weight may live elsewhere
        if left is tensor:
            held[leaf] = _own(tensor, device)
    missing = sorted(set(expected) - seen)
    if missing:
        raise ModelError(
            f"the weights of network {network.name!r} lack {len(missing)} of {len(expected)} tensors",
            where=", ".join(missing[:SHOWN]) + (" …" if len(missing) > SHOWN else ""),
            remedy="the file is incomplete or another model's: fetch it again, or check the base model's paths",
        )
    for owner, name, buffer in _buffers(module):
        owner._buffers[name] = buffer.to(device)


def _own(tensor: Tensor, device: torch.device) -> nn.Parameter:
    """``tensor`` in storage of its own on ``device``, as a frozen parameter."""
    fresh = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    fresh.copy_(tensor)
    return nn.Parameter(fresh, requires_grad=False)


def _buffers(module: nn.Module) -> list[tuple[nn.Module, str, Tensor]]:
    return [
        (owner, name, buffer)
        for owner in module.modules()
        for name, buffer in owner._buffers.items()
        if buffer is not None
    ]


def _unexpected(network: Network, name: str, expected: dict[str, tuple[int, ...]]) -> ModelError:
    return ModelError(
        f"the weights of network {network.name!r} hold a tensor {name!r} that the network does not have",
        nearest=nearest(name, expected),
        remedy="the file belongs to another model or flavour: check the paths of the base model",
    )
