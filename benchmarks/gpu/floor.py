"""The least time that a step can take on this device, and the share of its products' rate that the model's FLOP use.

The only place of the benchmarks that reads the project's FLOP model and cards.
"""

from __future__ import annotations

from tuner import flops
from tuner.builtin.planner.cards import Card, named, of_device
from tuner.builtin.planner.speed import speed_up
from tuner.workload import Workload

TERA, GIB = 1e12, 2**30
BACKWARD_TRAFFIC = 1.5
"""Times the elementwise traffic of a fused block's forward that its backward has."""


def card() -> Card | None:
    """This machine's CUDA device, where its rates are known."""
    import torch

    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties()
    return of_device(found.name, found.total_memory / GIB)


def seconds(work: Workload, device: Card) -> float:
    """Of a step: products, attention by the fastest kernel, and elementwise traffic as little as fused blocks can do
    with, 21 + 2 F/D units of S x D elements forward. All weights and inputs on the device."""
    total = flops.outside_flops(work).linear / device.matmul
    for block in flops.block_flops(work):
        total += block.linear / device.matmul
        total += block.attention_forward / device.attention + block.backward.attention / device.attention_backward
    units = 21 + 2 * work.network.ffn_dim / work.network.dim
    for index, tokens in enumerate(work.block_tokens):
        unit = tokens * work.network.dim * work.activation_bytes * work.samples * work.micro_batches
        total += units * (1 + flops.is_checkpointed(work, index) + BACKWARD_TRAFFIC) * unit / device.bandwidth
    return total / TERA


def figures(work: Workload, step: float, device: Card | None) -> dict[str, float]:
    """What a step of ``step`` seconds comes to: TFLOP of the model, and MFU and times the floor on a known device."""
    flop = flops.step_flops(work).model
    found = {"tflop": flop / TERA}
    if device is not None:
        floor = seconds(work, device)
        found |= {"mfu": flop / step / (device.matmul * TERA), "floor_seconds": floor, "of_floor": step / floor}
    if any(work.dropped):
        found["times_by_model"] = speed_up(work, device)
    return found


__all__ = ["Card", "card", "figures", "named", "seconds"]
