"""Adapters beside the layers of a network: what a layer gives, plus a strength times what the adapter adds.

The weights themselves stay as they are, so they may be quantised or streamed, and another strength costs nothing:
at 0 the network is the base, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tuner.builtin.adapter_file import AdapterFile, Update
from tuner.errors import CheckpointError
from tuner.model import Network

Term = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""(layer, its input, its output) -> what is added to that output at full strength."""
PLAIN = {"lora_down", "lora_up"}


@dataclass
class Strength:
    """How much of all adapters is added, on top of each one's own share."""

    value: float = 1.0


def attach(
    network: Network, files: Sequence[tuple[AdapterFile, float]], strength: Strength, device: torch.device
) -> None:
    """Add adapters to the layers of ``network``, each file times its share times ``strength``.

    A matrix or kernel gets a branch of its own; the weight of a norm is another one while its block computes. The norms
    of a DoRA are taken of the base's weights as they are in its files. Raises CheckpointError where a file does not
    fit the network's layers.
    """
    for file, share in files:
        base = _base_weights(network, file)
        for module in dict.fromkeys([*file.updates, *file.biases]):
            layer = _layer(network.module, module)
            update, bias = file.updates.get(module), file.biases.get(module)
            if _is_linear_map(layer):
                _add(layer, _terms(module, update, bias, base, device), share, strength)
            else:
                changes = {"weight": None if update is None else update.product(), "bias": bias}
                given = {name: each.to(device) for name, each in changes.items() if each is not None}
                _replace(layer, given, share, strength, around=_block_of(network, layer))


def _layer(module: nn.Module, name: str) -> nn.Module:
    try:
        return module.get_submodule(name)
    except AttributeError:
        raise CheckpointError(f"the network has no module {name!r}, which the adapter changes") from None


def _is_linear_map(layer: nn.Module) -> bool:
    """Whether it is a matrix or a convolution; what else has a weight is a norm."""
    return isinstance(layer, nn.Linear) or hasattr(layer, "_conv_forward")


def _terms(
    module: str,
    update: Update | None,
    bias: Tensor | None,
    base: Mapping[str, Tensor],
    device: torch.device,
) -> list[Term]:
    """What a file adds to the output of one matrix or kernel."""
    found: list[Term] = []
    if update is not None and update.dora_scale is not None:
        weight = base[f"{module}.weight"]
        if update.by_rows:
            found.append(_decomposed(update, weight, base.get(f"{module}.bias"), device))
        else:
            found.append(_product(_on(Update({"diff": update.delta(weight.shape, base=weight)}), device)))
    elif update is not None:
        found.append(_product(_on(update, device)))
    if bias is not None:
        added = bias.to(device)
        found.append(lambda layer, rows, output: added.to(output.dtype).reshape(-1, *[1] * _kernel_axes(layer)))
    return found


def _on(update: Update, device: torch.device) -> Update:
    return replace(update, tensors={name: tensor.to(device) for name, tensor in update.tensors.items()})


def _product(update: Update) -> Term:
    """The layer with the update as its weight, without its bias."""

    def low_rank(layer: nn.Module, rows: Tensor, output: Tensor) -> Tensor:
        down, up = (update.tensors[name].flatten(1).to(rows.dtype) for name in ("lora_down", "lora_up"))
        return functional.linear(functional.linear(rows, down), up) * update.scale

    def whole(layer: Any, rows: Tensor, output: Tensor) -> Tensor:
        delta = update.product().to(rows.dtype)
        if isinstance(layer, nn.Linear):
            return functional.linear(rows, delta.reshape(layer.out_features, layer.in_features))
        shape = (layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size)
        convolved: Tensor = layer._conv_forward(rows, delta.reshape(shape), None)
        return convolved

    def term(layer: nn.Module, rows: Tensor, output: Tensor) -> Tensor:
        plain = isinstance(layer, nn.Linear) and set(update.tensors) == PLAIN
        return (low_rank if plain else whole)(layer, rows, output)

    return term


def _kernel_axes(layer: Any) -> int:
    """Axes of the output behind its channels: none of a matrix's."""
    return 0 if isinstance(layer, nn.Linear) else len(layer.kernel_size)


def _decomposed(update: Update, weight: Tensor, bias: Tensor | None, device: torch.device) -> Term:
    """A DoRA of the weight's rows (arXiv:2402.09353, eq. 5), without its weight: m / |W + BA| times each output."""
    assert update.dora_scale is not None
    merged = weight.float() + update.product().reshape(weight.shape)
    gain = (update.dora_scale.float().flatten() / merged.flatten(1).norm(dim=1)).to(device)
    constant = None if bias is None else bias.float().to(device)
    product = _product(_on(replace(update, dora_scale=None), device))

    def term(layer: nn.Module, rows: Tensor, output: Tensor) -> Tensor:
        shape = (-1, *[1] * _kernel_axes(layer))
        linear = output if constant is None else output - constant.reshape(shape)
        scale = gain.reshape(shape)
        added: Tensor = (scale - 1) * linear + scale * product(layer, rows, output)
        return added

    return term


def _add(layer: nn.Module, terms: Iterable[Term], share: float, strength: Strength) -> None:
    """Add ``terms`` to what ``layer`` gives."""
    every = tuple(terms)

    def hook(layer: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        factor = share * strength.value
        if factor == 0:
            return None
        added = every[0](layer, given[0], output)
        for term in every[1:]:
            added = added + term(layer, given[0], output)
        return output + (added * factor).to(output.dtype)

    layer.register_forward_hook(hook)


def _block_of(network: Network, layer: nn.Module) -> nn.Module:
    """The block that ``layer`` is in, or itself: a block may read the weights of its norms without calling them."""
    return next((block for block in network.stack.blocks if any(each is layer for each in block.modules())), layer)


def _replace(
    layer: nn.Module, added: Mapping[str, Tensor], share: float, strength: Strength, *, around: nn.Module
) -> None:
    """While ``around`` computes, let ``layer`` have other parameters: its own and what is ``added`` to them."""
    for name in added:
        if layer._parameters.get(name) is None:
            raise CheckpointError(f"the adapter changes the {name} of a {type(layer).__name__} that has none")
    former: dict[str, nn.Parameter | None] = {}

    def before(module: nn.Module, given: tuple[Any, ...]) -> None:
        factor = share * strength.value
        for name, delta in added.items() if factor else ():
            own = former[name] = layer._parameters[name]
            assert own is not None
            changed = own.data.float() + factor * delta.float().reshape(own.shape)
            layer._parameters[name] = nn.Parameter(changed.to(own.dtype), requires_grad=False)

    def after(module: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        layer._parameters.update(former)
        former.clear()

    around.register_forward_pre_hook(before)
    # In front: where several files change one norm, the last to change it is the first to put it back.
    around.register_forward_hook(after, prepend=True, always_call=True)


def _base_weights(network: Network, file: AdapterFile) -> dict[str, Tensor]:
    """Weights and biases of the base, on the CPU, of those layers whose update depends on them."""
    modules = {module for module, update in file.updates.items() if update.dora_scale is not None}
    wanted = {f"{module}.{leaf}" for module in modules for leaf in ("weight", "bias")}
    return {name: tensor for name, tensor in network.weights() if name in wanted} if wanted else {}
