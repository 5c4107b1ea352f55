"""Which blocks stream and which stay, from the numbers in the config: no torch."""

from __future__ import annotations

from collections.abc import Sequence

RING_GROUPS = 2
"""Groups on the device at any time: the one that computes and the one being copied."""


def streamed_blocks(blocks: int, resident: int) -> list[int]:
    """The blocks that stream, where ``resident`` of ``blocks`` stay on the device: spread evenly.

    With two buffers a copy has the time from one streamed block to the next but one. Residents between them
    lengthen every copy's time alike; at the end of the network they would leave the others as they were, and the
    bus idle. The turn from forward to backward costs nothing either way: the last groups are still in the ring.
    """
    count = blocks - resident
    return [((2 * index + 1) * blocks) // (2 * count) for index in range(count)]


def groups(streamed: Sequence[int], blocks_per_group: int) -> list[list[int]]:
    """Streamed blocks that move together."""
    return [list(streamed[start : start + blocks_per_group]) for start in range(0, len(streamed), blocks_per_group)]


def resident_at_any_time(blocks: int, resident: int, blocks_per_group: int) -> int:
    """Blocks whose weights are on the device: those that stay and those in the ring."""
    return min(blocks, resident + RING_GROUPS * blocks_per_group)


def leaf_ring_blocks(matrices: Sequence[int]) -> int:
    """Blocks, in whole ones, that a ring of single layers is as large as; ``matrices``: sizes of a block's layers."""
    return -(-RING_GROUPS * max(matrices) // sum(matrices))
