"""Putting a network's blocks into host memory: while its weights are read, or afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from tuner.errors import PluginError
from tuner.model import Network, Stage, Transform
from tuner_offload.disk import DiskStore
from tuner_offload.host import HostStore
from tuner_offload.leaf import LeafStreaming, leaves
from tuner_offload.masters import Master, bind
from tuner_offload.reading import MasterSink
from tuner_offload.ring import Ring
from tuner_offload.schedule import RING_GROUPS, groups, streamed_blocks
from tuner_offload.staged import staged_copier
from tuner_offload.streaming import BlockStreaming
from tuner_offload.transfer import copier_for, has_streams

if TYPE_CHECKING:
    from tuner.run import Run

GIB = 2**30


def group_offload(
    run: Run,
    *,
    blocks_per_group: int,
    use_stream: bool,
    resident: int = 0,
    by_leaf: bool = False,
    disk: DiskStore | None = None,
) -> Transform:
    """The transform that makes a network's blocks stream through the device buffers of one ring.

    Arguments
        blocks_per_group: blocks that move together.
        use_stream: copy beside the computation, where the device can.
        resident: blocks that stay on the device.
        by_leaf: stream layer by layer instead of by groups of blocks.
        disk: where masters are kept; host memory unless given.
    """
    sinks: dict[str, MasterSink] = {}
    rings: list[Ring] = []

    def sink(network: Network) -> MasterSink:
        blocks = network.stack.blocks
        streamed = streamed_blocks(len(blocks), resident)
        grouped = [[(block, blocks[block]) for block in group] for group in groups(streamed, blocks_per_group)]
        store = disk or HostStore(pinned=run.device.type == "cuda")
        sinks[network.name] = MasterSink(network, leaves(network, streamed) if by_leaf else grouped, store)
        return sinks[network.name]

    def apply(network: Network) -> None:
        masters = (sinks.pop(network.name, None) or sink(network)).finish()
        sinks.clear()
        check_masters(network, masters)
        keep_on_device(network, masters, run.device)
        if not rings:
            copier = (copier_for if disk is None else staged_copier)(run.device, use_stream)
            rings.append(Ring(RING_GROUPS, run.device, copier))
        ring = rings[0]
        network.residency = (
            LeafStreaming(masters, ring) if by_leaf else BlockStreaming(masters, ring, blocks=len(network.stack.blocks))
        )
        _report(run, network, masters, ring, use_stream, "in host memory" if disk is None else "on disk")
        if disk is not None:
            run.log.info("group offload of %s: %s", network.name, disk.describe())

    return Transform(stage=Stage.PLACE, name="group_offload", claims=frozenset({"placement"}), apply=apply, sink=sink)


def check_masters(network: Network, masters: Sequence[Master]) -> None:
    """Raise PluginError when another transform replaced a weight after it went to its master."""
    present = {module for block in network.stack.blocks for module in block.modules()}
    for master in masters:
        for entry, value in zip(master.entries, master.values, strict=True):
            if entry.is_buffer:
                bind(entry, value)  # the core brings all buffers to the device once the weights are read
            elif entry.owner not in present or entry.bound is not value:
                raise PluginError(
                    f"group offload streams weights, and {entry.name!r} of network {network.name!r} was replaced",
                    remedy="leave enable_group_offload out, or unload the plugin that changes this weight",
                )


def keep_on_device(network: Network, masters: Sequence[Master], device: torch.device) -> None:
    """Move what does not stream (adapters, small buffers) to ``device``, each parameter staying the same object."""
    streamed = {id(value) for master in masters for value in master.values}
    for block in network.stack.blocks:
        for parameter in block.parameters():
            if id(parameter) not in streamed and parameter.device != device:
                # An adapter is made beside the weight it adapts, and that one is in host memory.
                parameter.data = parameter.data.to(device)
        for owner in block.modules():
            for name, buffer in owner._buffers.items():
                if buffer is not None and id(buffer) not in streamed:
                    owner._buffers[name] = buffer.to(device)


def _report(run: Run, network: Network, masters: Sequence[Master], ring: Ring, use_stream: bool, where: str) -> None:
    hosted = sum(master.nbytes for master in masters)
    run.log.info(
        "group offload of %s: %d groups, %.2f GiB %s, %.2f GiB on %s at any time%s",
        network.name,
        len(masters),
        hosted / GIB,
        where,
        ring.nbytes / GIB,
        run.device,
        ", gradients and optimizer on the host" if any(master.trained for master in masters) else "",
    )
    if use_stream and not has_streams(run.device):
        run.log.warning(
            "group_offload_use_stream has no effect on %s: it has no streams to rely on, copies are made in line",
            run.device,
        )
    elif not use_stream and has_streams(run.device):
        run.log.info("group_offload_use_stream: true would copy while the device computes")
