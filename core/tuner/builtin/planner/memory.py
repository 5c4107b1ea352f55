"""Memory of a training step by component, in closed form: no torch, no weights. Derived in docs/memory-model.md."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod

from tuner.builtin.planner.memory_blocks import (
    FLOAT32,
    Block,
    activations_of,
    block_bytes,
    block_parameters,
    blocks_of,
    bytes_of,
    plain_bytes,
    streamed_blocks,
)
from tuner.spec import Held
from tuner.workload import Workload

CONTEXT = 0.5e9
"""Bytes that CUDA's context and the libraries' workspaces take, about; it is no tensor."""
HEAD = Held(dim=1, float32=3)
"""Of a token while the last norm and the projection are computed."""
IN_FLIGHT = 2
"""Offloaded inputs on the device while a block is computed again: its own, and the one brought back meanwhile."""


@dataclass(frozen=True)
class Memory:
    """Bytes at the worst moment, by component."""

    device: dict[str, float] = field(default_factory=dict)
    host: dict[str, float] = field(default_factory=dict)

    @property
    def on_device(self) -> float:
        """Bytes in all."""
        return sum(self.device.values())

    @property
    def on_host(self) -> float:
        """Bytes in all, beside what the process itself takes."""
        return sum(self.host.values())


def predict(workload: Workload, *, first: bool = False) -> Memory:
    """What a training step of ``workload`` holds on the device, and on the host, when it holds most on the device.

    Arguments
        first: whether it is the first of a run: the optimizer makes its state when the backward is over.
    """
    blocks = blocks_of(workload)
    device, host = weights(workload)
    worst = max(_moments(workload, blocks), key=lambda moment: sum(moment.values()))
    if first:
        over = _moment(0.0, 0.0, sum(block.gradient for block in blocks))
        state = device.pop("optimizer state")
        if sum(over.values()) + state > sum(worst.values()):
            device["optimizer state"], worst = state, over
    device |= worst | {"around the blocks": around(workload), "CUDA context": CONTEXT}
    host["block inputs"] = sum(block.input for block in blocks if block.offloaded)
    return Memory(without_zeros(device), without_zeros(host))


def weights(workload: Workload) -> tuple[dict[str, float], dict[str, float]]:
    """(on the device, on the host): weights and optimizer state; gradients where they are on the host."""
    network, adapters = workload.network, workload.adapter_parameters
    block, streamed = block_bytes(workload), streamed_blocks(workload)
    resident = network.blocks if workload.resident_blocks is None else workload.resident_blocks
    device = {
        "base weights": resident * block + network.other * plain_bytes(workload),
        "dequantised weight": _dequantised(workload),
        "adapters": adapters * FLOAT32,
        "optimizer state": adapters * workload.optimizer_bytes,
    }
    whole = network.blocks * block_parameters(network) + network.other
    trained = whole if workload.trained == "network" else adapters
    device["averages"] = trained * workload.average_bytes
    host = {"averages": trained * workload.average_bytes_on_host}
    host |= {"base weights": streamed * block if workload.offloaded_to == "host" else 0.0}
    if workload.trained == "network":
        moved = streamed * block_parameters(network)
        device["optimizer state"] = (whole - moved) * workload.optimizer_bytes
        host |= {"gradients": streamed * block, "optimizer state": moved * workload.optimizer_bytes}
    if workload.shards > 1:
        _spread(workload, device, host)
    return device, host


def _spread(workload: Workload, device: dict[str, float], host: dict[str, float]) -> None:
    """Leave this process its part of the network's own weights; around the blocks they are whole throughout a step."""
    network, block = workload.network, block_bytes(workload)
    trains = workload.trained == "network"
    parts = {name: device[name] / workload.shards for name in ("base weights", *(("optimizer state",) * trains))}
    if trains:
        device["averages"] /= workload.shards
    if workload.parts_on_host:
        host |= parts
        parts = dict.fromkeys(parts, 0.0)
    gathered = network.blocks if workload.gathered_blocks is None else min(network.blocks, workload.gathered_blocks)
    # Beside them the gradients of the block at work, before each process keeps its part of them.
    device |= parts | {"gathered weights": (gathered + trains) * block + network.other * plain_bytes(workload)}


def _dequantised(workload: Workload) -> float:
    """The matrix that is computed with at the moment, where weights are kept in fewer bits than that takes."""
    if workload.weight_bytes >= workload.activation_bytes:
        return 0.0
    return max(each.inputs * each.outputs for each in workload.network.matrices) * workload.activation_bytes


def around(workload: Workload) -> float:
    """Latents, noise, noisy latents and target in float32, the network's input, text and embedded frames, tables."""
    network, width = workload.network, workload.activation_bytes
    held = activations_of(workload)
    tokens = workload.samples * workload.tokens
    clip = tokens * prod(network.patch) * (4 * workload.latents.channels * FLOAT32 + network.in_channels * width)
    raw = network.text_tokens * network.text_dim + (network.text_tokens + network.image_tokens) * network.dim
    throughout = tokens * bytes_of(held.around, network, width) + workload.tokens * held.companions
    return clip + workload.samples * raw * width + throughout


def _moments(workload: Workload, blocks: list[Block]) -> Iterator[dict[str, float]]:
    """What a step holds of activations and gradients, at each moment that may be its worst.

    Backward comes from the last block: gradients of blocks behind the one at work are there, and with micro-batches
    those of all blocks, from the one before.
    """
    before, gradients = 0.0, sum(block.gradient for block in blocks)
    added_up = gradients if workload.micro_batches > 1 else 0.0
    yield _moment(0.0, 0.0, gradients)
    for block in blocks:
        own = max(gradients, added_up)
        gradients = max(gradients - block.gradient, added_up)
        flight = block.input * block.checkpointed * (IN_FLIGHT if block.offloaded else 1)
        if block.checkpointed:
            for extra in block.recompute:
                yield _moment(before + flight, block.kept + extra, gradients)
        else:
            yield _moment(before, block.kept + block.forward, added_up)
        for extra in block.backward:
            yield _moment(before + flight, block.kept + extra, own)
        before += block.held
    head = workload.samples * workload.tokens * bytes_of(HEAD, workload.network, workload.activation_bytes)
    yield _moment(before, head + sum(block.copies for block in blocks), added_up)


def _moment(before: float, working: float, gradients: float) -> dict[str, float]:
    """
    Arguments
        before: held for the backward of blocks before the one at work.
        working: held by that block.
    """
    return {"kept for backward": before, "block at work": working, "gradients": gradients}


def without_zeros(components: dict[str, float]) -> dict[str, float]:
    """``components`` without those that hold nothing."""
    return {name: size for name, size in components.items() if size}
