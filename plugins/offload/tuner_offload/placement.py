"""Putting a network's blocks into host memory: while its weights are read, or afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from tuner.errors import ConfigError, PluginError
from tuner.model import Network, Stage, Transform
from tuner_offload.masters import Master, plan
from tuner_offload.ring import Ring
from tuner_offload.streaming import BlockStreaming
from tuner_offload.transfer import Copier, InlineCopier, StreamCopier

if TYPE_CHECKING:
    from tuner.run import Run

GIB = 2**30


class MasterSink:
    """Takes each block weight as it is read, straight into its master: the device never sees it whole."""

    def __init__(self, network: Network, blocks_per_group: int, *, pinned: bool) -> None:
        groups = plan(network, blocks_per_group, wanted=lambda _: True, dtype_of=lambda name, _: network.dtype_of(name))
        self.masters = [Master(entries, pinned=pinned) for entries in groups]
        self._places = {
            entry.name: (master, index) for master in self.masters for index, entry in enumerate(master.entries)
        }

    def take(self, module: nn.Module, name: str, tensor: Tensor) -> bool:
        """Take ``tensor`` if it belongs to a block."""
        place = self._places.get(name)
        if place is None:
            return False
        master, index = place
        master.fill(index, tensor)
        return True


def group_offload(run: Run, *, blocks_per_group: int, ring_groups: int, use_stream: bool) -> Transform:
    """The transform that makes a network's frozen blocks stream through ``ring_groups`` device buffers."""
    sinks: dict[str, MasterSink] = {}

    def sink(network: Network) -> MasterSink:
        sinks[network.name] = MasterSink(network, blocks_per_group, pinned=run.device.type == "cuda")
        return sinks[network.name]

    def apply(network: Network) -> None:
        taken = sinks.pop(network.name, None)
        masters = (
            masters_of(network, blocks_per_group, pinned=run.device.type == "cuda") if taken is None else taken.masters
        )
        check_masters(network, masters)
        keep_on_device(network, masters, run.device)
        ring = Ring(masters, ring_groups, run.device, copier_for(run.device, use_stream))
        network.residency = BlockStreaming(
            masters, ring, blocks=len(network.stack.blocks), blocks_per_group=blocks_per_group
        )
        _report(run, network, masters, ring, use_stream)

    return Transform(stage=Stage.PLACE, name="group_offload", claims=frozenset({"placement"}), apply=apply, sink=sink)


def masters_of(network: Network, blocks_per_group: int, *, pinned: bool) -> list[Master]:
    """Masters of the frozen block parameters of a network that has its weights; those are then bound to the masters.

    Raises ConfigError for quantised weights: their tensors are not plain memory.
    """
    for block in network.stack.blocks:
        for name, parameter in block.named_parameters():
            if is_traceable_wrapper_subclass(parameter):
                raise ConfigError(
                    f"group offload of quantised weights ({type(parameter).__name__}) is not built yet",
                    where=f"{name} of network {network.name!r}",
                    remedy="use either enable_group_offload or base_model_precision",
                )
    groups = plan(
        network, blocks_per_group, wanted=lambda each: not each.requires_grad, dtype_of=lambda _, each: each.dtype
    )
    masters = []
    for entries in groups:
        master = Master(entries, pinned=pinned)
        for index, entry in enumerate(entries):
            master.fill(index, entry.owner.get_parameter(entry.leaf))
        masters.append(master)
    return masters


def check_masters(network: Network, masters: Sequence[Master]) -> None:
    """Raise PluginError when another transform replaced or unfroze a weight after it went to its master."""
    present = {module for block in network.stack.blocks for module in block.modules()}
    for master in masters:
        for entry, parameter in zip(master.entries, master.parameters, strict=True):
            held = entry.owner._parameters.get(entry.leaf) if entry.owner in present else None
            if held is not parameter or parameter.requires_grad:
                done = "trained" if held is parameter else "replaced"
                raise PluginError(
                    f"group offload streams frozen weights, and {entry.name!r} of network {network.name!r} was {done}",
                    remedy="leave enable_group_offload out, or unload the plugin that changes this weight",
                )


def keep_on_device(network: Network, masters: Sequence[Master], device: torch.device) -> None:
    """Move what does not stream (adapters, buffers) to ``device``, each parameter staying the same object."""
    streamed = {parameter for master in masters for parameter in master.parameters}
    for block in network.stack.blocks:
        for parameter in block.parameters():
            if parameter not in streamed and parameter.device != device:
                # An adapter is made beside the weight it adapts, and that one is in host memory.
                parameter.data = parameter.data.to(device)
        for owner in block.modules():
            for name, buffer in owner._buffers.items():
                if buffer is not None:
                    owner._buffers[name] = buffer.to(device)


def copier_for(device: torch.device, use_stream: bool) -> Copier:
    """A private stream where there are streams and one is wanted, else copies in line."""
    return StreamCopier(device) if use_stream and device.type == "cuda" else InlineCopier()


def _report(run: Run, network: Network, masters: Sequence[Master], ring: Ring, use_stream: bool) -> None:
    hosted = sum(master.nbytes for master in masters)
    run.log.info(
        "group offload of %s: %d groups, %.2f GiB in host memory, %.2f GiB on %s at any time",
        network.name,
        len(masters),
        hosted / GIB,
        ring.nbytes / GIB,
        run.device,
    )
    if use_stream and run.device.type != "cuda":
        run.log.warning("group_offload_use_stream has no effect on %s: it has no streams", run.device)
