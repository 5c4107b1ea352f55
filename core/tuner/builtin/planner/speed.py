"""How long a step should take on a card: an estimate of the floor, from FLOP, traffic and rates.

Not in it: reading weights and optimizer states (small beside the work from a few thousand tokens on), dequantising
weights, loading data, launching kernels (what bounds small models), reading blocks from disk, and other processes.
"""

from __future__ import annotations

from dataclasses import replace

from tuner.builtin.planner.cards import Card
from tuner.flops import Pass, StepFlops, block_flops, is_checkpointed, outside_flops, step_flops
from tuner.workload import Workload

TERA, GIGA = 1e12, 1e9
FORWARD_UNITS, BACKWARD_UNITS = (195.0, 2.2), (286.0, 3.2)
"""Elementwise traffic of a block in units of S·D elements, read and written: a constant, and a slope per ratio of the
feed-forward's width to the network's. Bytes counted over diffusers' Wan block in bf16, 1.3B and 14B, without LoRA."""


def step_seconds(workload: Workload, card: Card) -> float:
    """Seconds that an optimizer step in one process takes at least.

    Matrices, attention and elementwise traffic come one after the other. Of what comes over the bus, weights of blocks
    and inputs of blocks that wait on the host, counts what is longer than the block it is hidden behind.
    """
    around = outside_flops(workload).linear / (card.matmul * TERA)
    return around + sum(
        _block_seconds(workload, index, flops, card) for index, flops in enumerate(block_flops(workload))
    )


def speed_up(workload: Workload, card: Card | None = None) -> float:
    """How many times as fast a step is as without token routes; by FLOP alone where no card is given."""
    unrouted = replace(workload, dropped=())
    if card is None:
        return step_flops(unrouted).hardware / step_flops(workload).hardware
    return step_seconds(unrouted, card) / step_seconds(workload, card)


def _block_seconds(workload: Workload, index: int, flops: StepFlops, card: Card) -> float:
    """Forward and backward of one block, each as long as its arithmetic or its transfers, whichever is longer."""
    tokens, clips = workload.block_tokens[index], workload.samples * workload.micro_batches
    recomputed = is_checkpointed(workload, index)
    forward_units, backward_units = (
        constant + slope * workload.network.ffn_dim / workload.network.dim
        for constant, slope in (FORWARD_UNITS, BACKWARD_UNITS)
    )
    unit = tokens * workload.network.dim * workload.activation_bytes * clips / (card.bandwidth * TERA)
    unit *= workload.traffic
    forward = _pass_seconds(flops.forward, card, card.attention) + forward_units * unit
    backward = (
        _pass_seconds(flops.recompute, card, card.attention)
        + _pass_seconds(flops.backward, card, card.attention_backward)
        + (forward_units * recomputed + backward_units) * unit
    )
    weights, inputs = _weight_bytes_moved(workload), _input_bytes_moved(workload, index)
    bus = card.pcie * GIGA
    # Both ways at once: forward sends inputs while weights come, backward fetches both.
    return max(forward, weights / bus, inputs / bus) + max(backward, (weights + inputs) / bus)


def _pass_seconds(work: Pass, card: Card, attention: float) -> float:
    return work.linear / (card.matmul * TERA) + work.attention / (attention * TERA)


def _weight_bytes_moved(workload: Workload) -> float:
    """Bytes of weights that come from the host in one pass over a block, on average over the blocks."""
    network, resident = workload.network, workload.resident_blocks
    if resident is None or resident >= network.blocks:
        return 0.0
    matrices = sum(linear.inputs * linear.outputs for linear in network.matrices)
    size = matrices * workload.weight_bytes + network.small * workload.activation_bytes
    return size * (network.blocks - resident) / network.blocks * workload.micro_batches


def _input_bytes_moved(workload: Workload, index: int) -> float:
    """Bytes of a block's input that wait on the host."""
    if workload.checkpointing != "offload" or not is_checkpointed(workload, index):
        return 0.0
    clips = workload.samples * workload.micro_batches
    return workload.block_tokens[index] * workload.network.dim * workload.activation_bytes * clips
