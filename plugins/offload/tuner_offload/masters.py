"""Where the frozen weights of a group of blocks live: one flat buffer in host memory.

One buffer a group means one copy a group. Each tensor in it begins at a 256-byte boundary, so that a view
in any dtype is legal, copies are coalesced, and (on the CPU) kernels see the alignment that they see
without offload.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tuner.model import Network

ALIGNMENT = 256


@dataclass(frozen=True)
class Entry:
    """One frozen tensor of a group: whose it is and where it lies in the group's buffer."""

    name: str
    """full name in the network"""
    block: int
    owner: nn.Module
    leaf: str
    """name of the parameter in ``owner``"""
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor, without padding."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def view(self, buffer: Tensor) -> nn.Parameter:
        """The tensor in ``buffer`` (N,) uint8, as a frozen parameter."""
        flat = buffer[self.offset : self.offset + self.nbytes].view(self.dtype)
        return nn.Parameter(flat.view(self.shape), requires_grad=False)


class Master:
    """The host memory of one group's weights, and the parameters that are bound while it is not on the device."""

    def __init__(self, entries: Sequence[Entry], *, pinned: bool) -> None:
        self.entries = tuple(entries)
        self.nbytes = max((_aligned(entry.offset + entry.nbytes) for entry in entries), default=0)
        self.buffer = torch.empty(self.nbytes, dtype=torch.uint8, pin_memory=pinned)
        self.parameters = tuple(entry.view(self.buffer) for entry in entries)

    @property
    def layout(self) -> tuple[tuple[int, tuple[int, ...], torch.dtype], ...]:
        """What decides the views into a buffer: groups with equal layouts share those of a ring buffer."""
        return tuple((entry.offset, entry.shape, entry.dtype) for entry in self.entries)

    @torch.no_grad()
    def fill(self, index: int, tensor: Tensor) -> None:
        """Copy ``tensor`` into entry ``index`` and bind the master's parameter to its owner."""
        self.parameters[index].copy_(tensor)
        bind(self.entries[index], self.parameters[index])


def bind(entry: Entry, parameter: nn.Parameter) -> None:
    """Make ``parameter`` the one that the entry's owner computes with: by reference, nothing is copied."""
    # Past nn.Module.__setattr__: this runs for every tensor of every block of every step.
    entry.owner._parameters[entry.leaf] = parameter


def plan(
    network: Network,
    blocks_per_group: int,
    *,
    wanted: Callable[[nn.Parameter], bool],
    dtype_of: Callable[[str, nn.Parameter], torch.dtype],
) -> list[list[Entry]]:
    """The entries of each group of consecutive blocks, from the parameters that are ``wanted``."""
    blocks = network.stack.blocks
    names = {module: name for name, module in network.module.named_modules()}
    groups: list[list[Entry]] = []
    for start in range(0, len(blocks), blocks_per_group):
        group: list[Entry] = []
        offset = 0
        for block in range(start, min(start + blocks_per_group, len(blocks))):
            for owner in blocks[block].modules():
                for leaf, parameter in owner._parameters.items():
                    if parameter is None or not wanted(parameter):
                        continue
                    name = f"{names[owner]}.{leaf}"
                    entry = Entry(name, block, owner, leaf, tuple(parameter.shape), dtype_of(name, parameter), offset)
                    group.append(entry)
                    offset = _aligned(offset + entry.nbytes)
        groups.append(group)
    return groups


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT
