"""``fully_shard`` of a network's blocks and of the network around them.

Spread are the weights of the most frequent dtype among the large ones: frozen ones, and those that full fine-tuning
trains. What an adapter trains, and the few weights of another dtype (torch wants one dtype where gradients are), stay
whole in every process: they are small, and are kept alike by summing their gradients.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard

from tuner.builtin.adapter_state import copy_into
from tuner.model import Adapter, Network


class HostSink:
    """Keeps weights on the host as they are read: each block goes to the devices in parts."""

    def take(self, module: nn.Module, name: str, tensor: Tensor) -> bool:
        """Take every weight."""
        path, _, leaf = name.rpartition(".")
        module.get_submodule(path)._parameters[leaf] = nn.Parameter(tensor.clone(), requires_grad=False)
        return True


class Shards:
    """The sharded modules of a network (see ``tuner.model.Sharding``)."""

    def __init__(self, modules: Sequence[FSDPModule], saves_parts: bool) -> None:
        self._modules = modules
        self.saves_parts = saves_parts

    def synchronise(self, last: bool) -> None:
        """Send gradients after the last micro-batch of a step only."""
        for module in self._modules:
            module.set_requires_gradient_sync(last, recurse=False)


def shard(
    network: Network, device: torch.device, reshard_after_forward: bool, *, cpu_offload: bool, saves_parts: bool
) -> Adapter | None:
    """Spread ``network`` over the processes, in place. Returns its adapter over the parameters that came of it."""
    from torch import distributed

    # What the network returns is a view of its last tensor, and nobody writes into it.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    whole = _kept_whole(network)
    _to_device(network.module, whole, device)
    homes = _homes(network.module)
    names = _names_of_state(network.adapter, whole)
    offload = CPUOffloadPolicy(pin_memory=device.type == "cuda") if cpu_offload else OffloadPolicy()
    options: dict[str, Any] = {"mesh": mesh, "ignored_params": whole, "offload_policy": offload}
    for block in network.stack.blocks:
        fully_shard(block, reshard_after_forward=reshard_after_forward, **options)
    fully_shard(network.module, reshard_after_forward=False, **options)
    if any(each.shape and each.shape[0] % mesh.size() for each in network.module.parameters() if each not in whole):
        compile_apart()
    modules = [module for module in network.module.modules() if isinstance(module, FSDPModule)]
    for module in modules:
        module.set_gradient_divide_factor(1.0)  # the loss is scaled by the samples of all processes
        module.set_force_sum_reduction_for_comms(True)
    network.sharding = Shards(modules, saves_parts)
    return None if network.adapter is None or not names else _over_parts(network, network.adapter, homes, names)


def compile_apart() -> None:
    """Have each process compile for itself, as torchao's optimizers do.

    torch's cache of compiled graphs on the disk knows a spread tensor by its whole shape: of parts of unequal size one
    process would be given the graph of another's.
    """
    import torch._functorch.config
    import torch._inductor.config

    torch._functorch.config.enable_autograd_cache = False
    torch._inductor.config.fx_graph_cache = False


def _kept_whole(network: Network) -> set[nn.Parameter]:
    """The parameters that every process keeps: an adapter's own, and those of a rare dtype."""
    base = [each for each in network.module.parameters() if each.is_floating_point()]
    adapter = network.adapter
    own = set() if adapter is None or adapter.kind == "full" else _trained(adapter)
    sizes: Counter[torch.dtype] = Counter()
    for each in base:
        if each not in own:
            sizes[each.dtype] += each.numel()
    [(frequent, _)] = sizes.most_common(1)
    return own | {each for each in network.module.parameters() if each.dtype != frequent}


def _trained(adapter: Adapter) -> set[nn.Parameter]:
    return {parameter for group in adapter.groups for parameter in group.parameters.values()}


def _to_device(module: nn.Module, whole: set[nn.Parameter], device: torch.device) -> None:
    """Bring what is not spread to the device; torch leaves it where it is."""
    for parameter in whole:
        parameter.data = parameter.data.to(device)


def _homes(module: nn.Module) -> dict[int, tuple[nn.Module, str]]:
    """Where each parameter hangs, by its identity."""
    return {
        id(parameter): (owner, name)
        for owner in module.modules()
        for name, parameter in owner._parameters.items()
        if parameter is not None
    }


def _names_of_state(adapter: Adapter | None, whole: set[nn.Parameter]) -> dict[str, int]:
    """Identity of each trained parameter by its name in the adapter's state; empty where none of them is spread."""
    if adapter is None or not _trained(adapter) - whole:
        return {}
    identity = {each.data_ptr(): id(each) for each in _trained(adapter)}
    return {name: identity[tensor.data_ptr()] for name, tensor in adapter.state().items()}


def _over_parts(
    network: Network, adapter: Adapter, homes: Mapping[int, tuple[nn.Module, str]], names: Mapping[str, int]
) -> Adapter:
    """The adapter over the parameters that hang now where its own did; nothing holds those any more."""

    def now(identity: int) -> nn.Parameter:
        owner, name = homes[identity]
        return owner.get_parameter(name)

    parts = {name: now(identity) for name, identity in names.items()}
    groups = tuple(
        replace(group, parameters={name: now(id(each)) for name, each in group.parameters.items()})
        for group in adapter.groups
    )
    what = f"weights of network {network.name!r}"
    return replace(
        adapter,
        groups=groups,
        state=lambda: {name: parameter.detach() for name, parameter in parts.items()},
        load=lambda state: copy_into(parts, state, what=what),
    )
